"""Devices other than the CPU, as far as they can be tested on a machine without them.

Apple's GPUs (MPS) have no float64, so no float64 tensor may be sent to one or made there.
`NoFloat64` watches every operation of PyTorch and fails if one takes or returns such a tensor.
These tests run on a CPU. There, `NoFloat64` cannot tell a tensor on the model's device from one
that would always stay on the CPU, so it forbids both. It cannot see what PyTorch does within an
operation, or whether MPS has that operation. Nothing here has run on MPS.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoints
import generate
import train
from conftest import ADAPTER, LLAMA, VIT, flags
from extras import terminal
from fast import engine, ranks
from files import LavinError, pick_device


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                assert value.dtype != torch.float64, f"{operation} has a tensor in float64"
        return result


@pytest.mark.parametrize("make", [
    lambda: torch.tensor([1.0, 2.0], dtype=torch.float64),
    lambda: torch.zeros(3, dtype=torch.float64),
    lambda: torch.ones(3).double(),
    lambda: torch.ones(3).sum(dtype=torch.float64).float(),
    lambda: torch.ones(3) + torch.full((3,), 1.0, dtype=torch.float64)])
def test_the_check_sees_a_float64(make):
    with pytest.raises(AssertionError, match="float64"), NoFloat64():
        make()


def test_a_training_run_makes_no_float64(call, sqa, tmp_path):
    """Loading, two epochs with held-out rows, a checkpoint and scores, and a resumed step."""
    more = ("--epochs", 2, "--val-fraction", 0.2, "--eval-limit", 4, "--clip", 1)
    with NoFloat64():
        code, _, stderr = call(train, *flags(sqa, tmp_path / "out", *more, "--max-steps", 5))
        assert (code, stderr) == (0, "")
        code, _, stderr = call(train, "--resume", "--out", tmp_path / "out")
        assert (code, stderr) == (0, "")


def test_answering_makes_no_float64(call, samples, tmp_path):
    """The plain generate, the engine with a folded and an unfolded model, and the command line."""
    with NoFloat64():
        lavin = checkpoints.load(LLAMA, VIT, ADAPTER)
        lavin.generate(samples[:1], 3)
        engine.generate(lavin, samples, 3)
        engine.generate(lavin, samples, 3, temperature=1, top_p=0.9)
        code, _, stderr = call(generate, "--prompt", "Name a metal.", "--llama", LLAMA,
                               "--vit", VIT, "--adapter", ADAPTER, "--max-new-tokens", 3)
        assert (code, stderr) == (0, "")


def test_sums_over_ranks_make_no_float64(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", sent.append)
    with NoFloat64():
        assert ranks.all_reduce_numbers([0.5, 3, True], torch.device("cpu")) == [0.5, 3.0, 1.0]
    assert len(sent) == 1


# Which device a run takes


def test_auto_takes_cuda_before_mps_before_the_cpu(monkeypatch):
    """The device that `auto` takes cannot be used here, so the error names it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto", "auto") == (torch.device("cpu"), "fp32")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(LavinError, match="--device mps: not available here"):
        pick_device("auto", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(LavinError, match="--device cuda:0: not available here"):
        pick_device("auto", "auto")


def refuse(*args, **how):
    raise RuntimeError("there is no such device")


def test_mps_computes_in_fp32_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *args, **how: None)
    assert pick_device("mps", "auto") == (torch.device("mps"), "fp32")
    assert pick_device("mps", "fp16") == (torch.device("mps"), "fp16")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
def test_mps_where_there_is_none(fails, sqa, tmp_path):
    says = ["--device mps: not available here"]
    fails(train, *flags(sqa, tmp_path / "out", "--device", "mps"), says=says)
    fails(generate, "--prompt", "x", "--llama", LLAMA, "--vit", VIT, "--adapter", "none",
          "--device", "mps", says=says)


def test_several_processes_do_not_share_an_apple_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LavinError, match="--device mps: several processes"):
        ranks.join(torch.device("mps"))


def test_too_little_memory_on_mps_is_one_line():
    error = RuntimeError("MPS backend out of memory (MPS allocated: 18.13 GB)")
    assert "too little memory" in terminal.explain(error)
