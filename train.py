"""Train LaVIN's adapters, routers, projector and modality embedding; LLaMA and CLIP stay frozen.

    python train.py --data sqa
    python train.py --data alpaca:alpaca.json llava:llava.json:coco/train2014 jsonl:mine.jsonl --weights 1 2 1

One optimizer step is one global batch, however it is cut into micro-batches: its loss is the sum over all
answer tokens, divided by their number. Mixed precision by hand: frozen weights are kept in bf16 or fp16 and
the trained ones in fp32; LaVIN's methods autocast where they meet; fp16 scales its loss.
A run is a function of its settings and the step number alone: the permutation of an epoch and the dropout of a
step are drawn from (seed, epoch) and (seed, step), so a resumed run does what the unbroken one would have done.
"""

import argparse
import ctypes
import functools
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import adapters
import data
import instructions
import plot
import quantize
import ranks
import tiny
from files import (DTYPES, LavinError, at_least, check_compiler, check_writable, choose_paths, pick_device, read_checkpoint, run,
                   write_atomically)
from decode import attend_packed
from generate import score
from model import LaVIN
from router import Router

# What makes a run what it is: --resume refuses to change these.
FIXED = ("data", "weights", "multi_turn", "val_fraction", "warmup", "format", "captions", "epochs",
         "batch_size", "lr", "tau", "dropout", "max_seq_len", "seed", "dtype", "adapters", "routing", "bits")


def learning_rate(step, steps_per_epoch, args):
    """Linear from 0 over the first epochs (at most a tenth of the run), then half a cosine down to 0."""
    epoch, warmup = step / steps_per_epoch, min(args.warmup, args.epochs / 10)
    if epoch < warmup:
        return args.lr * epoch / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))


def make_optimizer(lavin):
    """AdamW over what is trained; weight decay on matrices, none on biases."""
    trained = [(name, p) for name, p in lavin.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in trained if name.endswith("bias") != matrices], "weight_decay": decay}
              for matrices, decay in ((True, 0.02), (False, 0.0))]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def keep_freed_memory():
    """Let this process keep the memory that it frees. glibc gives large tensors back to the system, which clears every page
    of the next one anew, a tenth of a step on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                             # M_MMAP_MAX: take nothing from the system piece by piece
        libc.mallopt(-1, -1)                            # M_TRIM_THRESHOLD: give nothing back


def gradient_buffer(lavin):
    """One flat tensor, fp32, of which all gradients are views from now on: to be zeroed, measured and summed at once."""
    trained = [p for p in lavin.parameters() if p.requires_grad]
    buffer = torch.zeros(sum(p.numel() for p in trained), device=lavin.device)
    for p, gradient in zip(trained, buffer.split([p.numel() for p in trained])):
        p.grad = gradient.view_as(p)
    return buffer


def freeze(lavin, args):
    """The paper's ablations: adapters left as the identity that they begin as, routers at ½ for both experts."""
    left_out = {"all": [], "llama": lavin.vit.resblocks, "none": [*lavin.vit.resblocks, *lavin.llama.layers]}
    for block in left_out[args.adapters]:
        block.adapter.requires_grad_(False)
    if not args.routing:
        for module in lavin.modules():
            if isinstance(module, Router):
                module.requires_grad_(False).weight.zero_()
                module.bias.zero_()
    if not args.routing or args.adapters == "none":
        lavin.modality_embedding.requires_grad_(False)


def train_step(lavin, optimizer, scaler, gradients, micro_batches):
    """One optimizer step on one global batch -> (loss, norm of the gradient). LavinError where either is not finite.

    Of several ranks, each does its share of the micro-batches; the loss returned is this share's.
    """
    n_answer = ranks.total(torch.tensor(float(sum(batch.n_answer for batch in micro_batches)), device=lavin.device))
    gradients.zero_()
    losses, routed = [], lavin.route()
    weights = routed.detach().requires_grad_()          # the two tokens go through the layers once a step, and back once
    for batch in micro_batches:
        loss = lavin(batch.to(lavin.device), weights) * (batch.n_answer / n_answer)
        scaler.scale(loss).backward()
        losses.append(loss.detach())
    if routed.requires_grad:
        routed.backward(weights.grad)
    values = torch.stack(losses).tolist()               # the one place where the CPU waits for a GPU
    for value, batch in zip(values, micro_batches):
        if not math.isfinite(value):
            raise LavinError(f"the loss is {value} on the samples {', '.join(batch.ids)}; try a lower --lr")
    ranks.total(gradients)
    scaler.unscale_(optimizer)
    norm = gradients.norm().item()
    # fp16 skips such a step and halves its scale, which ends only where the gradient fits.
    if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
        raise LavinError(f"the gradient is {norm} on the samples {', '.join(i for b in micro_batches for i in b.ids)}; "
                         "try a lower --lr")
    scaler.step(optimizer)
    scaler.update()
    return sum(values), norm


def save(lavin, optimizer, scaler, step, steps_per_epoch, args):
    """OUT/checkpoint.pth after `step` steps: the official layout, and beside it what --resume and generate.py need."""
    checkpoint = adapters.official_checkpoint(lavin, args.format, args.bits) | {
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "epoch": (step - 1) // steps_per_epoch,
        "step": step, "config": vars(args)}
    write_atomically(Path(args.out, "checkpoint.pth"), lambda path: torch.save(checkpoint, path))


def describe(lavin, args, n_steps, steps_per_epoch):
    """Say once what follows from the settings."""
    parts = {"LLaMA": lavin.llama, "ViT": lavin.vit, "projector": lavin.projector}
    for kind, trained in (("trained", True), ("frozen", False)):
        counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad == trained)
                  for name, part in parts.items()}
        if not trained:
            counts["LLaMA"] += quantize.packed(lavin.llama)
        else:
            counts = {"adapters and routers in LLaMA": counts.pop("LLaMA"), "in the ViT": counts.pop("ViT"), **counts,
                      "modality embedding": lavin.modality_embedding.numel()}
        shown = " · ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        print(f"{kind:8} {sum(counts.values()):,} parameters: {shown}")
    micro_batch = min(args.micro_batch, args.batch_size)
    print(f"batch    {args.batch_size} in micro-batches of {micro_batch} · context {args.max_seq_len} tokens"
          + (f" · {ranks.count()} ranks" if ranks.count() > 1 else ""))
    print(f"steps    {n_steps} = {args.epochs} epochs × {steps_per_epoch} · peak lr {args.lr:.3g} · τ {args.tau:g}"
          + (f" · stops after {args.max_steps}" if args.max_steps else ""))
    print(f"device   {lavin.device} · {args.dtype} · compile {'on' if args.compile else 'off'}"
          + (f" · LLaMA in {args.bits} bits" if args.bits < 16 else "") + (" · fsdp" if args.fsdp else ""))


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_argument_group("data and weights")
    what.add_argument("--data", nargs="+", default=["sqa"], metavar="SOURCE", help="sqa: ScienceQA (default); "
                      f"{', '.join(f'{kind}:FILE' for kind in instructions.KINDS)}: see python data.py check --help")
    what.add_argument("--weights", nargs="+", type=float, metavar="W", help="shares of several sources in every epoch")
    what.add_argument("--multi-turn", action="store_true", help="a conversation is one sample, not one for each answer")
    what.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used, and count them")
    what.add_argument("--val-fraction", type=float, default=0.0, help="of every source, held out: its loss after each epoch")
    what.add_argument("--data-root", help="directory of the data (default: data/scienceqa)")
    what.add_argument("--format", default="QCM-ALE", help="of ScienceQA's prompts: what is asked - what is answered")
    what.add_argument("--captions", action="store_true", help="put captions.json's caption into the context")
    what.add_argument("--max-seq-len", type=at_least(1), default=512, help="context in tokens; longer samples are cut")
    what.add_argument("--llama", help="directory of LLaMA in Meta's layout (default: weights/7B)")
    what.add_argument("--vit", help="CLIP's image encoder (default: weights/ViT-L-14.pt)")
    what.add_argument("--delta", help="folder of Hugging Face's that is added to LLaMA: Vicuna's")
    what.add_argument("--adapter", help="LaVIN checkpoint to begin with (default: adapters that do nothing)")
    what.add_argument("--out", default="out", help="directory of checkpoint.pth and metrics.jsonl (default: out)")
    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=at_least(1), help="default: 20, without ScienceQA 15")
    how.add_argument("--warmup", type=float, help="epochs, at most a tenth of all (default: 2, without ScienceQA 0.2)")
    how.add_argument("--batch-size", type=at_least(1), default=32, help="samples of one optimizer step (default: 32)")
    how.add_argument("--micro-batch", type=at_least(1), default=4, help="samples of one forward pass, at most (default: 4)")
    how.add_argument("--lr", type=float, help="peak learning rate (default: 9e-3 · batch size / 256)")
    how.add_argument("--tau", type=float, default=10.0, help="temperature of the routers: 10 for 7B, 5 for 13B")
    how.add_argument("--dropout", type=float, default=0.1, help="in the adapters (default: 0.1)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--adapters", choices=["all", "llama", "none"], default="all",
                     help="leave them out of the ViT, or everywhere: only the projector learns then")
    how.add_argument("--no-routing", dest="routing", action="store_false", help="mix both experts half and half")
    how.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pth")
    how.add_argument("--max-steps", type=at_least(1), help="stop after so many steps; --epochs sets the schedule")
    how.add_argument("--save-every", type=at_least(1), help="steps between checkpoints (default: one after each epoch)")
    how.add_argument("--eval-limit", type=at_least(0), help="problems of val scored at the end (default: all)")
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    speed.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of the frozen weights")
    speed.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks (default: on a GPU)")
    speed.add_argument("--checkpointing", action="store_true", help="recompute activations, to save memory")
    speed.add_argument("--bits", type=int, choices=[16, 8, 4], default=16, help="that hold a number of LLaMA's matrices")
    speed.add_argument("--fsdp", action="store_true", help="under torchrun: cut LLaMA's matrices into a part for each GPU")
    speed.add_argument("--dry-run", action="store_true", help="try the longest batch, print memory and hours, and end")
    speed.add_argument("--workers", type=at_least(0), default=data.default_workers(), help="that decode pictures")
    return parser


def parse_args():
    """The arguments, and the checkpoint to resume from or None: what it remembers is said by default."""
    parser, resumed = make_parser(), None
    args = parser.parse_args()
    if args.resume:
        path = Path(args.out, "checkpoint.pth")
        if not path.is_file():
            raise LavinError(f"--resume: there is no {path} to go on from; leave --resume out to start")
        resumed = read_checkpoint(path)
        kinds = {"config": dict, "step": int, "optimizer": dict, "scaler": dict}
        if not isinstance(resumed, dict) or not all(isinstance(resumed.get(name), kind) for name, kind in kinds.items()):
            raise LavinError(f"--resume: {path} was not written by train.py")
        if isinstance(resumed["config"].get("data"), str):              # before there were several
            resumed["config"]["data"] = [resumed["config"]["data"]]
        once = ("out", "adapter", "resume", "max_steps", "device", "compile", "fsdp", "dry_run")
        parser.set_defaults(**{name: value for name, value in resumed["config"].items() if name not in once})
        args = parser.parse_args()
    elif tiny.is_meant(args):
        parser.set_defaults(**tiny.DEFAULTS)
        args = parser.parse_args()
    has_sqa = "sqa" in args.data
    args.lr = 9e-3 * args.batch_size / 256 if args.lr is None else args.lr
    args.epochs = args.epochs or (20 if has_sqa else 15)
    args.warmup = (2 if has_sqa else 0.2) if args.warmup is None else args.warmup
    if not 0 <= args.dropout < 1 or not 0 < args.tau < math.inf or not 0 < args.lr < math.inf:
        parser.error("--dropout is at least 0 and below 1, --tau and --lr are above 0")
    if not 0 <= args.val_fraction < 1 or not 0 <= args.warmup < math.inf:
        parser.error("--val-fraction is at least 0 and below 1, --warmup at least 0")
    if len(set(args.data)) < len(args.data):
        parser.error("--data names a source twice; --weights gives it a larger share")
    if args.weights and (len(args.weights) != len(args.data) or not all(0 < w < math.inf for w in args.weights)):
        parser.error("--weights: give one above 0 for each source of --data")
    if args.fsdp and (args.bits < 16 or "RANK" not in os.environ):
        parser.error("--fsdp goes with torchrun (torchrun --nproc-per-node 8 train.py …) and with --bits 16")
    for name in FIXED if resumed else ():
        now = getattr(args, name)
        before = resumed["config"].get(name, now if name == "warmup" else parser.get_default(name))
        if before != now:
            raise LavinError(f"--resume: {path} was trained with {name} {before}, not {now}; leave the flag out")
    return args, resumed


def read_data(args):
    """args.data -> {source: [Sample]}. LavinError for rows that cannot be used, unless --skip-bad leaves them out."""
    sources = {}
    for source in args.data:
        if source == "sqa":
            _, sources[source] = data.load_sqa(args.data_root, "train", args.format, args.captions)
            continue
        sources[source], bad = instructions.read(source, args.multi_turn, look=args.skip_bad)
        if bad and not args.skip_bad:
            raise LavinError(f"{bad[0]} ({len(bad)} bad row(s) in all: python data.py check {source} lists them, --skip-bad "
                             "leaves them out)")
        if bad:
            print(f"skipped  {len(bad)} bad rows of {source}, the first of them {bad[0]}")
        if not sources[source]:
            raise LavinError(f"--data {source}: holds no sample")
    return sources


def load_samples(lavin, sources, args):
    """{source: [Sample]} -> ({source: [Encoded]} to train on, the same held out), tokenized once.

    Those whose answer is cut off entirely are counted and left out.
    """
    trained, held = {}, {}
    for number, (source, samples) in enumerate(sources.items()):
        with ranks.first():
            encoded = data.encode_all(samples, lavin.tokenizer, lavin.n_features, lavin.max_seq_len,
                                      None if args.dry_run else args.out)
        kept = [e for e in encoded if (e.labels != 0).any()]
        pictures = sum(e.image is not None for e in kept)
        print(f"data     {f'{source}: ' if len(sources) > 1 else ''}{len(kept)} samples, {pictures} with a picture, "
              f"{sum(len(e.tokens) for e in kept):,} tokens; left out, their answer being cut off entirely: "
              f"{len(encoded) - len(kept)}")
        n_held = round(args.val_fraction * len(kept))
        generator = torch.Generator().manual_seed(data.mixed_seed(args.seed, number))
        order = torch.randperm(len(kept), generator=generator).tolist() if n_held else range(len(kept))
        held[source], trained[source] = [kept[i] for i in order[:n_held]], [kept[i] for i in order[n_held:]]
        if not kept:
            raise LavinError(f"--max-seq-len {args.max_seq_len} cuts off the answer of every sample of {source}; raise it")
        if not trained[source]:
            raise LavinError(f"--val-fraction {args.val_fraction} holds out all of {source}; lower it")
    return trained, {source: encoded for source, encoded in held.items() if encoded}


@torch.no_grad()
def held_out_losses(lavin, held, args):
    """{source: mean loss of the answer tokens that were held out of it}."""
    losses = {}
    lavin.eval()
    for source, encoded in held.items():
        chosen = [range(i, min(i + args.micro_batch, len(encoded))) for i in range(0, len(encoded), args.micro_batch)]
        plan = [chosen[i:i + ranks.count()] for i in range(0, len(chosen), ranks.count())]      # one for every rank
        dataset = data.Collated(encoded, plan.__getitem__, lavin.resolution, ranks.rank(), ranks.count())
        loss, n_answer = torch.zeros((), dtype=torch.float64, device=lavin.device), 0
        for (batch,) in data.ahead(dataset, range(len(plan)), args.workers):
            loss += lavin(batch.to(lavin.device)) * batch.n_answer
            n_answer += batch.n_answer
        loss, n_answer = ranks.total(torch.stack([loss, torch.full_like(loss, n_answer)])).tolist()
        losses[source] = loss / n_answer
    lavin.train()
    return losses


def draw_losses(out):
    """OUT/loss.png from OUT/metrics.jsonl: the loss of every step, and its mean over a fiftieth of the run."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    steps, losses = [line["step"] for line in lines if "loss" in line], [line["loss"] for line in lines if "loss" in line]
    if not losses:                                      # the log of a finished run was deleted
        return
    n = max(1, len(losses) // 50)
    means = [sum(last) / len(last) for last in (losses[max(0, i - n):i + 1] for i in range(len(losses)))]
    plot.lines(Path(out, "loss.png"), f"Loss of {out}", "step", steps, {"loss": losses, f"mean of {n + 1}": means})


def open_metrics(out, start):
    """OUT/metrics.jsonl, for further lines: a resumed run's without the steps that it will do again.

    A new run in the place of an older one renames what that left to *.old.
    """
    def is_done(line):
        try:
            return json.loads(line)["step"] <= start
        except (ValueError, TypeError, KeyError):       # half a line: the machine went down
            return False

    path, lines = Path(out, "metrics.jsonl"), []
    if start and path.is_file():
        lines = [line for line in path.read_text(errors="replace").splitlines() if is_done(line)]
    elif not start:
        for old in (Path(out, "checkpoint.pth"), path):
            if old.exists():
                print(f"note     {old} of an earlier run is now {old}.old; --resume would have gone on with it")
                old.replace(f"{old}.old")
    write_atomically(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in lines)))
    return open(path, "a", buffering=1)


def train(lavin, sources, held, optimizer, scaler, start, n_steps, steps_per_epoch, args):
    """The loop: learning rate, step, log, save; until n_steps are done, or a signal asks to stop."""
    signals = []

    def finish_the_step(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)           # a second one ends the run at once

    before = {number: signal.signal(number, finish_the_step) for number in (signal.SIGINT, signal.SIGTERM)}
    encoded = [e for of_source in sources.values() for e in of_source]
    plan = functools.partial(data.global_batch, lengths=[len(e.tokens) for e in encoded], batch_size=args.batch_size,
                             micro_batch=args.micro_batch, seed=args.seed, weights=args.weights,
                             sizes=[len(of_source) for of_source in sources.values()])
    dataset = data.Collated(encoded, plan, lavin.resolution, ranks.rank(), ranks.count())
    loader = data.ahead(dataset, range(start, n_steps), args.workers)
    gradients, signalled = gradient_buffer(lavin), 0
    lavin.train()
    began = time.perf_counter()
    bar = tqdm(total=n_steps, initial=start, unit="step", file=sys.stdout)
    with open(os.devnull, "w") if ranks.rank() else open_metrics(args.out, start) as metrics, bar:
        for step, micro_batches in enumerate(loader, start + 1):
            lr = learning_rate(step - 1, steps_per_epoch, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(data.mixed_seed(args.seed + 7919 * ranks.rank(), step))
            try:
                loss, norm = train_step(lavin, optimizer, scaler, gradients, micro_batches)
            except LavinError as error:
                raise LavinError(f"step {step}: {error}; stopped, no checkpoint written") from error
            mine = [loss, sum(batch.n_answer > 0 and len(batch.ids) for batch in micro_batches), len(signals)]
            loss, n_samples, signalled = ranks.total(torch.tensor(mine, dtype=torch.float64, device=lavin.device)).tolist()
            seconds, began = time.perf_counter() - began, time.perf_counter()
            speed = n_samples / seconds
            line = {"step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": lr, "samples_per_s": speed,
                    "grad_norm": norm if math.isfinite(norm) else None}
            metrics.write(json.dumps(line) + "\n")
            gpu = lavin.device.type == "cuda"
            memory = f" {torch.cuda.max_memory_allocated(lavin.device) / 1e9:.1f} GB" if gpu else ""
            bar.set_description(f"epoch {(step - 1) // steps_per_epoch + 1}/{args.epochs}", refresh=False)
            bar.set_postfix_str(f"loss {loss:.3f} {speed:.1f} samples/s{memory}", refresh=False)
            bar.update()
            every = args.save_every or steps_per_epoch
            if held and (step == n_steps or step % steps_per_epoch == 0):
                losses = held_out_losses(lavin, held, args)
                metrics.write(json.dumps({"step": step, "held_out": losses}) + "\n")
                bar.write("held out " + " · ".join(f"{source} {loss:.3f}" for source, loss in losses.items()), file=sys.stdout)
            if signalled or step == n_steps or step % steps_per_epoch == 0 or step % every == 0:
                if not ranks.rank():
                    save(lavin, optimizer, scaler, step, steps_per_epoch, args)
            if signalled:
                break
    for number, handler in before.items():
        signal.signal(number, handler)
    if not ranks.rank():
        draw_losses(args.out)
    if signalled:
        print(f"stopped after step {step}; saved. --resume goes on from here")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])


def dry_run(lavin, encoded, optimizer, scaler, n_steps, args):
    """Steps on the longest samples, then on usual ones; print the memory that it took and how long a run would."""
    longest = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].tokens), encoded[i].image is None))
    longest = longest[:args.batch_size]

    def plan(step):
        among = range(len(encoded)) if step else longest
        chosen = data.global_batch(step, [len(encoded[i].tokens) for i in among], args.batch_size, args.micro_batch, args.seed)
        return [[among[i] for i in indices] for indices in chosen]

    gradients, seconds = gradient_buffer(lavin), []
    lavin.train()
    dataset = data.Collated(encoded, plan, lavin.resolution, ranks.rank(), ranks.count())
    for micro_batches in data.ahead(dataset, range(min(4, n_steps)), args.workers):
        began = time.perf_counter()
        train_step(lavin, optimizer, scaler, gradients, micro_batches)      # at a learning rate of 0
        seconds.append(time.perf_counter() - began)
    gpu = lavin.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(lavin.device) if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"dry run  peak memory {peak / 1e9:.2f} GB, with samples of up to {len(encoded[longest[0]].tokens)} tokens\n"
          f"         {n_steps} steps of about {min(seconds):.2f} s: {n_steps * min(seconds) / 3600:.2f} h; nothing was written")


def compile_blocks(lavin):
    """Block by block, for any length: a few graphs serve all of them. Attention is left out, sample by sample as it goes."""
    for block in lavin.llama.layers:
        block.attention.attend_packed = torch.compiler.disable(attend_packed)
    for block in [*lavin.llama.layers, *lavin.vit.resblocks]:
        block.compile(dynamic=True)


def build(args, resumed, device):
    """-> LaVIN, its optimizer and scaler, at the step at which they are to go on."""
    torch.manual_seed(data.mixed_seed(args.seed, 0))
    path = Path(args.out, "checkpoint.pth")
    lavin = LaVIN.load(args.llama, args.vit, path if resumed else args.adapter, device=device, dtype=DTYPES[args.dtype],
                       max_seq_len=args.max_seq_len, tau=args.tau, dropout=args.dropout, bits=args.bits, fsdp=args.fsdp,
                       delta=args.delta)
    if lavin.llama.config.attention_bias:
        raise LavinError(f"{args.llama}: adapters are folded into it; train on the LLaMA that it was made from")
    freeze(lavin, args)
    optimizer, scaler = make_optimizer(lavin), torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    if resumed:
        try:
            optimizer.load_state_dict(resumed["optimizer"])
            scaler.load_state_dict(resumed["scaler"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise LavinError(f"--resume: {path} holds no optimizer of this model ({error})") from error
    lavin.llama.checkpointing = lavin.vit.checkpointing = args.checkpointing
    if args.compile:
        compile_blocks(lavin)
    if device.type == "cpu":
        keep_freed_memory()
    return lavin, optimizer, scaler


def tune(args, resumed, device, sources, val):
    """Load, train, score; val: (problems, samples) of ScienceQA's split."""
    lavin, optimizer, scaler = build(args, resumed, device)
    sources, held = load_samples(lavin, sources, args)
    n_samples, path = sum(map(len, sources.values())), Path(args.out, "checkpoint.pth")
    if resumed and resumed["config"].get("n_samples") != n_samples:
        raise LavinError(f"--resume: {path} knows {resumed['config'].get('n_samples')} samples, not {n_samples}")
    args.n_samples = n_samples
    steps_per_epoch = math.ceil(n_samples / args.batch_size)
    n_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    describe(lavin, args, args.epochs * steps_per_epoch, steps_per_epoch)
    if args.dry_run:
        return dry_run(lavin, [e for of_source in sources.values() for e in of_source], optimizer, scaler, n_steps, args)
    train(lavin, sources, held, optimizer, scaler, resumed["step"] if resumed else 0, n_steps, steps_per_epoch, args)
    print(f"saved    {path}")
    if args.compile:
        print(f"compile  {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs in the whole run")
    ranks.leave()
    if ranks.rank() or not val[1]:
        return
    if args.fsdp:
        return print("scoring  needs the model in one piece: python generate.py --data sqa --split val")
    print(f"scoring  {len(val[1])} problems of the val split")
    with torch.compiler.set_stance("force_eager"):
        predictions, _ = score(lavin.eval(), *val, args.format, workers=args.workers)
    scores = {name: None if math.isnan(s) else s for name, s in data.sqa_scores(val[0], predictions).items()}
    with open(Path(args.out, "metrics.jsonl"), "a") as metrics:
        metrics.write(json.dumps({"step": n_steps, "split": "val", **scores}) + "\n")


def smaller(args):
    """The flags that would make a run smaller which does not fit the memory."""
    ways = {f"--micro-batch {max(1, args.micro_batch // 2)}": args.micro_batch > 1, "--checkpointing": not args.checkpointing,
            "--bits 8": args.bits == 16 and not args.fsdp, "--bits 4": args.bits > 4 and not args.fsdp,
            "--fsdp": ranks.count() > 1 and args.bits == 16 and not args.fsdp, "a lower --max-seq-len": True}
    return ", ".join(way for way, is_left in ways.items() if is_left)


def main():
    args, resumed = parse_args()
    remembered = resumed["config"] if resumed else {}
    device, args.dtype = pick_device(args.device, args.dtype)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    check_compiler(args.compile, device)
    ranks.join(device)
    with ranks.first():
        tiny.prepare(args, remembered)
    choose_paths(args, remembered)
    args.llama, args.vit, args.data_root = (os.path.abspath(path) for path in (args.llama, args.vit, args.data_root))
    sources, val = read_data(args), ({}, [])
    if args.eval_limit != 0 and "sqa" in args.data:
        problems, val_samples = data.load_sqa(args.data_root, "val", args.format, args.captions)
        val = problems, val_samples[:args.eval_limit]
    if not args.dry_run:
        check_writable(Path(args.out, "checkpoint.pth"), "--out")
    try:
        tune(args, resumed, device, sources, val)
    except torch.OutOfMemoryError as error:
        raise LavinError(f"{device} has too little memory for this; what would help: {smaller(args)}") from error


if __name__ == "__main__":
    run(main)
