"""examples/own_words.py: rows that a LLaMA answers itself."""

import json

import pytest

from conftest import LLAMA
from examples import own_words, smollm2
from extras import instructions


def test_rows_to_train_on(call, monkeypatch, tmp_path):
    things = "water,\n    an onion"
    monkeypatch.setattr(
        own_words, "QUESTIONS", [("Where do you find {}?", things), ("Draw {}.", things)])
    monkeypatch.setattr(own_words, "NEW_TOKENS", 3)
    monkeypatch.setattr(own_words, "whole_sentences", lambda text: text or "nothing")
    file = tmp_path / "own.jsonl"
    code, stdout, _ = call(own_words, LLAMA, file)
    assert code == 0
    assert f"written: {file}, 4 rows" in stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [
        "Where do you find water?", "Where do you find an onion?", "Draw water.", "Draw an onion."]
    samples, bad_rows = instructions.read_instructions(f"jsonl:{file}", False, True)
    assert len(samples) == 4
    assert not bad_rows


@pytest.mark.parametrize("text, expected", [
    ("It is red. It is", "It is red."),
    (" It is red.\nQuestion: What is blue?\nResponse: It is.", "It is red."),
    ("It is red", ""),
    ("The answer is:\nThe answer is red.", ""),
    ("", ""),
])
def test_an_answer_ends_with_a_sentence(text, expected):
    assert own_words.whole_sentences(text) == expected


def test_a_test_is_left_out(call, monkeypatch, tmp_path):
    """Some questions are among the fifty of examples/smollm2.py. --without takes them out."""
    asked = own_words.questions()
    assert len(set(asked)) == len(asked)
    tested = {row["prompt"] for row in smollm2.question_rows()}
    assert "What is 3 + 4?" in tested & set(asked)

    file = tmp_path / "test.jsonl"
    instructions.write_rows(file, smollm2.question_rows())
    rest = []
    monkeypatch.setattr(own_words, "answer", lambda llama, questions: rest.extend(questions) or [])
    call(own_words, LLAMA, tmp_path / "own.jsonl", "--without", file)
    assert set(rest) == set(asked) - tested


def test_a_file_that_cannot_be_written(fails, tmp_path):
    fails(own_words, LLAMA, tmp_path, says=["FILE"])


def test_a_test_that_cannot_be_read(fails, tmp_path):
    missing = tmp_path / "missing.jsonl"
    fails(own_words, LLAMA, tmp_path / "own.jsonl", "--without", missing, says=["missing.jsonl"])


def test_a_test_with_a_row_that_cannot_be_read(fails, tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [{"prompt": "What is 3 + 4?", "answer": "7"}, {"question": "What is 2 + 2?"}]
    instructions.write_rows(file, rows)
    fails(own_words, LLAMA, tmp_path / "own.jsonl", "--without", file,
          says=["--without", "test.jsonl line 2"])
