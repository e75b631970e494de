"""Answers and scores from the command line, with the output of a training run."""

import json
import os
import signal
import subprocess
import sys

import pytest

import generate
import miniature
import train
from conftest import ADAPTER, LLAMA, ROOT, VIT, flags, wait_for_torch
from data import Sample
from extras import resume
from extras.evaluate import COLUMNS
from extras.flags import generate_parser
from extras.instructions import instruction_prompt
from fast.engine import Engine
from files import LavinError, fingerprint
from tiny import world

MODEL = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)


# A prompt


def test_a_single_prompt_is_streamed(call, lavin, samples, expected):
    sample = samples[0]
    code, stdout, stderr = call(
        generate, "--prompt", sample.prompt, "--image", sample.image, *MODEL,
        "--max-new-tokens", 12)
    assert (code, stderr) == (0, "")
    greedy = [token for token in expected["greedy"][0].tolist() if token >= 0]
    assert stdout.splitlines()[-1] == lavin.tokenizer.decode(greedy)


def test_a_plain_question_becomes_an_instruction(call, samples):
    def answer(prompt):
        code, stdout, stderr = call(
            generate, "--prompt", prompt, *MODEL, "--max-new-tokens", 5)
        assert (code, stderr) == (0, "")
        return stdout.splitlines()[-1]

    assert answer("Name a metal.") == answer(samples[3].prompt) != answer("Why?")


def test_seeded_sampling(call):
    def answer(seed):
        sampling = ("--temperature", 1, "--top-p", 0.9, "--seed", seed)
        code, stdout, stderr = call(generate, "--prompt", "Name a metal.", *MODEL, *sampling)
        assert (code, stderr) == (0, "")
        return stdout

    assert answer(1) == answer(1) != answer(2)


# ScienceQA


def fractions(stdout):
    """The last row of the table of scores: right/total for each of COLUMNS."""
    return stdout.split("NAT")[1].splitlines()[2].split()


@pytest.fixture
def asked(monkeypatch):
    """The samples that generate.py has asked."""
    collected = []
    answer_data = generate.answer_data

    def collecting(lavin, truths, samples, *more):
        collected.extend(samples)
        answer_data(lavin, truths, samples, *more)

    monkeypatch.setattr(generate, "answer_data", collecting)
    return collected


def test_seeded_sampling_of_a_data_set(call, sqa, tmp_path):
    def outputs(seed):
        path = tmp_path / f"{seed}.json"
        code, _, _ = call(
            generate, "--data", "sqa", "--data-root", sqa, *MODEL, "--temperature", 1,
            "--seed", seed, "--max-seq-len", 200, "--max-new-tokens", 4, "--predictions", path)
        assert code == 0
        return json.loads(path.read_text())["outputs"]

    assert outputs(1) == outputs(1) != outputs(2)


def test_a_model_that_is_not_the_adapters_own_is_noted(capsys):
    remembered = {"llama_hash": "another", "vit_hash": fingerprint(VIT)}
    resume.note_other_models(LLAMA, VIT, None, remembered)
    assert capsys.readouterr().out.splitlines() == [
        f"note     the adapters were trained with other files than {LLAMA}"]
    resume.note_other_models(LLAMA, VIT, None, {})
    assert capsys.readouterr().out == ""


def test_what_training_knew_need_not_be_said_again(call, sqa, tmp_path, monkeypatch, asked):
    code, _, _ = call(train, *flags(
        sqa, tmp_path / "out", "--format", "CQM-A", "--max-steps", 2, "--captions"))
    assert code == 0
    monkeypatch.chdir(tmp_path)             # the default of --adapter is out/checkpoint.pth
    code, stdout, stderr = call(
        generate, "--data", "sqa", "--split", "test", "--predictions", "p.json",
        "--max-new-tokens", 8)
    assert (code, stderr) == (0, "")
    assert "format CQM-A" in stdout
    assert "12 problems" in stdout
    assert {sample.id for sample in asked if "a disc on white" in sample.prompt} == {
        str(i) for i in range(32, 44, 2)}
    assert "12 of 12 outputs name no valid choice" in stdout
    assert stdout.split("NAT")[1].split()[:8] == list(COLUMNS[1:])
    written = json.loads((tmp_path / "p.json").read_text())
    assert set(written) == {"results", "outputs"}
    assert set(written["results"].values()) == {-1}
    assert set(written["outputs"]) == {str(i) for i in range(32, 44)}


def test_prompts_that_do_not_fit_count_as_wrong(call, sqa):
    code, stdout, _ = call(
        generate, "--data", "sqa", "--data-root", sqa, *MODEL, "--max-seq-len", 90,
        "--max-new-tokens", 2)
    assert code == 0
    assert "do not fit the context of 90" in stdout
    assert fractions(stdout)[-1] == "0/12"


def test_letters_are_what_greedy_generation_says_where_the_answer_comes_first(call, tmp_path):
    """The model is the small world's LLaMA, which answers text questions without an adapter."""
    root = tmp_path / "world"
    world.write_world(root, sizes=(1, 1, 60))

    def answer(*how):
        path = tmp_path / "predictions.json"
        code, stdout, stderr = call(
            generate, "--data", "sqa", "--data-root", root, "--llama", world.PATHS["llama"],
            "--vit", world.PATHS["vit"], "--adapter", "none", "--max-seq-len", 160,
            "--predictions", path, *how)
        assert (code, stderr) == (0, "")
        return json.loads(path.read_text())["results"], stdout

    greedy, _ = answer("--max-new-tokens", 8)
    letters, stdout = answer("--score", "letters")
    n_named = 0
    for pid, index in greedy.items():
        if index >= 0:
            n_named += 1
            assert letters[pid] == index, pid
    assert n_named > 30
    assert -1 not in letters.values()
    assert "0 of 60 outputs" in stdout


def test_letters_need_a_data_set_with_choices(fails):
    letters = ("--score", "letters", *MODEL)
    says = ["--score letters goes with --data sqa", "leave out --temperature"]
    fails(generate, "--prompt", "x", *letters, says=says)
    fails(generate, "--data", "sqa", "--temperature", 1, *letters, says=says)


def test_blank_images_are_white_where_there_was_a_picture(sqa):
    def read(*more):
        args = generate_parser("").parse_args(["--data", "sqa", "--data-root", str(sqa), *more])
        return generate.load_data(args, {}, "QCM-ALE")[1]

    n_pictures = 0
    for sample, blank in zip(read(), read("--blank-images"), strict=True):
        assert blank.prompt == sample.prompt
        if sample.image is None:
            assert blank.image is None
        else:
            assert blank.image.convert("RGB").getcolors() == [(1, (255, 255, 255))]
            n_pictures += 1
    assert n_pictures == 6


# Rows of your own


@pytest.fixture
def ask_rows(call, tmp_path, samples):
    """ask_rows("--flag", value, …): ask three rows. Two have an answer, one has a picture."""
    path = tmp_path / "mine.jsonl"
    (tmp_path / "a.png").write_bytes(samples[0].image.read_bytes())
    path.write_text("""
        {"prompt": "Name a metal.", "answer": "Iron.", "kind": "word"}
        {"prompt": "Which colour?", "answer": "Red.", "image": "a.png", "kind": "colour"}
        {"prompt": "Why?", "id": "why"}
    """)

    def ask_rows(*flags):
        return call(generate, "--data", f"jsonl:{path}", *MODEL, "--workers", 0,
                    "--predictions", tmp_path / "p.json", *flags)
    return ask_rows


def test_rows_are_answered_and_scored(ask_rows, tmp_path, lavin):
    code, stdout, stderr = ask_rows("--by", "kind", "--max-new-tokens", 5)
    assert (code, stderr) == (0, "")
    table = [line.split() for line in stdout.splitlines()]
    for group in (["word"], ["colour"]):
        assert [*group, "0.00", "0/1"] in table
    assert ["exact", "match", "0.00", "0/2"] in table
    assert "1 rows have no answer" in stdout
    written = json.loads((tmp_path / "p.json").read_text())
    assert [row["id"] for row in written] == [1, 2, "why"]
    assert [row["right"] for row in written] == [False, False, None]
    text = Sample(instruction_prompt("Name a metal."))
    picture = Sample(instruction_prompt("Which colour?", has_picture=True), "", tmp_path / "a.png")
    assert [row["output"] for row in written[:2]] == lavin.generate([text, picture], 5)


def test_a_choice_of_the_files_answers_is_taken(ask_rows, tmp_path):
    code, stdout, stderr = ask_rows("--score", "choices")
    assert (code, stderr) == (0, "")
    written = json.loads((tmp_path / "p.json").read_text())
    assert {row["output"] for row in written} <= {"Iron.", "Red."}
    n_right = sum(row["right"] is True for row in written)
    table = [line.split() for line in stdout.splitlines()]
    assert ["exact", "match", f"{50 * n_right:.2f}", f"{n_right}/2"] in table


def test_a_row_with_a_bad_picture_has_no_answer(ask_rows, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    code, _, stderr = ask_rows("--score", "choices")
    assert code == 2 and "mine.jsonl line 3" in stderr and len(stderr.splitlines()) == 1
    written = json.loads((tmp_path / "p.json").read_text())
    assert written[1]["output"] == "" and not written[1]["right"]
    assert "not a picture" in written[1]["missing"]


def test_flags_that_rows_do_not_go_with_are_one_line(ask_rows, fails, sqa, tmp_path):
    code, _, stderr = ask_rows("--by", "colour")
    assert code == 2 and "--by colour: no row of" in stderr and "answer, id, image" in stderr
    code, _, stderr = ask_rows("--score", "letters")
    assert code == 2 and "--score letters goes with --data sqa" in stderr
    code, _, stderr = ask_rows("--score", "choices", "--temperature", 1)
    assert code == 2 and "--score choices goes with" in stderr
    caption = ("--data", "caption:x.json", "--prompt", "x", "--predictions", tmp_path / "p.json")
    fails(generate, *caption, "--by", "kind", says=["--by goes with", "caption:x.json"])
    fails(generate, "--data", f"mme:{tmp_path}", "--by", "kind", says=["--by goes with", "mme:"])
    fails(generate, "--data", "sqa", "--by", "kind", says=["--by kind", "skill, topic"])
    fails(generate, "--data", "sqa", "--score", "choices", says=["--score choices goes with"])
    for source in ("no.jsonl", "jsonl:", "sqa:x", "dogs:x"):
        fails(generate, "--data", source, says=[f"--data {source}: no such file", "jsonl:FILE"])
    fails(generate, "--data", "jsonl:no.jsonl", *MODEL, says=["no.jsonl: no such file"])


# Answers that are saved


@pytest.fixture
def ask_sqa(call, sqa, tmp_path):
    """ask_sqa("--flag", value, …): answer the test split, with --predictions tmp_path/p.json."""
    def ask_sqa(*flags):
        return call(generate, "--data", "sqa", "--data-root", sqa, *MODEL, "--max-seq-len", 256,
                    "--predictions", tmp_path / "p.json", *flags)
    return ask_sqa


@pytest.mark.parametrize("flags", [
    ("--max-new-tokens", 3, "--workers", 0),
    ("--max-new-tokens", 3, "--workers", 2),
    ("--score", "letters", "--workers", 0),
], ids=["alone", "workers", "letters"])
def test_a_bad_picture_costs_its_own_answer_alone(ask_sqa, sqa, tmp_path, flags):
    (sqa / "images" / "test" / "40" / "image.png").write_bytes(b"no picture")
    code, stdout, stderr = ask_sqa(*flags)
    (line,) = stderr.splitlines()
    assert code == 2 and "problem 40: " in line and "not a picture" in line
    assert "1 of 12 have a picture that cannot be decoded" in stdout
    written = json.loads((tmp_path / "p.json").read_text())
    n_right = 0
    for pid, index in written["results"].items():
        n_right += index == miniature.problem(int(pid), "test")["answer"]
    assert fractions(stdout)[-1] == f"{n_right}/12"
    assert list(written["missing"]) == ["40"] and "not a picture" in written["missing"]["40"]
    assert written["results"]["40"] == -1
    assert [pid for pid, text in written["outputs"].items() if text == ""] == ["40"]


def test_predictions_are_written_even_if_every_picture_is_bad(ask_sqa, sqa, tmp_path):
    splits = json.loads((sqa / "pid_splits.json").read_text())
    splits["test"] = ["32", "34"]
    (sqa / "pid_splits.json").write_text(json.dumps(splits))
    for pid in splits["test"]:
        (sqa / "images" / "test" / pid / "image.png").write_bytes(b"no picture")
    assert ask_sqa("--max-new-tokens", 3)[0] == 2
    written = json.loads((tmp_path / "p.json").read_text())
    assert set(written["missing"]) == {"32", "34"}
    assert written["outputs"] == {"32": "", "34": ""}


@pytest.mark.parametrize("error, expected", [
    (KeyboardInterrupt(), 130),
    (LavinError("standard output cannot be written"), 2),
    (MemoryError(), 2),
], ids=["Ctrl-C", "full disk", "memory"])
def test_what_ends_a_run_early_leaves_the_answers_so_far(
        ask_sqa, tmp_path, monkeypatch, error, expected):
    step = Engine.step
    calls = []

    def interrupted(engine, ids):
        calls.append(ids)
        if len(calls) == 5:
            raise error
        return step(engine, ids)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, _, stderr = ask_sqa("--max-new-tokens", 3, "--batch-size", 4, "--workers", 0)
    assert code == expected and len(stderr.splitlines()) == (expected == 2)
    written = json.loads((tmp_path / "p.json").read_text())
    answered = [pid for pid, text in written["outputs"].items() if text]
    assert answered and written["missing"]
    assert {*answered, *written["missing"]} == set(map(str, range(32, 44)))


def test_a_run_without_answers_leaves_older_ones_alone(ask_sqa, tmp_path, monkeypatch):
    def interrupted(engine, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "prefill", interrupted)
    (tmp_path / "p.json").write_text("older")
    assert ask_sqa("--max-new-tokens", 3)[0] == 130
    assert (tmp_path / "p.json").read_text() == "older"


# As a process of its own


def start(*args, **more):
    command = [sys.executable, ROOT / "generate.py", *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **more)


def test_a_reader_who_has_read_enough_is_one_line():
    """This is what happens in `generate.py … | head -1`."""
    reading, writing = os.pipe()
    process = start("--prompt", "Name a metal.", *MODEL, stdout=writing)
    os.close(writing)
    assert os.read(reading, 10)         # the first line comes before the model is loaded
    os.close(reading)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = stderr.splitlines()
    assert line.startswith("error: standard output cannot be written")


def test_ctrl_c_is_silent_while_torch_is_imported(tmp_path):
    process = start("--prompt", "x", "--llama", tmp_path)
    wait_for_torch(process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert stderr == "" and process.returncode in (130, -signal.SIGINT)
