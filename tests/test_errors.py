"""Bad flags and bad input: one line on stderr that says what, where and what to do.

The exit code is 2. There is no traceback, and nothing half-written is left. Damaged weights are in
test_checkpoints.py, ScienceQA's files in test_scienceqa.py.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import checkpoints
import data
import generate
import train
from adapters import AdapterConfig
from conftest import ADAPTER, LLAMA, ROOT, VIT
from files import tokenizer_path
from model import LLaMA
from test_train import flags


MODEL = ("--adapter", ADAPTER, "--llama", LLAMA, "--vit", VIT, "--max-new-tokens", 2)


def ask(*more, prompt="Name a metal.", adapter=ADAPTER, llama=LLAMA, vit=VIT):
    """The flags of generate.py for a question."""
    return [
        "--prompt", prompt, "--adapter", adapter, "--llama", llama, "--vit", vit,
        "--max-new-tokens", 2, *more]


def edit(path, change):
    """change(content) of a JSON file, in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Paths


def test_everything_that_is_missing_is_listed_at_once(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # With nothing there at all, the embedded default would be taken.
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
    """As a person calls it, not in this process."""
    command = [sys.executable, ROOT / "train.py", "--data", "sqa", "--llama", "nowhere"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere/params.json" in result.stderr


def test_paths_that_cannot_be_written(fails, sqa, tmp_path):
    file = tmp_path / "file"
    file.write_text("untouched")
    fails(train, *flags(sqa, file / "out"), says=["file/out", "--out"])
    fails(train, *flags(sqa, file), says=["file", "--out"])
    answers = ("--data", "sqa", "--data-root", sqa, *MODEL)
    fails(generate, *answers, "--predictions", file / "p.json", says=["file"])
    fails(generate, *answers, "--predictions", tmp_path, says=["--predictions", "directory"])
    assert file.read_text() == "untouched"


# Text


def test_text_that_is_not_unicode(fails, sqa, tmp_path):
    typed = b"caf\xe9".decode(errors="surrogateescape")         # as Python reads a terminal
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
    ("--workers", -1), ("--eval-limit", -1), ("--dropout", 1), ("--tau", 0), ("--lr", 0),
    ("--lr", "nan"), ("--tau", "nan"), ("--max-steps", 0)])
def test_numbers_that_make_no_sense(call, sqa, tmp_path, flag, value):
    code, _, stderr = call(train, *flags(sqa, tmp_path / "out", flag, value))
    assert code == 2
    assert flag in stderr
    assert "Traceback" not in stderr


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


def test_memory_that_no_machine_has(fails):
    fails(generate, *ask("--max-seq-len", 10**11), says=["too little memory", "--max-seq-len"])


# Resuming


@pytest.fixture
def finished_run(call, sqa, tmp_path):
    """The folder of a run of one step."""
    out = tmp_path / "run"
    assert call(train, *flags(sqa, out, "--max-steps", 1))[0] == 0
    return out


def test_nothing_to_resume(fails, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "none", "--resume"), says=[
        "--resume", "none/checkpoint.pth"])


def test_a_resumed_run_cannot_become_another(fails, sqa, finished_run):
    before = (finished_run / "checkpoint.pth").read_bytes()
    for flag, value in [
        ("--batch-size", 4), ("--epochs", 5), ("--lr", 0.5), ("--format", "QCM-A"),
        ("--max-seq-len", 99), ("--tau", 5), ("--dtype", "bf16"),
    ]:
        name = flag.removeprefix("--").replace("-", "_")
        fails(train, "--resume", "--out", finished_run, flag, value, says=[
            "--resume", name, str(value)])
    edit(sqa / "pid_splits.json", lambda splits: splits["train"].pop())
    fails(train, "--resume", "--out", finished_run, says=[
        "--resume", "was trained on 24 samples, not 23"])
    assert (finished_run / "checkpoint.pth").read_bytes() == before


def write_narrow_llama(directory):
    """A LLaMA of half LLAMA's width, cut out of it."""
    directory.mkdir()
    params = json.loads((LLAMA / "params.json").read_text()) | {"dim": 32}
    (directory / "params.json").write_text(json.dumps(params))
    whole = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
    with torch.device("meta"):
        narrow = LLaMA(checkpoints.read_params(directory, 512), AdapterConfig())
    tensors = {}
    for name, p in narrow.named_parameters():
        if name in whole:
            corner = tuple(slice(size) for size in p.shape)
            tensors[name] = whole[name][corner].clone()
    torch.save(tensors, directory / "consolidated.00.pth")
    shutil.copy(tokenizer_path(LLAMA), directory)


def test_a_run_does_not_resume_on_another_llama(fails, tmp_path, finished_run):
    write_narrow_llama(tmp_path / "other")
    fails(train, "--resume", "--out", finished_run, "--llama", tmp_path / "other", says=[
        "checkpoint.pth", "do not belong together"])


def test_what_train_did_not_write_is_not_resumed(fails, finished_run):
    path = finished_run / "checkpoint.pth"
    checkpoint = torch.load(path, weights_only=False)
    for change, says in [
        ({"optimizer": {}}, "no optimizer of this model"),
        ({"config": [1]}, "was not written by train.py"),
        ({"step": "x"}, "was not written by train.py"),
    ]:
        torch.save(checkpoint | change, path)
        fails(train, "--resume", "--out", finished_run, says=["checkpoint.pth", says])
    shutil.copy(ADAPTER, path)
    fails(train, "--resume", "--out", finished_run, says=["was not written by train.py"])
