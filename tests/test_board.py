"""--tensorboard: TensorBoard reads the same numbers that are in metrics.jsonl."""

import math
import sys

import pytest

import checkpoints
import train
from conftest import flags
from extras import board
from helpers import read_metrics


def test_without_the_package_a_run_ends_before_the_model_is_loaded(
        fails, sqa, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(checkpoints, "load", load)
    monkeypatch.setitem(sys.modules, "tensorboard", None)       # as if it were not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    fails(train, *flags(sqa, tmp_path / "out", "--tensorboard"), says=["pip install tensorboard"])
    assert not (tmp_path / "out").exists()


def test_the_names_of_the_scalars():
    step = {"step": 3, "epoch": 0.5, "loss": 1.5, "grad_norm": None}
    assert board.scalars(step) == {"epoch": 0.5, "loss": 1.5}
    held_out = {"step": 3, "held_out": {"sqa": 1.25}, "exact_match": {}}
    assert board.scalars(held_out) == {"held_out/sqa": 1.25}
    scores = {"step": 3, "split": "val", "NAT": None, "AVG": 50.0}
    assert board.scalars(scores) == {"val/AVG": 50.0}


def read_board(out):
    """The numbers that TensorBoard shows: {(name, step): number}."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for scalar in events.Scalars(name):
            assert (name, scalar.step) not in found
            found[name, scalar.step] = scalar.value
    return found


def assert_equal_numbers(out):
    expected = {}
    for line in read_metrics(out):
        for name, number in board.scalars(line).items():
            expected[name, line["step"]] = number
    found = read_board(out)
    assert found.keys() == expected.keys()
    for key, number in expected.items():
        assert math.isclose(found[key], number, rel_tol=1e-6), key      # TensorBoard stores fp32


def test_the_scalars_are_those_of_metrics(call, sqa, tmp_path):
    """This holds for a run that resumes within an epoch, and for a new run in the same folder."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    more = ("--tensorboard", "--val-fraction", 0.2, "--epochs", 2)
    assert call(train, *flags(sqa, out, *more, "--max-steps", 4))[0] == 0
    assert_equal_numbers(out)
    # Step 4 did not end an epoch, but was scored as the last step. --resume continues after it.
    code, _, stderr = call(train, "--resume", "--out", out, "--max-steps", 6, "--eval-limit", 4)
    assert (code, stderr) == (0, "")
    assert_equal_numbers(out)
    found = read_board(out)
    assert ("loss", 6) in found and ("held_out/sqa", 6) in found and ("val/AVG", 6) in found

    assert call(train, *flags(sqa, out, *more, "--max-steps", 2))[0] == 0
    assert_equal_numbers(out)
