"""Several processes, one run: the same losses and the same adapters as one process alone.

    python tests/test_ranks.py '[2, FLAGS, FLAGS]' '[4, FLAGS]'

As a script this file is a torchrun that imports PyTorch only once. Each argument is JSON: a number
of ranks, and the flags of one or more runs of train.py, which these ranks do one after the other.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from conftest import LLAMA, ROOT, VIT, difference    # before our modules: it says where they are

import train
from extras import terminal
from fast import ranks


def flags(sqa, out, *more):
    """Six steps of ten samples, three in a micro-batch.

    So ranks get different numbers of answer tokens, of pictures and, at the end of an epoch, of
    micro-batches.
    """
    flags = [
        "--data", "sqa", "--data-root", sqa, "--llama", LLAMA, "--vit", VIT, "--out", out,
        "--batch-size", 10, "--micro-batch", 3, "--epochs", 2, "--lr", 1e-3, "--dropout", 0,
        "--max-seq-len", 160, "--workers", 0, "--eval-limit", 0, "--device", "cpu", *more]
    return [str(flag) for flag in flags]


def start(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def read_run(out):
    """-> (its losses, its trained weights)."""
    losses = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        losses.append(json.loads(line)["loss"])
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=False)
    return losses, checkpoint["model"]


def assert_equal_runs(out, other_out):
    losses, weights = read_run(out)
    other_losses, other_weights = read_run(other_out)
    assert len(losses) == len(other_losses) == 6
    assert difference(losses, other_losses) < 1e-5
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert difference(weight, other_weights[name]) < 1e-5, name


def test_two_and_four_ranks_do_what_one_does(sqa, tmp_path, call):
    """With and without --fsdp, and a run that changes its number of ranks from 2 to 4 to 1."""
    alone = tmp_path / "alone"
    two = tmp_path / "two"
    two_fsdp = tmp_path / "two-fsdp"
    four = tmp_path / "four"
    four_fsdp = tmp_path / "four-fsdp"
    changed = tmp_path / "changed"
    assert call(train, *flags(sqa, alone))[0] == 0

    on_two = [
        2,
        flags(sqa, two),
        flags(sqa, two_fsdp, "--fsdp"),
        flags(sqa, changed, "--max-steps", 2)]
    on_four = [
        4,
        flags(sqa, four),
        flags(sqa, four_fsdp, "--fsdp", "--checkpointing"),
        flags(sqa, changed, "--resume", "--max-steps", 4, "--fsdp")]
    result = start(__file__, json.dumps(on_two), json.dumps(on_four))
    assert result.returncode == 0, result.stderr
    for count in (2, 4):                        # once for each run: rank 0 alone prints
        line = f"batch    10 in micro-batches of 3 · context 160 tokens · {count} ranks"
        assert result.stdout.count(line) == 3
    assert call(train, *flags(sqa, changed, "--resume"))[0] == 0

    for out in (two, two_fsdp, four, four_fsdp, changed):
        assert_equal_runs(alone, out)


def test_a_rank_that_dies_ends_the_run_with_its_own_error(sqa, tmp_path):
    """One of the ranks comes to a broken picture while the other waits for its gradients."""
    picture = next((sqa / "images" / "train").glob("*/image.png"))
    picture.write_bytes(b"no picture")
    out = tmp_path / "out"
    began = time.perf_counter()
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    result = start(*torchrun, "train.py", *flags(sqa, out))
    assert result.returncode != 0
    assert time.perf_counter() - began < 60
    assert str(picture) in result.stderr
    assert not (out / "checkpoint.pth").exists()


@pytest.mark.parametrize("more", [["--fsdp"], ["--fsdp", "--bits", 8]])
def test_fsdp_alone_or_with_quantized_matrices_is_refused(sqa, tmp_path, call, more):
    code, _, stderr = call(train, *flags(sqa, tmp_path / "out", *more))
    assert code == 2
    assert "torchrun" in stderr
    assert not (tmp_path / "out").exists()


# What the script does


def check_sharded(block):
    """--fsdp cuts the frozen matrices, and must leave all else whole."""
    sharded = set()
    frozen_matrices = set()
    for name, p in block.named_parameters():
        if hasattr(p, "to_local"):
            sharded.add(name)
        if not p.requires_grad and p.dim() > 1:
            frozen_matrices.add(name)
    assert sharded == frozen_matrices, sharded


def run_rank(rank, count, meeting, runs):
    """What torchrun and train.py do, in this process; the ranks meet once for all runs."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    leave = torch.distributed.destroy_process_group
    shard = ranks.shard

    def do_nothing(*args):
        pass

    def checked_shard(block, device):
        shard(block, device)
        check_sharded(block)

    torch.distributed.init_process_group = do_nothing
    torch.distributed.destroy_process_group = do_nothing
    ranks.shard = checked_shard
    for argv in runs:
        sys.argv = ["train.py", *argv]
        terminal.run(train.main)
    leave()                         # gloo's threads abort a process that ends without it


def run_ranks(count, runs):
    """-> whether all of the ranks ended well."""
    context = torch.multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(count):
            args = (rank, count, f"{folder}/meeting", runs)
            process = context.Process(target=run_rank, args=args)
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
    return all(process.exitcode == 0 for process in processes)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        count, *runs = json.loads(argument)
        if not run_ranks(count, runs):
            sys.exit(1)
