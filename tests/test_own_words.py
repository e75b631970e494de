"""examples/own_words.py: rows that a LLaMA answers itself."""

import json

import pytest

from conftest import LLAMA
from examples import own_words, smollm2
from extras import instructions


def test_rows_to_train_on(call, monkeypatch, tmp_path):
    monkeypatch.setattr(own_words, "THINGS", "water,\n    an onion")
    monkeypatch.setattr(own_words, "QUESTIONS", ["Where do you find {}?", "Draw {}."])
    monkeypatch.setattr(own_words, "NEW_TOKENS", 3)
    monkeypatch.setattr(own_words, "whole_sentences", lambda text: text or "nothing")
    file = tmp_path / "own.jsonl"
    code, stdout, _ = call(own_words, LLAMA, file)
    assert code == 0
    assert f"written: {file}, 4 rows" in stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [
        "Where do you find water?", "Draw water.", "Where do you find an onion?", "Draw an onion."]
    samples, bad_rows = instructions.read_instructions(f"jsonl:{file}", False, True)
    assert len(samples) == 4
    assert not bad_rows


@pytest.mark.parametrize("text, expected", [
    ("It is red. It is", "It is red."), ("It is red", "It is red"), ("", "")])
def test_an_answer_ends_with_a_sentence(text, expected):
    assert own_words.whole_sentences(text) == expected


def test_nothing_is_asked_that_measures_what_is_left():
    """The fifty questions of examples/smollm2.py are not among those to train on."""
    measured = {row["prompt"] for row in smollm2.question_rows()}
    assert len(own_words.questions()) == 320
    assert not measured & set(own_words.questions())


def test_a_file_that_cannot_be_written(fails, tmp_path):
    fails(own_words, LLAMA, tmp_path, says=["FILE"])
