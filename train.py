"""Train LaVIN's adapters, routers, projector and modality embedding; LLaMA and CLIP stay frozen.

    python train.py --data sqa
    python train.py --data alpaca:alpaca.json llava:llava.json:coco/train2014 --weights 1 2

Read down to the end of `train`: the settings, one optimizer step, the loop. The rest of the file
builds the model, does the dry run and reads the command line.

Mixed precision: frozen weights, matrix products and activations are in --dtype. Trained weights,
their gradients, AdamW's moments, the routing weights and the loss are fp32. So is the residual
stream in the modality tokens' own pass. Only fp16 needs a GradScaler.

A step's randomness depends only on the settings, the step's number and the rank: its samples come
from (seed, epoch), its dropout from (seed, step, rank). So a resumed run computes what an
uninterrupted run would have computed.
"""

import dataclasses
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends the imports without a traceback

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

import checkpoints
import data
from extras import board, estimate, evaluate, flags, resume, rows, runs, scienceqa
from extras.terminal import run
from fast import ops, ranks
from files import (DTYPES, LavinError, check_compiler, check_writable, choose_paths,
                   pick_device, save_tensors)
from model import LaVIN
from tiny import world


# To add a setting, also add its range in extras/values.py and its flag in extras/flags.py.
# extras/resume.py lists settings that a resumed run must keep (FIXED) or drops (ONCE).
@dataclass
class Settings:
    """Every setting of a run, with the paper's defaults for ScienceQA. Flags overwrite them.

    `parse_args` fills in epochs, warmup, lr and workers where they are None. For the small world,
    a few settings have other defaults (tiny/world.py: DEFAULTS).
    """
    # The training data
    data: list[str] = field(default_factory=lambda: ["sqa"])
    weights: list[float] | None = None  # the sources' shares of an epoch, not parameters
    format: str = "QCM-ALE"             # format of ScienceQA's prompts
    captions: bool = False
    images: bool = True                 # False: no pictures, an ablation
    multi_turn: bool = False            # one sample per conversation, not per answer
    skip_bad: bool = False              # leave out rows that cannot be used
    val_fraction: float = 0.0           # held out from each source, scored after each epoch
    max_seq_len: int = 512
    # The training
    epochs: int | None = None           # None: 20, or 15 without ScienceQA
    # In epochs, and at most a tenth of the run. None: 2, or 0.2 without ScienceQA
    warmup: float | None = None
    batch_size: int = 32                # samples per step, over all micro-batches and ranks
    micro_batch: int = 4                # samples per forward pass, at most
    lr: float | None = None             # the peak; None: 9e-3 · batch_size / 256
    weight_decay: float = 0.02          # none on biases
    clip: float | None = None           # maximum norm of the gradient; None: no clipping
    betas: tuple[float, float] = (0.9, 0.95)    # AdamW's; there is no flag
    tau: float = 10.0                   # temperature of the routers: 10 for 7B, 5 for 13B
    dropout: float = 0.1                # in the adapters
    rank: int = 8                       # rank of the adapters
    scale: float = 1.0                  # scale of the adapters, s
    hidden: int = 128                   # size of the projector's hidden layer
    experts: int = 2                    # experts in an adapter; 1: no router, an ablation
    adapters: str = "all"               # or "llama", "none": ablations
    routing: bool = True                # False: each expert has weight one half, an ablation
    seed: int = 0
    # Paths
    llama: str | None = None
    vit: str | None = None
    delta: str | None = None            # a Hugging Face folder of weights to add to LLaMA's
    delta_unpermuted: bool = False      # like the authors' code, do not reorder its rows first
    data_root: str | None = None
    adapter: str | None = None          # a checkpoint to start from
    out: str = "out"
    # Speed, memory and other modes
    device: str = "auto"
    dtype: str = "auto"
    bits: int = 16                      # 8 or 4: quantize the matrices of LLaMA's blocks
    compile: bool | None = None         # None: only on an NVIDIA GPU
    checkpointing: bool = False
    fsdp: bool = False
    workers: int | None = None          # processes for pictures; None: half the cores, at most 8
    resume: bool = False
    check: bool = False
    dry_run: bool = False
    tflops: float | None = None         # a GPU's speed, to estimate hours in a dry run
    max_steps: int | None = None
    save_every: int | None = None       # in steps; the end of an epoch is always saved
    keep_epochs: bool = False           # keep a checkpoint of every epoch
    tensorboard: bool = False
    # Problems scored at the end (None: all), and held-out rows per source (None: 100)
    eval_limit: int | None = None
    # Not set by flags: filled in from the data and models that the run finds
    n_samples: int | None = None
    data_hash: str | None = None
    llama_hash: str | None = None
    vit_hash: str | None = None


def learning_rate(n_done: int, steps_per_epoch: int, settings: Settings) -> float:
    """Linear warm-up from 0 over at most a tenth of the run, then half a cosine down to 0.

    n_done: the number of steps done so far, 0 in the first. So with warm-up, the first step changes
    no weight.
    """
    epochs_done = n_done / steps_per_epoch
    warmup = min(settings.warmup, settings.epochs / 10)
    if epochs_done < warmup:
        return settings.lr * epochs_done / warmup
    angle = math.pi * (epochs_done - warmup) / (settings.epochs - warmup)
    return settings.lr * 0.5 * (1 + math.cos(angle))


def make_optimizer(lavin: LaVIN, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with weight decay on all of them except biases."""
    decay = []
    no_decay = []
    for name, p in lavin.named_parameters():
        if p.requires_grad:
            if name.endswith("bias"):
                no_decay.append(p)
            else:
                decay.append(p)
    groups = [{"params": decay, "weight_decay": settings.weight_decay},
              {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)


def train_step(lavin: LaVIN, optimizer: Optimizer, scaler: GradScaler, gradients: torch.Tensor,
               micro_batches: list[data.Batch], clip: float | None = None) -> tuple[float, float]:
    """One optimizer step on one global batch -> (its loss, the norm of its gradient).

    The loss is the mean over all answer tokens of the global batch. So the split into micro-batches
    and ranks changes nothing but the dropout masks. (The authors average micro-batch means, so a
    token weighs more if its micro-batch has few answer tokens.) Every p.grad is a view into one
    buffer, `gradients`: its sum over ranks and its norm take one call each. A norm above `clip` is
    scaled down to it. With several ranks, micro_batches and the returned loss are this rank's
    share. Raises LavinError if the loss or the gradient is not finite (but see fp16 below).
    """
    n_own = sum(batch.n_answer for batch in micro_batches)          # answer tokens of this rank
    n_answer = ranks.all_reduce(torch.tensor(float(n_own), device=lavin.device))    # of all ranks
    gradients.zero_()

    # Backward has two stages. The routing weights depend only on the modality, so all micro-batches
    # share them. They are cut from the graph here; each micro-batch adds its gradient with respect
    # to them to leaf.grad. At the end, one backward through `routed` carries the sum along the path
    # of the two modality tokens. Only this stage reaches LLaMA's routers and the two embeddings.
    routed = lavin.route()                                          # (L, 2 modalities, E experts)
    leaf = routed.detach().requires_grad_()
    losses = []
    for batch in micro_batches:
        share = batch.n_answer / n_answer   # (sum / batch.n_answer) · share = sum / n_answer
        loss = lavin(batch.to(lavin.device), leaf) * share
        scaler.scale(loss).backward()
        losses.append(loss.detach())
    if routed.requires_grad:        # False with --experts 1 or --adapters none
        routed.backward(leaf.grad)

    losses = torch.stack(losses).tolist()                           # waits for the GPU
    for loss, batch in zip(losses, micro_batches):
        check_finite("loss", loss, [batch])
    ranks.all_reduce(gradients)                                     # the sum over all ranks
    scaler.unscale_(optimizer)
    norm = gradients.norm().item()          # of the global batch, for any number of ranks
    # In fp16 the gradient may overflow. The scaler then skips the step and lowers its scale.
    fp16_can_recover = scaler.is_enabled() and scaler.get_scale() >= 1
    if not fp16_can_recover:
        check_finite("global batch's gradient", norm, micro_batches)
    if clip and norm > clip:
        gradients.mul_(clip / norm)
    scaler.step(optimizer)
    scaler.update()
    return sum(losses), norm


def check_finite(what: str, value: float, batches: list[data.Batch]) -> None:
    """Raises LavinError with this rank's samples if a loss or a gradient's norm is not finite."""
    if not math.isfinite(value):
        ids = ", ".join(", ".join(batch.ids) for batch in batches)
        raise LavinError(f"the {what} is {value} on the samples {ids}; try a lower --lr")


def train(lavin: LaVIN, samples: runs.TrainingSet, optimizer: Optimizer, scaler: GradScaler,
          first_step: int, settings: Settings) -> None:
    """The loop, from first_step until all steps are done or a signal asks to stop.

    In settings.out, metrics.jsonl gets a line per step. checkpoint.pth (see `save`) is written
    after each epoch, every save_every steps and on a signal, loss.png at the end.
    """
    steps_per_epoch, n_steps = count_steps(settings)
    loader = load_batches(lavin, samples, range(first_step, n_steps), settings)
    gradients = ranks.gradient_buffer(lavin)
    lavin.train()
    step = first_step
    stopped = False
    with runs.StopSignals() as signals, runs.Log(settings, first_step, n_steps) as log:
        for step, micro_batches in enumerate(loader, first_step + 1):      # numbered from 1
            lr = learning_rate(step - 1, steps_per_epoch, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Each rank has its own dropout.
            torch.manual_seed(data.mixed_seed(ranks.own_seed(settings.seed), step))
            try:
                loss, norm = train_step(
                    lavin, optimizer, scaler, gradients, micro_batches, settings.clip)
            except LavinError as error:
                raise LavinError(f"step {step}: {error}; stopped without saving") from error

            signals.listen()    # until here a signal ends the run; later, it lets a step be saved
            # With several ranks, one may have an idle batch, which does not count (data.Batches).
            n_samples = sum(len(batch.ids) for batch in micro_batches if batch.n_answer)
            has_to_stop = signals.count > 0 or log.failure is not None
            loss, n_samples, n_to_stop = ranks.all_reduce_numbers(
                [loss, n_samples, has_to_stop], lavin.device)
            stopped = n_to_stop > 0
            log.step(step, step / steps_per_epoch, loss, lr, n_samples, norm)

            ends_epoch = step == n_steps or step % steps_per_epoch == 0
            is_due = settings.save_every and step % settings.save_every == 0
            if ranks.rank() == 0 and (ends_epoch or is_due or stopped):
                save(lavin, optimizer, scaler, step, steps_per_epoch, settings)
            if samples.held_out and ends_epoch:     # after saving: this may fail
                rows.score_held_out(lavin, samples.held_out, step, log, settings)
            if stopped:
                break
    if stopped or log.failure:
        runs.end_early(log, signals, step)


def load_batches(lavin: LaVIN, samples: runs.TrainingSet, steps: range,
                 settings: Settings) -> Iterator[list[data.Batch]]:
    """For each step, yield this rank's micro-batches of the global batch."""
    plan = functools.partial(
        data.global_batch,
        lengths=samples.lengths,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        seed=settings.seed,
        sizes=samples.sizes,
        shares=settings.weights)
    return runs.prefetch_batches(lavin, samples.encoded, plan, steps, settings.workers)


def count_steps(settings: Settings) -> tuple[int, int]:
    """Return (steps per epoch, steps of the run). An epoch's last step may have fewer samples."""
    steps_per_epoch = math.ceil(settings.n_samples / settings.batch_size)
    n_steps = settings.epochs * steps_per_epoch
    if settings.max_steps:
        n_steps = min(n_steps, settings.max_steps)
    return steps_per_epoch, n_steps


def save(lavin: LaVIN, optimizer: Optimizer, scaler: GradScaler, step: int,
         steps_per_epoch: int, settings: Settings) -> None:
    """Write OUT/checkpoint.pth: the official layout, plus what --resume and generate.py need.

    It holds the trained tensors, but not LLaMA and CLIP: whoever loads it needs their files too.
    With --keep-epochs, after a whole epoch, also write OUT/checkpoint-N.pth (runs.kept_path).
    """
    epoch = (step - 1) // steps_per_epoch
    checkpoint = checkpoints.official_checkpoint(lavin, settings.format, settings.bits)
    checkpoint |= {
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch,
        "step": step,
        "config": dataclasses.asdict(settings)}
    resume.check_sound(checkpoint)
    # The kept copy comes first. If the run is killed before the second, --resume writes both again.
    if settings.keep_epochs and step % steps_per_epoch == 0:
        save_tensors(runs.kept_path(settings.out, epoch), checkpoint)
    save_tensors(Path(settings.out, "checkpoint.pth"), checkpoint)


# The model of a run


def compile_blocks(lavin: LaVIN) -> None:
    """torch.compile each block, for any length. A few graphs serve all blocks."""
    for block in [*lavin.llama.layers, *lavin.vit.resblocks]:
        block.compile(dynamic=True)


def build(settings: Settings, resumed: dict | None,
          device: torch.device) -> tuple[LaVIN, Optimizer, GradScaler]:
    """Return LaVIN, its optimizer and its scaler, new or with the state that `resumed` holds."""
    torch.manual_seed(data.mixed_seed(settings.seed, 0))
    path = Path(settings.out, "checkpoint.pth")
    lavin = checkpoints.load(
        settings.llama,
        settings.vit,
        path if resumed else settings.adapter,
        device=device,
        dtype=DTYPES[settings.dtype],
        max_seq_len=settings.max_seq_len,
        fresh=runs.fresh_adapters(settings),
        dropout=settings.dropout,
        bits=settings.bits,
        fsdp=settings.fsdp,
        delta=settings.delta,
        delta_unpermuted=settings.delta_unpermuted)
    resume.check_sizes(lavin.adapter_config, settings)
    if lavin.llama.config.folded:
        raise LavinError(f"{settings.llama}: adapters are folded into it; "
                         "train on the original LLaMA instead")
    runs.freeze(lavin, settings)
    optimizer = make_optimizer(lavin, settings)
    scaler = GradScaler(device.type, enabled=settings.dtype == "fp16")
    if resumed:
        resume.restore(optimizer, scaler, resumed, settings.out)
    lavin.llama.checkpointing = settings.checkpointing
    lavin.vit.checkpointing = settings.checkpointing
    if settings.compile:
        compile_blocks(lavin)
    if device.type == "cpu":
        ops.keep_freed_memory()
    return lavin, optimizer, scaler


def longest_samples(samples: runs.TrainingSet, n: int) -> list[int]:
    """The indices of the n longest samples, the longest first."""
    def size(i):
        return samples.lengths[i], samples.encoded[i].image is not None

    return sorted(range(len(samples.encoded)), key=size, reverse=True)[:n]


def plan_dry_run(step: int, longest: list[int], lengths: list[int],
                 settings: Settings) -> list[list[int]]:
    """Like data.global_batch, but step 0 takes the longest samples."""
    chosen = longest if step == 0 else range(len(lengths))
    micro_batches = data.global_batch(
        step, [lengths[i] for i in chosen], settings.batch_size, settings.micro_batch,
        settings.seed)
    return [[chosen[i] for i in indices] for indices in micro_batches]


def dry_run(lavin: LaVIN, samples: runs.TrainingSet, optimizer: Optimizer,
            scaler: GradScaler, settings: Settings) -> None:
    """Print a run's memory and time, from one step on the longest samples and a few normal ones."""
    steps_per_epoch, n_steps = count_steps(settings)
    longest = longest_samples(samples, settings.batch_size)
    plan = functools.partial(
        plan_dry_run, longest=longest, lengths=samples.lengths, settings=settings)
    gradients = ranks.gradient_buffer(lavin)
    lavin.train()
    steps = range(min(4, n_steps))
    loader = runs.prefetch_batches(lavin, samples.encoded, plan, steps, settings.workers)
    seconds = []
    for micro_batches in loader:
        began = time.perf_counter()
        train_step(lavin, optimizer, scaler, gradients, micro_batches)      # learning rate 0
        seconds.append(time.perf_counter() - began)
    peak = runs.peak_memory(lavin.device)
    hours = n_steps * min(seconds) / 3600
    epoch = estimate.flops_of(lavin, samples.encoded)
    estimate.print_work(epoch, n_steps / steps_per_epoch, settings)
    print(f"dry run  peak memory {peak / 1e9:.2f} GB, "
          f"with samples of up to {samples.lengths[longest[0]]} tokens\n"
          f"         {n_steps} steps of about {min(seconds):.2f} s: {hours:.2f} h; "
          "no checkpoint was written")


def replace_gpu(settings: Settings) -> torch.device:
    """Adapt the settings to a dry run that computes a missing GPU's memory -> the CPU.

    Raises LavinError for several GPUs.
    """
    if settings.fsdp or ranks.count() > 1:
        raise LavinError("--dry-run: there is no GPU here, so the memory is computed, but only "
                         "for a single GPU; leave out torchrun and --fsdp")
    settings.compile = False
    if settings.dtype == "auto":
        settings.dtype = "bf16"
    return torch.device("cpu")


def computed_dry_run(sources: dict, settings: Settings) -> None:
    """Print the memory and work of a run on a GPU that is not here. No weights are read."""
    shape = estimate.read_shape(settings)
    lavin = shape.on_meta()
    runs.freeze(lavin, settings)
    samples = runs.make_training_set(lavin, sources, settings)
    settings.n_samples = len(samples.encoded)
    steps_per_epoch, n_steps = count_steps(settings)
    runs.describe(lavin, settings, steps_per_epoch)
    epoch = estimate.flops_of(lavin, samples.encoded)
    estimate.print_work(epoch, n_steps / steps_per_epoch, settings)

    chosen = [samples.encoded[i] for i in longest_samples(samples, settings.batch_size)]
    longest = estimate.longest_micro_batches(lavin, chosen, settings)
    print(f"dry run  computed for samples of up to {len(chosen[0].tokens)} tokens, "
          "because there is no GPU here; this takes a few minutes")
    estimate.print_training_memory(shape, settings, longest)


# The command line


def parse_args() -> tuple[Settings, dict | None]:
    """Return the settings, and the checkpoint to resume from (None for a new run).

    argparse sets only the fields whose flags were given. So the flags override the settings of the
    resumed run or the defaults of the small world, and all other fields stay.
    """
    parser = flags.train_parser(__doc__.split("\n\n")[0])
    settings = parser.parse_args(namespace=Settings())
    resumed = None
    if settings.resume:
        names = [setting.name for setting in dataclasses.fields(Settings)]
        resumed = resume.read_resumed(settings.out, names)
        remembered = dict(resumed["config"])
        for name in resume.ONCE:
            remembered.pop(name, None)
        settings = parser.parse_args(namespace=Settings(**remembered))
    elif world.is_meant(settings):
        settings = parser.parse_args(namespace=Settings(**world.DEFAULTS))
    has_sqa = "sqa" in settings.data
    if settings.lr is None:
        settings.lr = 9e-3 * settings.batch_size / 256
    if settings.epochs is None:
        settings.epochs = 20 if has_sqa else 15
    if settings.warmup is None:
        settings.warmup = 2 if has_sqa else 0.2
    if settings.workers is None:
        settings.workers = data.default_workers()
    flags.check_settings(settings)
    if resumed:
        # Older checkpoints do not store the warm-up.
        defaults = Settings(warmup=settings.warmup)
        resume.check_unchanged(settings, resumed["config"], defaults)
    return settings, resumed


def score_val(lavin: LaVIN, problems: dict, samples: list, step: int,
              settings: Settings) -> None:
    """Answer val's problems on all ranks, print the table, and write it to metrics.jsonl."""
    print(f"scoring  {len(samples)} problems of the val split")
    with torch.compiler.set_stance("force_eager"):      # compiled for training only
        predictions, _ = evaluate.score(
            lavin.eval(), problems, samples, settings.format, workers=settings.workers)
    line = {"step": step, "split": "val"}
    for column, score in evaluate.sqa_scores(problems, predictions).items():
        line[column] = None if math.isnan(score) else score
    if ranks.rank() == 0:
        runs.log_scores(line, settings)


def load_and_train(settings: Settings, resumed: dict | None, device: torch.device,
                   sources: dict, val: tuple) -> None:
    """Build the model, train it, score it. val: (problems, samples) of ScienceQA's val split."""
    lavin, optimizer, scaler = build(settings, resumed, device)
    samples = runs.make_training_set(lavin, sources, settings)
    settings.n_samples = len(samples.encoded)
    settings.data_hash = samples.hash()
    steps_per_epoch, n_steps = count_steps(settings)
    if resumed:
        resume.check_inputs(settings, resumed["config"])
        resume.check_step(resumed["step"], settings.epochs * steps_per_epoch, settings.out)
    runs.describe(lavin, settings, steps_per_epoch)
    if settings.dry_run:
        dry_run(lavin, samples, optimizer, scaler, settings)
        return
    first_step = resumed["step"] if resumed else 0
    train(lavin, samples, optimizer, scaler, first_step, settings)
    if first_step < n_steps:
        print(f"saved    {settings.out}/checkpoint.pth")
    else:
        print(f"note     nothing to train: {settings.out}/checkpoint.pth has done all of its steps")
    if settings.compile:
        n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print(f"compile  {n_graphs} graphs in the whole run")
    problems, val_samples = val
    if val_samples:
        score_val(lavin, problems, val_samples, max(first_step, n_steps), settings)
    ranks.leave()


def main() -> None:
    """Read the flags and all data before loading anything large; then train."""
    settings, resumed = parse_args()
    remembered = resumed["config"] if resumed else {}
    is_computed = settings.dry_run and estimate.is_missing(settings.device)
    if is_computed:
        device = replace_gpu(settings)
    else:
        device, settings.dtype = pick_device(settings.device, settings.dtype)
    if settings.compile is None:
        settings.compile = device.type == "cuda"
    check_compiler(settings.compile, device)
    if settings.tensorboard:
        board.check_installed()
    ranks.join(device)
    with ranks.rank_0_first():
        world.prepare(settings, remembered)
    if settings.check:
        sys.exit(runs.check_data(settings, world.PATHS["llama"]))
    choose_paths(settings, remembered, weights=not is_computed)
    for name in ("llama", "vit", "data_root", "delta"):     # the checkpoint has absolute paths
        path = getattr(settings, name)
        if path is not None:
            setattr(settings, name, os.path.abspath(path))

    sources = runs.read_sources(settings)
    if is_computed:
        computed_dry_run(sources, settings)
        return
    val = {}, []
    if "sqa" in settings.data and settings.eval_limit != 0:
        problems, samples = scienceqa.load_sqa(
            settings.data_root, "val", settings.format, settings.captions, settings.images)
        val = problems, samples[:settings.eval_limit]
    resume.hash_models(settings)
    resume.check_inputs(settings, remembered)
    if not settings.dry_run:
        check_writable(Path(settings.out, "checkpoint.pth"), "--out")
    try:
        with runs.alone_in(settings):
            load_and_train(settings, resumed, device, sources, val)
    except torch.OutOfMemoryError as error:
        ways = runs.ways_to_save_memory(settings)
        raise LavinError(f"{device} has too little memory for this; "
                         f"try {ways}") from error


if __name__ == "__main__":
    run(main)
