"""What the tests share: the golden model and its numbers, a miniature data set, and the scripts called in-process."""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # the models are tiny, and two threads that wait for each other cost minutes on a busy machine

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data  # noqa: E402
import files  # noqa: E402
import miniature  # noqa: E402
from model import LaVIN  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
LLAMA, VIT, ADAPTER = GOLDEN / "llama" / "tiny", GOLDEN / "ViT-tiny.pt", GOLDEN / "checkpoint-19.pth"


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.*` is deprecated")       # OpenAI's archive is TorchScript
    config.addinivalue_line("markers", "browser: needs chromium and playwright")


@pytest.fixture(scope="session")
def expected():
    """The reference's own numbers (see README, "Tests")."""
    return np.load(GOLDEN / "expected.npz")


@pytest.fixture
def lavin():
    return LaVIN.load(LLAMA, VIT, ADAPTER)


@pytest.fixture(scope="session")
def samples():
    rows = json.loads((GOLDEN / "samples.json").read_text())
    return [data.Sample(r["prompt"], r["answer"], r["image"] and GOLDEN / r["image"]) for r in rows]


@pytest.fixture
def sqa(tmp_path):
    """The miniature data set, to be damaged at will."""
    miniature.write(tmp_path / "sqa")
    return tmp_path / "sqa"


@pytest.fixture
def call(monkeypatch, capsys):
    """call(train or generate, "--flag", value, …) -> (exit code, stdout, stderr), in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, args)])
        code = 0
        try:
            files.run(script.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def difference(ours, theirs):
    """The largest absolute difference."""
    return (torch.as_tensor(ours) - torch.as_tensor(theirs)).detach().abs().max().item()
