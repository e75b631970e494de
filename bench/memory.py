"""How much GPU memory training and decoding take, computed on a machine without a GPU.

    python -m bench.memory                              7B and 13B, as Markdown tables
    python -m bench.memory --shape 7B --bits 4          one model only
    python -m bench.memory check                        compare with a run on this CPU

Every sample has a picture and fills the context of 512 tokens. extras/estimate.py explains how
memory is computed. For decoding, it is the memory of the step that writes the last position of a
full cache. Reading many long prompts takes more. `check` trains a middle-sized model for two steps,
and compares the resident memory of its process with the computed memory of the same steps. `check`
needs Linux.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import train
from extras import estimate
from extras.estimate import BLOCK, CORNERS, MODEL_SHAPES, UNSEEN, LiveBytes, Shape
from extras.terminal import Parser, run
from fast.engine import Engine
from fast.fold import fold
from fast.ranks import gradient_buffer
from files import DTYPES, LavinError
from model import LLaMAConfig
from vit import ViTConfig

ROOT = Path(__file__).absolute().parent.parent
CONTEXT = 512           # tokens, including the modality token
N_PROMPT = 200          # tokens of a sample's prompt; the others carry loss
COMPUTED = (1, 4, 8)                # micro-batches
# From 4 samples on, each further sample takes the same memory: the loss already has as many rows of
# logits as it makes at a time. So these two lie on the line through the last two of COMPUTED.
ON_THE_LINE = (16, 32)
ROWS = (1, 32)          # rows of the cache, in decoding
# What `check` runs: (shape, dtype, micro-batch, checkpointing).
CHECKED = (
    ("mid", "fp32", 4, False),
    ("mid", "fp32", 4, True),
    ("mid", "fp32", 8, False),
)


def full_batch(shape: Shape, n: int) -> data.Batch:
    """n samples with pictures. Each of them fills the context."""
    tokens = np.full(CONTEXT - 1, 7, dtype=np.int32)
    labels = tokens.copy()
    labels[:N_PROMPT] = data.IGNORED
    is_feature = np.zeros(len(tokens), dtype=bool)
    is_feature[4:4 + shape.vit.n_features] = True
    white = torch.zeros(3, shape.vit.resolution, shape.vit.resolution)
    samples = [data.Encoded(tokens, labels, is_feature, white, str(i)) for i in range(n)]
    return data.collate(samples, shape.vit.resolution)


# The tables


def training_rows(name: str, bits: int) -> list[str]:
    """A model's two rows of the table, without checkpointing and with it."""
    shape = MODEL_SHAPES[name]
    settings = train.Settings(dtype="bf16", bits=bits)
    batches = [full_batch(shape, n) for n in COMPUTED]
    memory = estimate.training_memory(shape, settings, batches)
    rows = []
    for checkpointing in (False, True):
        needed = []
        for i in range(len(COMPUTED)):
            needed.append(memory[checkpointing, i].needed)
        slope = (needed[-1] - needed[-2]) / (COMPUTED[-1] - COMPUTED[-2])
        for n in ON_THE_LINE:
            needed.append(needed[len(COMPUTED) - 1] + (n - COMPUTED[-1]) * slope)
        flag = "`--checkpointing`" if checkpointing else ""
        cells = " | ".join(f"{size / 1e9:.1f}" for size in needed)
        weights = memory[checkpointing, 0].weights / 1e9
        rows.append(f"| {name} | {bits} | {flag} | {weights:.1f} | {cells} |")
    return rows


@torch.no_grad()
def decode(shape: Shape, bits: int, n_rows: int, live: LiveBytes) -> None:
    """Fold a model, and decode the last token that fits into a cache of n_rows.

    The peak counted is the step's. The unfolded wq, wk and wv stay in memory, as in generate.py.
    """
    lavin = shape.on_meta()
    estimate.give_memory(lavin, torch.bfloat16, bits)
    engine = Engine(fold(lavin.eval(), 1), n_rows, CONTEXT)
    live.restart()
    engine.lengths = [CONTEXT - 1] * n_rows
    engine.step([7] * n_rows)


def decoding_row(name: str, bits: int) -> str:
    """A model's row of the table."""
    shape = MODEL_SHAPES[name]
    line = f"| {name} | {bits} |"
    for n_rows in ROWS:
        peaks = []
        for n_llama, n_vit in CORNERS:
            live = LiveBytes(shape.llama.vocab_size, BLOCK)
            with FakeTensorMode(allow_non_fake_inputs=True), live:
                decode(shape.with_layers(n_llama, n_vit), bits, n_rows, live)
            peaks.append(live.peak)
        needed = shape.extrapolate(peaks) + UNSEEN
        line += f" {needed / 1e9:.1f} |"
    return line


def print_tables(shapes: list[str], all_bits: list[int]) -> None:
    print(f"Computed with torch {torch.__version__}, in GB.\n")
    sizes = " | ".join(str(n) for n in COMPUTED + ON_THE_LINE)
    print(f"| training | bits | | weights | micro-batch {sizes} |")
    print("|---" * (4 + len(COMPUTED + ON_THE_LINE)) + "|")
    for name in shapes:
        for bits in all_bits:
            for row in training_rows(name, bits):
                print(row, flush=True)
    rows = " | ".join(f"{n} at a time" for n in ROWS)
    print(f"\n| decoding | bits | {rows} |")
    print("|---" * (2 + len(ROWS)) + "|")
    for name in shapes:
        for bits in all_bits:
            print(decoding_row(name, bits), flush=True)


# Comparison with a run on this machine


def process_memory(name: str) -> int:
    """Resident bytes of this process: "VmRSS" is the number now, "VmHWM" the peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def computed_peak(shape: Shape, settings, batch: data.Batch) -> float:
    """The computed peak on a CPU, where no allocator rounds sizes up and CUDA takes nothing."""
    live = LiveBytes(shape.llama.vocab_size)
    lavin = shape.on_meta()
    ways = (settings.checkpointing,)
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        memory = estimate.steps_memory(lavin, settings, [batch], live, ways)
    return memory[settings.checkpointing, 0].peak


def two_steps(shape: Shape, settings, batch: data.Batch) -> None:
    """Make a model with some weights, and train it."""
    lavin = shape.on_meta()
    estimate.give_memory(lavin, DTYPES[settings.dtype], settings.bits)
    with torch.no_grad():
        for tensor in lavin.parameters():
            tensor.fill_(1e-3)              # memory counts as resident once it is written to
    lavin.llama.checkpointing = settings.checkpointing
    lavin.vit.checkpointing = settings.checkpointing
    optimizer = train.make_optimizer(lavin, settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients = gradient_buffer(lavin)
    for _ in range(2):                      # the first step makes AdamW's moments
        train.train_step(lavin, optimizer, scaler, gradients, [batch])


def check_one(number: int) -> None:
    """Print the computed and the measured peak of CHECKED[number], in this process."""
    name, dtype, micro_batch, checkpointing = CHECKED[number]
    settings = train.Settings(dtype=dtype, checkpointing=checkpointing)
    shape = MODEL_SHAPES[name]
    batch = full_batch(shape, micro_batch)
    computed = computed_peak(shape, settings, batch)
    # A small step first: in it, the libraries load what a step needs.
    small = Shape(LLaMAConfig(dim=128, n_layers=1, n_heads=2), ViTConfig(width=64, layers=4))
    two_steps(small, settings, full_batch(small, 1))
    before = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")           # reset VmHWM
    two_steps(shape, settings, batch)
    measured = process_memory("VmHWM") - before
    flag = ", checkpointing" if checkpointing else ""
    print(f"{name} {dtype}, micro-batch {micro_batch}{flag}: computed {computed / 1e9:.3f} GB, "
          f"resident {measured / 1e9:.3f} GB, {100 * (computed / measured - 1):+.1f} %", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["tables", "check"], default="tables")
    parser.add_argument("--shape", choices=MODEL_SHAPES, help="default: 7B and 13B")
    parser.add_argument("--bits", type=int, choices=[16, 8, 4], help="default: all three")
    parser.add_argument("--row", type=int, choices=range(len(CHECKED)),
                        help="check this row alone, in this process (default: a process for each)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.what == "tables":
        shapes = [args.shape] if args.shape else ["7B", "13B"]
        print_tables(shapes, [args.bits] if args.bits else [16, 8, 4])
    elif args.row is not None:
        check_one(args.row)
    else:
        # With this, glibc returns a tensor of more than 64 KB to the system once it is freed.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
        for number in range(len(CHECKED)):          # each in a process of its own
            command = [sys.executable, "-m", "bench.memory", "check", "--row", str(number)]
            if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
                raise LavinError(f"row {number} failed; its message is above")


if __name__ == "__main__":
    run(main)
