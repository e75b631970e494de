"""Several processes, one run: the same losses and the same adapters as one process alone.

As a script it is a torchrun that imports PyTorch once for all: of each argument, a JSON [ranks, flags, flags, …], the ranks
call train.py with the one list of flags after the other.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from conftest import LLAMA, ROOT, VIT, difference

import files
import ranks
import train


def flags(sqa, out, *more):
    """Six steps. Three samples a micro-batch, so that ranks get different numbers of answer tokens, of pictures and, at the
    end of an epoch, of micro-batches."""
    return list(map(str, [
        "--data", "sqa", "--llama", LLAMA, "--vit", VIT, "--data-root", sqa, "--out", out, "--batch-size", 10,
        "--micro-batch", 3, "--workers", 0, "--epochs", 2, "--max-seq-len", 160, "--eval-limit", 0, "--dropout", 0,
        "--lr", 1e-3, "--device", "cpu", *more]))


def start(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def read(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], torch.load(out / "checkpoint.pth", weights_only=False)["model"]


def assert_equal_runs(a, b):
    (losses, weights), (other_losses, other_weights) = read(a), read(b)
    assert len(losses) == len(other_losses) == 6 and difference(torch.tensor(losses), torch.tensor(other_losses)) < 1e-5
    for name, weight in weights.items():
        assert difference(weight, other_weights[name]) < 1e-5, name


def test_two_and_four_ranks_with_and_without_fsdp_and_a_run_that_changes_their_number(sqa, tmp_path, call):
    alone, *others = (tmp_path / name for name in ("alone", "two", "two-fsdp", "four", "four-fsdp", "changed"))
    two, two_fsdp, four, four_fsdp, changed = others
    assert call(train, *flags(sqa, alone))[0] == 0
    result = start(__file__, *map(json.dumps, [
        [2, flags(sqa, two), flags(sqa, two_fsdp, "--fsdp"), flags(sqa, changed, "--max-steps", 2)],
        [4, flags(sqa, four), flags(sqa, four_fsdp, "--fsdp", "--checkpointing"), flags(sqa, changed, "--resume", "--max-steps", 4, "--fsdp")]]))
    assert result.returncode == 0, result.stderr
    for count in (2, 4):                                       # rank 0 alone prints
        assert result.stdout.count(f"batch    10 in micro-batches of 3 · context 160 tokens · {count} ranks") == 3
    assert call(train, *flags(sqa, changed, "--resume"))[0] == 0
    for out in others:
        assert_equal_runs(alone, out)


def test_a_rank_that_dies_ends_the_run_with_its_own_error(sqa, tmp_path):
    """A broken picture, which one of the ranks comes to decode while the other waits for its gradients."""
    picture = next((sqa / "images" / "train").glob("*/image.png"))
    picture.write_bytes(b"no picture")
    began = time.perf_counter()
    result = start("-m", "torch.distributed.run", "--nproc-per-node", 2, "train.py", *flags(sqa, tmp_path / "out"))
    assert result.returncode != 0 and time.perf_counter() - began < 60
    assert str(picture) in result.stderr and not (tmp_path / "out" / "checkpoint.pth").exists()


@pytest.mark.parametrize("more", [["--fsdp"], ["--fsdp", "--bits", 8]])
def test_fsdp_alone_or_with_packed_matrices_is_refused(sqa, tmp_path, call, more):
    code, _, stderr = call(train, *flags(sqa, tmp_path / "out", *more))
    assert code == 2 and "torchrun" in stderr and not (tmp_path / "out").exists()


def sharded_and_whole(block):
    """What fsdp cuts, and what it must leave as it is."""
    cut = {name for name, p in block.named_parameters() if hasattr(p, "to_local")}
    assert cut == {name for name, p in block.named_parameters() if not p.requires_grad and p.dim() > 1}, cut
    return block


def as_rank(rank, count, meeting, runs):
    """What torchrun and train.py do, in this process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)     # once, for all runs
    leave = torch.distributed.destroy_process_group
    torch.distributed.init_process_group = torch.distributed.destroy_process_group = lambda *_: None
    shard = ranks.shard
    ranks.shard = lambda block, device: sharded_and_whole((shard(block, device), block)[1])
    for argv in runs:
        sys.argv = ["train.py", *argv]
        files.run(train.main)
    leave()                                                     # gloo's threads abort a process that ends without it


if __name__ == "__main__":
    for count, *runs in map(json.loads, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            fork = torch.multiprocessing.get_context("fork")
            processes = [fork.Process(target=as_rank, args=(rank, count, f"{folder}/meeting", runs)) for rank in range(count)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)
