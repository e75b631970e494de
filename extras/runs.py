"""What a training run needs besides its loop: data, ablations, printed text, log, signals."""

import contextlib
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import data
from adapters import Adapter, AdapterConfig
from checkpoints import load_tokenizer, open_llama, read_clip
from extras import board, instructions, plot
from extras.neighbours import Neighbours
from extras.scienceqa import load_sqa
from fast import ranks
from fast.quantize import n_quantized
from files import (DEFAULT_PATHS, LavinError, locked, remove_temporaries, tokenizer_path,
                   write_atomically)
from router import Router

# Data


@dataclass
class TrainingSet:
    encoded: list[data.Encoded]                     # the samples of all sources, concatenated
    sizes: list[int]                                # the number of samples from each source
    held_out: dict[str, list[data.Encoded]]         # {source: its held-out samples}

    def __post_init__(self):
        self.lengths = [len(e.tokens) for e in self.encoded]

    def hash(self) -> str:
        """A hash of these samples in this order. A picture counts only by its file name.

        Labels without loss are hashed as 0, to match the hashes in older checkpoints.
        """
        key = hashlib.sha256()
        for e in self.encoded:
            key.update(e.tokens.tobytes())
            labels = np.where(e.labels == data.IGNORED, 0, e.labels).astype(np.int32)
            key.update(labels.tobytes())
            if e.image is not None:
                key.update(os.path.basename(e.image).encode(errors="replace"))
        return key.hexdigest()[:16]


def read_source(source: str, settings, look: bool) -> tuple[list, list]:
    """Read a source of --data -> (samples, bad rows). look: as in read_instructions.

    ScienceQA has no bad rows: anything wrong with it raises LavinError.
    """
    if source == "sqa":
        _, samples = load_sqa(settings.data_root, "train", settings.format, settings.captions,
                              settings.images)
        return samples, []
    samples, bad_rows = instructions.read_instructions(source, settings.multi_turn, look)
    if not settings.images:
        for sample in samples:
            sample.image = None
    return samples, bad_rows


def read_sources(settings) -> dict[str, list[data.Sample]]:
    """Read every source of --data. Raises LavinError for a bad row, unless --skip-bad is set."""
    sources = {}
    for source in settings.data:
        samples, bad_rows = read_source(source, settings, look=settings.skip_bad)
        if bad_rows and not settings.skip_bad:
            raise LavinError(f"{bad_rows[0]} ({len(bad_rows)} bad row(s) in all; "
                             f"python train.py --data {source} --check lists them, and --skip-bad "
                             "leaves them out)")
        if bad_rows:
            print(f"skipped  {len(bad_rows)} bad rows of {source}; the first: {bad_rows[0]}")
        if not samples:
            raise LavinError(f"--data {source}: it holds no samples")
        sources[source] = samples
    return sources


def make_training_set(lavin: nn.Module, sources: dict[str, list[data.Sample]],
                      settings) -> TrainingSet:
    """Tokenize all samples once, and hold some out.

    Samples whose answer is cut off entirely are counted and left out.
    """
    encoded = []
    sizes = []
    held_out = {}
    folder = None if settings.dry_run else settings.out
    for number, (source, samples) in enumerate(sources.items()):
        with ranks.rank_0_first():
            all_encoded = instructions.encode_all(
                samples, lavin.tokenizer, lavin.n_features, lavin.max_seq_len, folder)
        kept = [e for e in all_encoded if (e.labels != data.IGNORED).any()]
        title = f"{source}: " if len(sources) > 1 else ""
        say_what_was_kept(title, kept, len(all_encoded))
        if not kept:
            raise LavinError(f"--max-seq-len {settings.max_seq_len} cuts off the answer of every "
                             f"sample of {source}; raise it")
        trained, held = hold_out(kept, settings.val_fraction, settings.seed, number)
        if not trained:
            raise LavinError(f"--val-fraction {settings.val_fraction} holds out all of {source}; "
                             "lower it")
        encoded += trained
        sizes.append(len(trained))
        if held:
            held_out[source] = held
        if settings.val_fraction:
            print(f"held out {len(held)} of these samples")
    return TrainingSet(encoded, sizes, held_out)


def say_what_was_kept(title, kept, n_read):
    n_pictures = sum(e.image is not None for e in kept)
    n_tokens = sum(len(e.tokens) for e in kept)
    print(f"data     {title}{len(kept)} samples, {n_pictures} with a picture, {n_tokens:,} tokens; "
          f"{n_read - len(kept)} left out because their answer is cut off entirely")


def hold_out(encoded, fraction, seed, number):
    """Return (training samples, held-out samples). Seed and the source's number decide which."""
    n_held = round(fraction * len(encoded))
    if n_held == 0:
        return encoded, []
    generator = torch.Generator().manual_seed(data.mixed_seed(seed, number))
    order = torch.randperm(len(encoded), generator=generator).tolist()
    shuffled = [encoded[i] for i in order]
    return shuffled[n_held:], shuffled[:n_held]


def prefetch_batches(lavin: nn.Module, encoded: list[data.Encoded], plan: Callable,
                     items: Iterable[int], workers: int) -> Iterator[list[data.Batch]]:
    """For each item, yield this rank's share of the batches that plan(item) lists."""
    batches = data.Batches(encoded, plan, lavin.resolution, ranks.rank(), ranks.count())
    return data.prefetch(batches, items, workers)


@torch.no_grad()
def held_out_losses(lavin: nn.Module, held_out: dict, settings) -> dict[str, float]:
    """{source: the mean loss of its held-out answer tokens}, over all ranks."""
    losses = {}
    lavin.eval()
    for source, encoded in held_out.items():
        plan = data.in_order(len(encoded), settings.micro_batch, ranks.count())
        items = range(len(plan))
        loader = prefetch_batches(lavin, encoded, plan.__getitem__, items, settings.workers)
        batch_losses = []
        n_answer = 0
        for (batch,) in loader:
            batch_losses.append(lavin(batch.to(lavin.device)) * batch.n_answer)
            n_answer += batch.n_answer
        loss = sum(torch.stack(batch_losses).tolist())      # wait for the GPU only once
        loss, n_answer = ranks.all_reduce_numbers([loss, n_answer], lavin.device)
        losses[source] = loss / n_answer
    lavin.train()
    return losses


def check_data(settings, small_llama: str | Path) -> int:
    """--check: describe every source of --data -> 1 if anything is wrong with one, else 0.

    This needs a tokenizer, but no model. If there is no LLaMA yet, small_llama's is used.
    """
    llama = settings.llama or DEFAULT_PATHS["llama"]
    if not settings.llama and not tokenizer_path(llama).exists():
        llama = small_llama
    tokenizer = load_tokenizer(open_llama(llama))
    print(f"tokens are counted with {tokenizer_path(llama)}")
    vit = settings.vit or DEFAULT_PATHS["vit"]
    n_features = 6                      # ViT-L/14's
    if settings.vit or os.path.exists(vit):
        n_features = read_clip(vit)[1].n_features
    settings.data_root = settings.data_root or DEFAULT_PATHS["data_root"]
    n_bad = 0
    for source in settings.data:
        try:
            samples, bad_rows = read_source(source, settings, look=False)
        except LavinError as error:         # still check the other sources
            print(f"{source}: {error}")
            n_bad += 1
            continue
        n_bad += instructions.check_samples(
            source, samples, bad_rows, tokenizer, n_features, settings.max_seq_len)
    return 1 if n_bad else 0


# Adapters


def fresh_adapters(settings) -> AdapterConfig:
    """The adapters of a run that starts without a checkpoint."""
    return AdapterConfig(
        rank=settings.rank,
        projector_dim=settings.hidden,
        tau=settings.tau,
        scale=settings.scale,
        dropout=settings.dropout,
        experts=settings.experts)


def freeze(lavin: nn.Module, settings) -> None:
    """The paper's ablations: what is left out of a run is frozen.

    Frozen adapters stay as they are: the identity, unless --adapter has loaded them.
    Without pictures, the projector and the ViT's adapters are frozen too. Otherwise their gradient
    would be zero, not None, and weight decay would still change them.
    """
    left_out = []
    if settings.adapters in ("llama", "none") or not settings.images:
        left_out += lavin.vit.resblocks
    if settings.adapters == "none":
        left_out += lavin.llama.layers
    if not settings.images:
        lavin.projector.requires_grad_(False)
    for block in left_out:
        for module in block.modules():
            if isinstance(module, Adapter):
                module.requires_grad_(False)
    if not settings.routing:
        for module in lavin.modules():
            if isinstance(module, Router):
                module.requires_grad_(False)
                module.weight.zero_()
                module.bias.zero_()
    has_routers = settings.routing and settings.experts > 1
    if not has_routers or settings.adapters == "none":
        lavin.modality_embedding.requires_grad_(False)


# What a run prints


def count_parameters(module: nn.Module, trained: bool) -> int:
    """The number of trained parameters in a module. With trained=False, of frozen ones."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)


def print_counts(title, counts):
    shown = " · ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    print(f"{title:8} {sum(counts.values()):,} parameters: {shown}")


def print_batch(settings):
    micro_batch = min(settings.micro_batch, settings.batch_size)
    line = (f"batch    {settings.batch_size} in micro-batches of {micro_batch} · "
            f"context {settings.max_seq_len} tokens")
    if ranks.count() > 1:
        line += f" · {ranks.count()} ranks"
    print(line)
    n_micro_batches = math.ceil(settings.batch_size / micro_batch)
    if n_micro_batches < ranks.count():
        print(f"note     {n_micro_batches} of {ranks.count()} ranks have work in each step; "
              "a smaller --micro-batch gives it to more of them")


def describe(lavin: nn.Module, settings, steps_per_epoch: int) -> None:
    """Print a run's parameter counts, batch, steps and device."""
    n_modality = lavin.modality_embedding.numel()
    n_trained = n_modality if lavin.modality_embedding.requires_grad else 0
    print_counts("trained", {
        "adapters and routers in LLaMA": count_parameters(lavin.llama, trained=True),
        "in the ViT": count_parameters(lavin.vit, trained=True),
        "projector": count_parameters(lavin.projector, trained=True),
        "modality embedding": n_trained})
    print_counts("frozen", {
        "LLaMA": count_parameters(lavin.llama, trained=False) + n_quantized(lavin.llama),
        "ViT": count_parameters(lavin.vit, trained=False),
        "projector": count_parameters(lavin.projector, trained=False),
        "modality embedding": n_modality - n_trained})

    print_batch(settings)
    n_steps = settings.epochs * steps_per_epoch
    epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs} epochs"
    line = (f"steps    {n_steps} = {epochs} × {steps_per_epoch} · "
            f"peak lr {settings.lr:.3g} · τ {settings.tau:g}")
    if settings.max_steps:
        line += f" · stops after {settings.max_steps}"
    print(line)

    compiled = "on" if settings.compile else "off"
    device = lavin.device
    if device.type == "meta":                       # a dry run without the GPU
        device = settings.device
    line = f"device   {device} · {settings.dtype} · compile {compiled}"
    if settings.bits < 16:
        line += f" · LLaMA in {settings.bits} bits"
    if settings.fsdp:
        line += " · fsdp"
    print(line)


def peak_memory(device: torch.device) -> int:
    """The peak memory of this process in bytes, on the GPU if it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024          # bytes on macOS, KB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ways_to_save_memory(settings) -> str:
    """The flags that would shrink a run that does not fit into memory."""
    ways = []
    micro_batch = min(settings.micro_batch, settings.batch_size)
    if micro_batch > 1:
        ways.append(f"--micro-batch {micro_batch // 2}")
    if not settings.checkpointing:
        ways.append("--checkpointing")
    if settings.bits == 16 and not settings.fsdp:
        ways.append("--bits 8")
    if settings.bits > 4 and not settings.fsdp:
        ways.append("--bits 4")
    if ranks.count() > 1 and settings.bits == 16 and not settings.fsdp:
        ways.append("--fsdp")
    ways.append("a lower --max-seq-len")
    return ", ".join(ways)


# The output folder


@contextlib.contextmanager
def alone_in(settings) -> Iterator[None]:
    """`with alone_in(settings):` keeps other runs out of OUT. Raises LavinError if one is there."""
    if settings.dry_run or ranks.rank() > 0:        # these write nothing
        yield
        return
    taken = (f"--out {settings.out}: another run is writing there; wait until it ends, "
             "or choose another folder")
    with locked(settings.out, otherwise=taken):
        remove_temporaries(settings.out)            # left by a run that was killed
        yield


def kept_path(out: str, epoch: int) -> Path:
    """The path of an epoch's checkpoint for --keep-epochs.

    Epochs count from 0, as in the authors' files: the last of 20 is checkpoint-19.pth.
    """
    return Path(out, f"checkpoint-{epoch}.pth")


def set_aside(settings) -> None:
    """Before a new run begins in OUT, rename an earlier run's files to *.old."""
    checkpoint = Path(settings.out, "checkpoint.pth")
    if checkpoint.exists():             # without it, the earlier run left nothing to keep
        for path in (checkpoint, Path(settings.out, "metrics.jsonl")):
            if path.exists():
                print(f"note     {path} of an earlier run is now {path}.old; "
                      "--resume would have continued it")
                path.replace(f"{path}.old")
    if settings.keep_epochs:            # otherwise they would mix with this run's
        for path in sorted(Path(settings.out).glob("checkpoint-*.pth")):
            print(f"note     {path} is now {path}.old")
            path.replace(f"{path}.old")


# The log


def is_done(line: str, last_step: int) -> bool:
    """Is this a complete line of metrics.jsonl, for a step up to last_step?"""
    try:
        return json.loads(line)["step"] <= last_step
    except (ValueError, TypeError, KeyError):       # half a line: the machine crashed
        return False


def open_metrics(out: str, first_step: int):
    """Open OUT/metrics.jsonl to append lines.

    A resumed run first drops the lines of steps that it will repeat.
    """
    path = Path(out, "metrics.jsonl")
    lines = []
    if first_step > 0 and path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if is_done(line, first_step):
                lines.append(line + "\n")
    write_atomically(path, lambda temporary: temporary.write_text("".join(lines)))
    return open(path, "a", buffering=1)


def draw_losses(out: str) -> None:
    """Plot OUT/metrics.jsonl to OUT/loss.png.

    It shows the loss of every step, a running mean, the held-out losses, and where epochs end.
    """
    path = Path(out, "metrics.jsonl")
    steps = []
    losses = []
    ends = {}                                       # {step: the epoch that it ends}
    held_out = {}                                   # {source: [(step, loss)]}
    if path.exists():
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if "loss" in line:
                steps.append(line["step"])
                losses.append(line["loss"])
                if line["epoch"] == int(line["epoch"]):
                    ends[line["step"]] = int(line["epoch"])
            for source, loss in line.get("held_out", {}).items():
                held_out.setdefault(source, []).append((line["step"], loss))
    if not losses:                                  # the file was deleted
        return
    series = loss_series(steps, losses, held_out)
    every = math.ceil(len(ends) / 10)               # more than ten lines would hide the chart
    marks = {step: f"epoch {epoch}" for step, epoch in ends.items() if epoch % every == 0}
    plot.chart(Path(out, "loss.png"), f"Loss of {out}", "optimizer step",
               "loss (nats per answer token)", series, x_range=(0, max(steps)), marks=marks)


def loss_series(steps: list[int], losses: list[float], held_out: dict) -> list[plot.Series]:
    """The curves of the loss chart. held_out: {source: [(step, loss)]}."""
    around = max(2, len(losses) // 80)
    means = []
    for i in range(len(losses)):
        window = losses[max(0, i - around):i + around + 1]
        means.append(sum(window) / len(window))
    mean_name = f"mean of {2 * around + 1} steps"
    series = [plot.Series(mean_name, steps, means, plot.BLUE, width=10)]
    looks = [(plot.ORANGE, "circle"), (plot.GREEN, "square"), (plot.BLACK, "diamond")]
    for i, (source, points) in enumerate(held_out.items()):
        held_steps = [step for step, loss in points]
        held_losses = [loss for step, loss in points]
        colour, marker = looks[i % len(looks)]
        series.append(plot.Series(
            f"held out of {source}", held_steps, held_losses, colour, width=5, marker=marker))
    series.append(plot.Series("each step", steps, losses, plot.PALE_BLUE, width=4))
    return series


class Log:
    """A progress bar, a line of metrics.jsonl for each step, and loss.png at the end.

    Ranks other than 0 write nothing. A failed write (full disk, closed terminal) raises nothing:
    its reason goes to `failure`, and the training loop saves a checkpoint before it stops.
    """

    def __init__(self, settings, first_step: int, n_steps: int):
        self.out = settings.out
        self.epochs = settings.epochs
        if ranks.rank() == 0:
            if first_step == 0:
                set_aside(settings)
            self.metrics = open_metrics(self.out, first_step)
        else:
            self.metrics = open(os.devnull, "w")
        self.board = None               # the writer of --tensorboard
        if settings.tensorboard and ranks.rank() == 0:
            self.board = board.open_board(self.out, first_step)
        self.failure = None
        self.neighbours = Neighbours()
        self.bar = tqdm(total=n_steps, initial=first_step, unit="step", file=sys.stdout)
        self.last_step_at = time.perf_counter()
        self.speed = None               # samples/s, a moving mean over about ten steps

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        with self.attempt():
            self.bar.close()
        with self.attempt():
            self.metrics.close()
        if self.board:
            with self.attempt("tensorboard"):
                self.board.close()
        if error is None and ranks.rank() == 0 and not self.failure:
            draw_losses(self.out)

    @contextlib.contextmanager
    def attempt(self, name="metrics.jsonl"):
        """`with self.attempt():` puts the reason of a failed write into `failure` and goes on."""
        try:
            yield
        except OSError as error:                        # from the file `name`
            self.failure = f"{self.out}/{name} cannot be written ({error.strerror})"
        except LavinError as error:                     # from the terminal
            self.failure = str(error)

    def write(self, line):
        with self.attempt():
            self.metrics.write(json.dumps(line) + "\n")
            if ranks.rank() == 0 and os.fstat(self.metrics.fileno()).st_nlink == 0:
                self.failure = f"{self.out}/metrics.jsonl was deleted"
        if self.board:
            with self.attempt("tensorboard"):
                board.add_line(self.board, line)

    def step(self, step, epoch, loss, lr, n_samples, norm):
        """Log one step. Its speed is measured since the previous one."""
        now = time.perf_counter()
        speed = n_samples / (now - self.last_step_at)
        self.last_step_at = now
        if self.speed is None:
            self.speed = speed
        self.speed += 0.1 * (speed - self.speed)
        line = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "samples_per_s": speed,
                "grad_norm": norm if math.isfinite(norm) else None}
        self.write(line)
        memory = ""
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
            memory = f" {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        self.bar.set_description(f"epoch {math.ceil(epoch)}/{self.epochs}", refresh=False)
        status = f"loss {loss:.3f} {self.speed:.1f} samples/s{memory}"
        self.bar.set_postfix_str(status, refresh=False)
        with self.attempt():
            self.bar.update()
        advice = self.neighbours.advice(self.out)
        if advice and ranks.rank() == 0 and not torch.cuda.is_available():
            with self.attempt():
                self.bar.write(advice, file=sys.stdout)

    def held_out(self, step, losses, right):
        """Log {source: held-out loss} and {source: (rows answered correctly, rows asked)}."""
        line = {"step": step, "held_out": losses, "exact_match": {}}
        shown = []
        for source, loss in losses.items():
            text = f"{source}: loss {loss:.3f}"
            if source in right:
                n_right, n_asked = right[source]
                line["exact_match"][source] = 100 * n_right / n_asked
                text += f", {n_right}/{n_asked} right"
            shown.append(text)
        self.write(line)
        shown = " · ".join(shown)
        with self.attempt():
            self.bar.write(f"held out {shown}", file=sys.stdout)


def log_scores(line: dict, settings) -> None:
    """Add a line with scores to OUT/metrics.jsonl, once the run's Log is closed."""
    with open(Path(settings.out, "metrics.jsonl"), "a") as metrics:
        metrics.write(json.dumps(line) + "\n")
    if settings.tensorboard:
        writer = board.open_board(settings.out)
        board.add_line(writer, line)
        writer.close()


# Signals


class StopSignals:
    """In a `with`, SIGINT and SIGTERM are counted, so that a step can finish and be saved.

    Before `listen` is called, a signal still ends the run at once. So does a second signal of the
    same kind.
    """

    def __enter__(self):
        self.count = 0
        self.first = signal.SIGTERM     # used if only another rank got a signal
        self.handlers = {}
        return self

    def listen(self):
        """Start counting: from now on there is something to save."""
        if not self.handlers:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.hear)

    def hear(self, number, frame):
        if self.count == 0:
            self.first = number
        self.count += 1
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def end_early(log: Log, signals: StopSignals, step: int) -> None:
    """End a run after a saved step, because of a signal or because the log cannot be written.

    Raises LavinError for the log. For a signal, it exits with 128 plus the signal's number.
    """
    if log.failure:
        raise LavinError(f"{log.failure}; stopped after step {step} and saved it")
    print(f"stopped after step {step} and saved it; --resume continues from here")
    sys.exit(128 + signals.first)
