"""Many GPUs, one run: `torchrun --nproc-per-node 8 train.py --data sqa`; generate.py likewise.

Every rank holds a copy of all that is trained, and takes its share of a global batch's
micro-batches. A step sums one buffer over the ranks, that of the gradients: 15 MB for 7B, whatever
the batch. DDP would do the same, but once a micro-batch instead of once a step.
With --fsdp the frozen matrices are cut into as many parts as there are ranks, and put together
block by block when a block is computed. In evaluation every rank answers its share of the problems,
and all of them get all answers. Without torchrun there is one rank, and nothing here does
anything.
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
    return number("RANK", 0)


def count() -> int:
    return number("WORLD_SIZE", 1)


def own_seed(seed: int) -> int:
    """A seed for what each rank draws by itself. That of rank 0 is `seed`."""
    return seed + 7919 * rank()


def number(name: str, default: int) -> int:
    """A variable that torchrun sets. LavinError for what it would not set it to."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 6:
        raise LavinError(f"the variable {name} is {text!r}; torchrun sets it to a number, "
                         "and without torchrun it must not be set")
    return int(text)


def join(device: torch.device, for_answers: bool = False) -> None:
    """Meet the other ranks. From then on only rank 0 prints.

    for_answers: they will exchange nothing but answers, over CPUs (gloo). For these a rank waits
    as long as another needs.
    """
    if "RANK" not in os.environ:
        return
    if rank() >= count():
        raise LavinError(f"RANK is {rank()} of {count()} ranks; they count from 0, "
                         "and torchrun sets them")
    if device.type not in ("cpu", "cuda"):
        raise LavinError(f"--device {device}: several processes can share a run on CPUs or on "
                         "NVIDIA's GPUs alone; --device cpu, or leave torchrun out")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" and not for_answers else "gloo"
    timeout = timedelta(days=7) if for_answers else None        # None: PyTorch's own
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LavinError(f"the ranks do not find each other ({reason}); start them with torchrun, "
                         "or unset RANK") from error
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def first():
    """`with first():` lets rank 0 do the body before all others do."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """In a `with`, all ranks take part in an exchange. LavinError if one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LavinError(f"another rank has ended; its own message says why ({reason})"
                         ) from error


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place. LavinError if one of them has ended."""
    if dist.is_initialized():
        with together():
            dist.all_reduce(tensor)
    return tensor


def of_first(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's numbers, in place, on all ranks. LavinError if one of them has ended."""
    if dist.is_initialized():
        with together():
            dist.broadcast(tensor, src=0)
    return tensor


def gather(value: object) -> list:
    """[rank 0's value, rank 1's, …], on all ranks. LavinError if one of them has ended."""
    if not dist.is_initialized():
        return [value]
    values = [None] * count()
    with together():
        dist.all_gather_object(values, value)
    return values


def share(things: list) -> list:
    """This rank's share of a list that all ranks have, dealt like cards."""
    if not dist.is_initialized():
        return things
    return things[rank()::count()]


def sums(values: list[float], device: torch.device) -> list[float]:
    """Each of these numbers, summed over all ranks.

    Several ranks send them in fp32, which holds whole numbers up to 2^24: a tensor in float64 would
    be more exact, but not every device has those (Apple's have not).
    """
    if not dist.is_initialized():
        return values
    return total(torch.tensor(values, dtype=torch.float32, device=device)).tolist()


def gradient_buffer(lavin: nn.Module) -> torch.Tensor:
    """One flat fp32 tensor that holds all gradients: every p.grad becomes a view of its part.

    It can be zeroed, measured and summed over ranks in one call instead of one a parameter.
    """
    trained = [p for p in lavin.parameters() if p.requires_grad]
    sizes = [p.numel() for p in trained]
    buffer = torch.zeros(sum(sizes), device=lavin.device)
    for p, part in zip(trained, buffer.split(sizes)):
        p.grad = part.view_as(p)
    return buffer


def shard(block: nn.Module, device: torch.device) -> None:
    """Cut a block's frozen matrices into a part for each rank. What is trained stays whole."""
    from torch.distributed.device_mesh import init_device_mesh      # takes a second to import
    from torch.distributed.fsdp import fully_shard
    # Norms stay whole as well: router.route uses one of them outside of the block's forward.
    whole = {p for p in block.parameters() if p.requires_grad or p.dim() == 1}
    mesh = init_device_mesh(device.type, (count(),))
    fully_shard(block, mesh=mesh, ignored_params=whole)
