"""--tensorboard: the numbers of metrics.jsonl as TensorBoard's scalars, in OUT/tensorboard.

    pip install tensorboard
    tensorboard --logdir OUT/tensorboard

Nothing else needs this package, so it is imported only where it is used.
"""

from pathlib import Path

from files import LavinError


def check_installed() -> None:
    """Raises LavinError if the package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise LavinError("--tensorboard: the package tensorboard is missing; "
                         "pip install tensorboard") from error


def open_board(out: str, first_step: int | None = None):
    """Return a SummaryWriter for OUT/tensorboard. It adds a new file and keeps the existing ones.

    first_step: the number of steps done before this run starts or resumes. TensorBoard then hides
    what an earlier run wrote for later steps.
    """
    from torch.utils.tensorboard import SummaryWriter
    purge_step = None if first_step is None else first_step + 1
    return SummaryWriter(Path(out, "tensorboard"), purge_step=purge_step)


def add_line(board, line: dict) -> None:
    """Write the numbers in one line of metrics.jsonl to a SummaryWriter."""
    for tag, number in scalars(line).items():
        board.add_scalar(tag, number, line["step"])


def scalars(line: dict) -> dict[str, float]:
    """One line of metrics.jsonl -> {TensorBoard's tag: number}, without the values that are None.

    The tags of a training step are "loss", "lr", … Held-out data has a tag for each source, such as
    "held_out/sqa". The scores of a split have a tag for each column, such as "val/AVG".
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
