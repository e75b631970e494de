"""Many GPUs, one run: `torchrun --nproc-per-node 8 train.py --data sqa`.

Every rank has a copy of all that is trained and its share of a global batch's micro-batches. A step sums one buffer,
the gradients, over the ranks: 15 MB for 7B, whatever the batch. That is all that DDP would do, and once a step instead
of once a micro-batch. With --fsdp the frozen matrices, and only these, are cut into as many parts as there are ranks,
and put together block by block when a block is computed.
Without torchrun there is one rank, and nothing here does anything.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist

from files import LavinError


def rank():
    return int(os.environ.get("RANK", 0))


def count():
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other ranks; from here on rank 0 alone prints."""
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def first():
    """What rank 0 does before the others do."""
    if rank():
        dist.barrier()
    yield
    if not rank() and dist.is_initialized():
        dist.barrier()


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def total(tensor):
    """The sum over all ranks, in place. LavinError if one of them has ended."""
    if dist.is_initialized():
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise LavinError(f"another rank has ended, and says why ({str(error).splitlines()[0]})") from error
    return tensor


def shard(block, device):
    """Cut a block's frozen matrices into parts, one a rank. Whatever is trained stays whole, and what is small."""
    from torch.distributed.device_mesh import init_device_mesh          # a second to import
    from torch.distributed.fsdp import fully_shard
    whole = {p for p in block.parameters() if p.requires_grad or p.dim() == 1}
    fully_shard(block, mesh=init_device_mesh(device.type, (count(),)), ignored_params=whole)
