"""Bad flags and bad input give one line on stderr: what is wrong, where, and what to do.

The exit code is 2. There is no traceback, and nothing half-written is left. Damaged weights are in
test_checkpoints.py, ScienceQA's files in test_scienceqa.py.
"""

import subprocess
import sys

import pytest

import data
import generate
import train
from conftest import ADAPTER, LLAMA, ROOT, VIT, flags
from helpers import ask, edit


MODEL = ("--adapter", ADAPTER, "--llama", LLAMA, "--vit", VIT, "--max-new-tokens", 2)


# Paths


def test_everything_that_is_missing_is_listed_at_once(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # With nothing there at all, the small world would be used.
    (tmp_path / "weights/7B").mkdir(parents=True)
    fails(train, "--data", "sqa", says=[
        "weights/7B/params.json", "weights/7B/consolidated.00.pth", "weights/7B/tokenizer.model",
        "weights/ViT-L-14.pt", "data/scienceqa/problems.json",
        "https://github.com/lupantech/ScienceQA", "https://github.com/openai/CLIP", "--llama DIR"])
    fails(generate, "--prompt", "x", says=[
        "out/checkpoint.pth", "python train.py", "--adapter FILE", "weights/ViT-L-14.pt"])
    fails(generate, *ask(llama=tmp_path, vit=tmp_path / "no.pt"), says=[
        "params.json", "tokenizer.model", "no.pt"])


def test_without_a_traceback_from_the_shell(tmp_path):
    """The script runs as a person would run it, not in this process."""
    command = [sys.executable, ROOT / "train.py", "--data", "sqa", "--llama", "nowhere"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere/params.json" in result.stderr


def test_a_run_that_trains_nothing_is_refused(fails, sqa, tmp_path):
    run = flags(sqa, tmp_path / "out", "--adapters", "none", "--no-images")
    fails(train, *run, says=["--adapters none with --no-images trains nothing"])


def test_paths_that_cannot_be_written(fails, sqa, tmp_path):
    file = tmp_path / "file"
    file.write_text("untouched")
    fails(train, *flags(sqa, file / "out"), says=[file / "out", "--out"])
    fails(train, *flags(sqa, file), says=[file, "--out"])
    answers = ("--data", "sqa", "--data-root", sqa, *MODEL)
    fails(generate, *answers, "--predictions", file / "p.json", says=[file / "p.json"])
    fails(generate, *answers, "--predictions", tmp_path, says=["--predictions", "directory"])
    assert file.read_text() == "untouched"


# Text


def test_text_that_is_not_unicode(fails, sqa, tmp_path):
    typed = b"caf\xe9".decode(errors="surrogateescape")         # as Python reads from a terminal
    fails(generate, *ask(prompt=typed), says=["the prompt", "not Unicode"])

    def spoil(problems):
        problems["3"]["question"] = "\ud800"

    edit(sqa / "problems.json", spoil)
    fails(train, *flags(sqa, tmp_path / "out"), says=["problem 3", "not Unicode"])


def test_prompts(fails, sqa, tmp_path):
    out = tmp_path / "out"
    answers = ("--data", "sqa", "--data-root", sqa, *MODEL)
    fails(train, *flags(sqa, out, "--format", "QCM-XYZ"), says=[
        "'QCM-XYZ'", ", ".join(data.FORMATS)])
    fails(generate, *answers, "--format", "ALE", says=["'ALE'", "QCM-ALE"])
    fails(generate, *answers, "--split", "exam", says=[
        "no split 'exam'; it has train, val, test"])
    fails(generate, *ask(prompt="why? " * 200), says=[
        "a context of 128 has room for 126", "--max-seq-len"])
    fails(generate, *ask(prompt=" "), says=["--prompt is empty"])
    fails(train, *flags(sqa, out, "--max-seq-len", 9), says=["--max-seq-len 9"])
    fails(train, *flags(sqa, out, "--max-seq-len", 20), says=[
        "--max-seq-len 20 cuts off the answer of every sample"])


# Numbers and devices


@pytest.mark.parametrize("flag, value", [
    ("--micro-batch", 0), ("--batch-size", -1), ("--epochs", 0), ("--epochs", 1.5),
    ("--workers", -1), ("--workers", 10**6), ("--eval-limit", -1), ("--dropout", 1), ("--tau", 0),
    ("--lr", 0), ("--lr", "nan"), ("--lr", 1e308), ("--tau", "nan"), ("--max-steps", 0),
    ("--max-seq-len", 10**18), ("--weights", 1e308), ("--seed", 10**400), ("--adapters", "some"),
    ("--bits", 7), ("--epochs", "9" * 5000)])
def test_numbers_that_make_no_sense(fails, sqa, tmp_path, flag, value):
    fails(train, *flags(sqa, tmp_path / "out", flag, value), says=[f"argument {flag}"])


def test_a_device_that_is_not_there(fails, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "out", "--device", "cuda:77"), says=["--device cuda:77"])
    fails(generate, *ask("--device", "toaster"), says=["--device toaster"])


def test_a_device_that_computes_nothing(fails):
    fails(generate, *ask("--device", "meta"), says=["--device meta", "not available"])


def test_compile_without_a_compiler(sqa, tmp_path, fails, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    says = ["--compile", "no-such-compiler"]
    fails(generate, *ask("--compile"), says=says)
    fails(train, *flags(sqa, tmp_path / "out", "--compile"), says=says)


def test_a_context_that_no_model_has(fails):
    fails(generate, *ask("--max-seq-len", 10**11), says=["--max-seq-len", "at most 1,000,000"])


@pytest.mark.parametrize("variables, says", [
    ({"RANK": "x", "WORLD_SIZE": "1"}, "the variable RANK is 'x'"),
    ({"RANK": "0", "WORLD_SIZE": "1e9"}, "the variable WORLD_SIZE is '1e9'"),
    ({"RANK": "0"}, "the ranks do not find each other"),
    ({"RANK": "0", "WORLD_SIZE": "1"}, "the ranks do not find each other")])
def test_variables_that_torchrun_does_not_set(call, sqa, tmp_path, monkeypatch, variables, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, stderr = call(train, *flags(sqa, tmp_path / "out"))
    assert code == 2
    assert len(stderr.splitlines()) == 1
    assert says in stderr
