"""Fixtures for all tests: the golden model and its numbers, a miniature data set, `call`."""

import copy
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

# The models are tiny, so on a busy machine a second thread costs more time than it saves.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests expect the numbers and the messages of a CPU, so they hide a GPU from PyTorch.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402
import data  # noqa: E402
import miniature  # noqa: E402
import train  # noqa: E402
from extras import terminal  # noqa: E402
from fast.engine import Engine  # noqa: E402
from files import read_checkpoint  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
LLAMA = GOLDEN / "llama" / "tiny"
VIT = GOLDEN / "ViT-tiny.pt"
ADAPTER = GOLDEN / "checkpoint-19.pth"
MME_QUESTIONS = "Is it red? Answer yes or no.\tYes\nIs it blue? Answer yes or no.\tNo\n"


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: needs chromium and playwright")


def difference(a, b) -> float:
    """The largest absolute difference between two tensors of one size, or a tensor and a number.

    `assert difference(a, b) < 1e-5` prints it when it fails. NaN anywhere is a failure too.
    """
    a = torch.as_tensor(a)
    b = torch.as_tensor(b)
    if a.dim() > 0 and b.dim() > 0:     # broadcasting would hide that one of them is too short
        assert a.numel() == b.numel(), f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.numel() == 0:
        assert b.numel() == 0, "an empty tensor equals no number"
        return 0.0
    return (a - b).detach().abs().max().item()


def relative_error(ours, exact) -> float:
    """The norm of the difference, divided by the norm of the exact tensor."""
    return ((ours - exact).norm() / exact.norm()).item()


def wait_until(condition, seconds=30):
    """Wait until condition() is true. The test fails if it is still false after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting after {seconds} seconds"
        time.sleep(0.01)


def wait_for_torch(process):
    """Wait until a new process of Python has begun to import torch. It must not have ended."""
    def has_begun():
        assert process.poll() is None, "it ended before it imported torch"
        return "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text()

    wait_until(has_begun, 60)


def flags(sqa, out, *more):
    """train.py's: a run of 12 steps, 3 an epoch, without scoring, unless `more` says otherwise."""
    return [
        "--data", "sqa", "--data-root", sqa, "--llama", LLAMA, "--vit", VIT, "--out", out,
        "--epochs", 4, "--batch-size", 8, "--max-seq-len", 160, "--workers", 0, "--eval-limit", 0,
        *more]


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def expected():
    """The numbers that the authors' code computes from the golden files (see docs/tests.md)."""
    return np.load(GOLDEN / "expected.npz")


@pytest.fixture(scope="session")
def golden_lavin():
    return checkpoints.load(LLAMA, VIT, ADAPTER)


@pytest.fixture
def lavin(golden_lavin):
    """The golden model, to be changed at will."""
    return copy.deepcopy(golden_lavin)


@pytest.fixture(scope="session")
def samples():
    """The four golden samples. Two of them have a picture."""
    samples = []
    for row in json.loads((GOLDEN / "samples.json").read_text()):
        image = None
        if row["image"]:
            image = GOLDEN / row["image"]
        samples.append(data.Sample(row["prompt"], row["answer"], image))
    return samples


@pytest.fixture
def sqa(tmp_path):
    """The folder of a miniature ScienceQA, which a test may damage."""
    miniature.write(tmp_path / "sqa")
    return tmp_path / "sqa"


@pytest.fixture
def mme(tmp_path):
    """Two subtasks: existence has two pictures with their questions beside them, code_reasoning has
    one with them in a folder of their own."""
    folder = tmp_path / "mme"
    for name in ("existence/a", "existence/b", "code_reasoning/images/c"):
        picture = folder / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(picture)
    (folder / "existence" / "a.txt").write_text(MME_QUESTIONS)
    (folder / "existence" / "b.txt").write_text(MME_QUESTIONS)
    apart = folder / "code_reasoning" / "questions_answers_YN"
    apart.mkdir()
    (apart / "c.txt").write_text(MME_QUESTIONS)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """call(train or generate, "--flag", value, …) -> (exit code, stdout, stderr).

    The script runs in this process.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(script, *args):
        name = script.__name__ + ".py"
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        code = 0
        try:
            terminal.run(script.main)
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def fails(call, tmp_path):
    """fails(script, "--flag", value, …, says=[…]): the script exits with 2 and one line on stderr.

    The line holds every text of `says`. In tmp_path, the script leaves no checkpoint in out/ and no
    temporary file.
    """
    def fails(script, *args, says):
        code, _, stderr = call(script, *args)
        assert code == 2, stderr
        assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1, stderr
        for text in says:
            assert str(text) in stderr, f"{text!r} is not in {stderr!r}"
        assert not list(tmp_path.glob("out/*.pth"))
        assert not list(tmp_path.rglob("*.tmp"))

    return fails


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(call, sqa, tmp_path, runs_folder):
    """trained(steps) -> the folder of a run on sqa, a copy of one that all tests share."""
    def trained(steps):
        original = runs_folder / str(steps)
        if not original.exists():
            assert call(train, *flags(sqa, original, "--max-steps", steps))[0] == 0
        out = tmp_path / f"run-{steps}"
        shutil.copytree(original, out)
        checkpoint = read_checkpoint(out / "checkpoint.pth")
        checkpoint["config"]["data_root"] = str(sqa)
        torch.save(checkpoint, out / "checkpoint.pth")
        return out

    return trained


@pytest.fixture
def held_steps(monkeypatch):
    """An Event. Every step of the engine waits for it, 20 seconds at most."""
    go_on = threading.Event()
    step = Engine.step

    def held_step(engine, ids):
        go_on.wait(20)
        return step(engine, ids)

    monkeypatch.setattr(Engine, "step", held_step)
    return go_on
