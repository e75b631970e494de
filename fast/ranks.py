"""One run on several GPUs: `torchrun --nproc-per-node 8 train.py --data sqa`, or generate.py.

Every rank holds a copy of all trained parameters, and takes its share of a global batch's
micro-batches. Each step sums one buffer over the ranks, the gradients: 15 MB for 7B, whatever the
batch size. DDP would do the same, but once per micro-batch instead of once per step.
With --fsdp, each rank holds a part of every frozen matrix of LLaMA's blocks. A block's matrices are
gathered when it is computed. In evaluation, every rank answers its share of the problems and then
gets the answers of all ranks. Without torchrun there is one rank, and nothing is exchanged.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

from files import LavinError


def rank() -> int:
    return read_variable("RANK", 0)


def count() -> int:
    return read_variable("WORLD_SIZE", 1)


def own_seed(seed: int) -> int:
    """A seed for this rank's own random numbers. Rank 0 gets `seed` itself."""
    return seed + 7919 * rank()


def read_variable(name: str, default: int) -> int:
    """A variable that torchrun sets. Raises LavinError for a value that torchrun would not set."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 6:
        raise LavinError(f"the variable {name} is {text!r}, not a whole number below a "
                         "million; start with torchrun, which sets it, or unset it")
    return int(text)


def join(device: torch.device, for_answers: bool = False) -> None:
    """Connect to the other ranks. From then on, only rank 0 prints.

    for_answers: the ranks will exchange only answers, over CPUs (gloo). Each waits for the slowest,
    up to a week.
    """
    if "RANK" not in os.environ:
        return
    if rank() >= count():
        raise LavinError(f"RANK is {rank()}, but there are {count()} ranks, counted from 0; "
                         "let torchrun set RANK and WORLD_SIZE")
    if device.type not in ("cpu", "cuda"):
        raise LavinError(f"--device {device}: several processes can share a run only on CPUs or "
                         "NVIDIA GPUs; use --device cpu, or start without torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" and not for_answers else "gloo"
    timeout = timedelta(days=7) if for_answers else None        # None: PyTorch's default
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LavinError(f"the ranks do not find each other ({reason}); start them with torchrun, "
                         "or unset RANK") from error
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """`with rank_0_first():` runs the body on rank 0 before all other ranks.

    Raises LavinError on the others if rank 0 ends in the body.
    """
    if rank() > 0:
        with explain_errors():
            dist.barrier()
    yield
    if rank() == 0 and dist.is_initialized():
        with explain_errors():
            dist.barrier()


def leave() -> None:
    """Disconnect from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
    """`with explain_errors():` wraps an exchange. Raises LavinError if another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LavinError(f"another rank has ended; its own message says why ({reason})"
                         ) from error


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place. Raises LavinError if one of them has ended."""
    if dist.is_initialized():
        with explain_errors():
            dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Copy rank 0's numbers to all ranks, in place. Raises LavinError if one of them has ended."""
    if dist.is_initialized():
        with explain_errors():
            dist.broadcast(tensor, src=0)
    return tensor


def all_gather(value: object) -> list:
    """[rank 0's value, rank 1's, …], on all ranks. Raises LavinError if one of them has ended."""
    if not dist.is_initialized():
        return [value]
    values = [None] * count()
    with explain_errors():
        dist.all_gather_object(values, value)
    return values


def share(things: list) -> list:
    """This rank's share of a list that all ranks have, dealt like cards."""
    if not dist.is_initialized():
        return things
    return things[rank()::count()]


def all_reduce_numbers(values: list[float], device: torch.device) -> list[float]:
    """Each of these numbers, summed over all ranks.

    Several ranks exchange them in fp32, which is exact for whole numbers up to 2^24. float64 would
    be more exact, but not every device has it (Apple's GPUs do not).
    """
    if not dist.is_initialized():
        return values
    return all_reduce(torch.tensor(values, dtype=torch.float32, device=device)).tolist()


def gradient_buffer(lavin: nn.Module) -> torch.Tensor:
    """One flat fp32 tensor that holds all gradients: every p.grad becomes a view of its part.

    It can be zeroed, measured and summed over ranks in one call instead of one per parameter.
    """
    trained = [p for p in lavin.parameters() if p.requires_grad]
    sizes = [p.numel() for p in trained]
    buffer = torch.zeros(sum(sizes), device=lavin.device)
    for p, part in zip(trained, buffer.split(sizes)):
        p.grad = part.view_as(p)
    return buffer


def shard(block: nn.Module, device: torch.device) -> None:
    """Shard a block's frozen matrices over the ranks. Trained parameters stay whole."""
    from torch.distributed.device_mesh import init_device_mesh      # takes a second to import
    from torch.distributed.fsdp import fully_shard
    # Norms stay whole too: router.route uses one of them outside the block's forward.
    whole = {p for p in block.parameters() if p.requires_grad or p.dim() == 1}
    mesh = init_device_mesh(device.type, (count(),))
    fully_shard(block, mesh=mesh, ignored_params=whole)
