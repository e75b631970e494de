"""--tensorboard: the numbers of metrics.jsonl as TensorBoard's scalars, in OUT/tensorboard.

    pip install tensorboard
    tensorboard --logdir OUT/tensorboard

The package is needed for this alone, so it is imported only where it is used.
"""

from pathlib import Path

from files import LavinError


def check_installed() -> None:
    """LavinError if the package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise LavinError("--tensorboard: the package tensorboard is missing; "
                         "pip install tensorboard") from error


def open_board(out: str, first_step: int | None = None):
    """-> a SummaryWriter for OUT/tensorboard, which appends a file to those that are there.

    first_step: where a run begins or goes on. What an earlier one wrote about later steps is then
    no longer shown.
    """
    from torch.utils.tensorboard import SummaryWriter
    purge_step = None if first_step is None else first_step + 1
    return SummaryWriter(Path(out, "tensorboard"), purge_step=purge_step)


def add_line(board, line: dict) -> None:
    """Write the numbers of a line of metrics.jsonl to a SummaryWriter."""
    for tag, number in scalars(line).items():
        board.add_scalar(tag, number, line["step"])


def scalars(line: dict) -> dict[str, float]:
    """{TensorBoard's name of it: number} of a line of metrics.jsonl. What is None is left out.

    A step's are "loss", "lr", … Of what was held out they are "held_out/sqa", for every source, and
    of a split's scores "val/AVG", for every column.
    """
    prefix = ""
    if "split" in line:
        prefix = line["split"] + "/"
    found = {}
    for name, value in line.items():
        if isinstance(value, dict):
            for source, number in value.items():
                found[f"{name}/{source}"] = number
        elif name not in ("step", "split") and value is not None:
            found[prefix + name] = value
    return found
