"""Train LaVIN's adapters, routers, projector and modality embedding; LLaMA and CLIP stay frozen.

    python train.py --data sqa

One optimizer step is one global batch, however it is cut into micro-batches: its loss is the sum over all
answer tokens, divided by their number. Mixed precision by hand: frozen weights are kept in bf16 or fp16 and
the trained ones in fp32; LaVIN's methods autocast where they meet; fp16 scales its loss.
A run is a function of its settings and the step number alone: the permutation of an epoch and the dropout of a
step are drawn from (seed, epoch) and (seed, step), so a resumed run does what the unbroken one would have done.
"""

import argparse
import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import adapters
import data
import plot
import tiny
from files import (DTYPES, LavinError, at_least, check_writable, choose_paths, pick_device, read_checkpoint, run,
                   write_atomically)
from generate import score
from model import LaVIN
from router import Router

# What makes a run what it is: --resume refuses to change these.
FIXED = ("data", "format", "captions", "epochs", "batch_size", "lr", "tau", "dropout", "max_seq_len", "seed", "dtype",
         "adapters", "routing")


def learning_rate(step, steps_per_epoch, args):
    """Linear from 0 over the first 2 epochs (a tenth of a run under 20), then half a cosine down to 0."""
    epoch, warmup = step / steps_per_epoch, min(2, args.epochs / 10)
    if epoch < warmup:
        return args.lr * epoch / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))


def make_optimizer(lavin):
    """AdamW over what is trained; weight decay on matrices, none on biases."""
    trained = [(name, p) for name, p in lavin.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in trained if name.endswith("bias") != matrices], "weight_decay": decay}
              for matrices, decay in ((True, 0.02), (False, 0.0))]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


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


def train_step(lavin, optimizer, scaler, micro_batches):
    """One optimizer step on one global batch -> (loss, norm of the gradient). LavinError where either is not finite."""
    n_answer = sum(batch.n_answer for batch in micro_batches)
    losses = []
    for batch in micro_batches:
        loss = lavin(batch.to(lavin.device)) * (batch.n_answer / n_answer)
        scaler.scale(loss).backward()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()
    for value, batch in zip(values, micro_batches):
        if not math.isfinite(value):
            raise LavinError(f"the loss is {value} on the samples {', '.join(batch.ids)}")
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in lavin.parameters() if p.grad is not None]).item()
    # fp16 skips such a step and halves its scale, which ends only where the gradient fits.
    if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
        raise LavinError(f"the gradient is {norm} on the samples {', '.join(i for b in micro_batches for i in b.ids)}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return sum(values), norm


def save(lavin, optimizer, scaler, step, steps_per_epoch, args):
    """OUT/checkpoint.pth after `step` steps: the official layout, and beside it what --resume and generate.py need."""
    checkpoint = adapters.official_checkpoint(lavin, args.format) | {
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "epoch": (step - 1) // steps_per_epoch,
        "step": step, "config": vars(args)}
    write_atomically(Path(args.out, "checkpoint.pth"), lambda path: torch.save(checkpoint, path))


def describe(lavin, args, n_steps, steps_per_epoch):
    """Say once what follows from the settings."""
    parts = {"LLaMA": lavin.llama, "ViT": lavin.vit, "projector": lavin.projector}
    for kind, trained in (("trained", True), ("frozen", False)):
        counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad == trained)
                  for name, part in parts.items()}
        if trained:
            counts = {"adapters and routers in LLaMA": counts.pop("LLaMA"), "in the ViT": counts.pop("ViT"), **counts,
                      "modality embedding": lavin.modality_embedding.numel()}
        shown = " · ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        print(f"{kind:8} {sum(counts.values()):,} parameters: {shown}")
    micro_batch = min(args.micro_batch, args.batch_size)
    print(f"batch    {args.batch_size} in micro-batches of {micro_batch} · context {args.max_seq_len} tokens")
    print(f"steps    {n_steps} = {args.epochs} epochs × {steps_per_epoch} · peak lr {args.lr:.3g} · τ {args.tau:g}"
          + (f" · stops after {args.max_steps}" if args.max_steps else ""))
    print(f"device   {lavin.device} · {args.dtype} · compile {'on' if args.compile else 'off'}")


def parse_args():
    """The arguments, and the checkpoint to resume from or None: what it remembers is said by default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_argument_group("data and weights")
    what.add_argument("--data", choices=["sqa"], default="sqa", help="ScienceQA")
    what.add_argument("--data-root", help="directory of the data (default: data/scienceqa)")
    what.add_argument("--format", default="QCM-ALE", help="of ScienceQA's prompts: what is asked - what is answered")
    what.add_argument("--captions", action="store_true", help="put captions.json's caption into the context")
    what.add_argument("--max-seq-len", type=at_least(1), default=512, help="context in tokens; longer samples are cut")
    what.add_argument("--llama", help="directory of LLaMA in Meta's layout (default: weights/7B)")
    what.add_argument("--vit", help="CLIP's image encoder (default: weights/ViT-L-14.pt)")
    what.add_argument("--out", default="out", help="directory of checkpoint.pth and metrics.jsonl (default: out)")
    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=at_least(1), default=20, help="2 of 20 warm up, a tenth of fewer (default: 20)")
    how.add_argument("--batch-size", type=at_least(1), default=32, help="samples of one optimizer step (default: 32)")
    how.add_argument("--micro-batch", type=at_least(1), default=4, help="samples of one forward pass (default: 4)")
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
    speed.add_argument("--workers", type=at_least(0), default=data.default_workers(), help="that decode pictures")
    args, resumed = parser.parse_args(), None
    if args.resume:
        path = Path(args.out, "checkpoint.pth")
        if not path.is_file():
            raise LavinError(f"--resume: there is no {path} to go on from; leave --resume out to start")
        resumed = read_checkpoint(path)
        kinds = {"config": dict, "step": int, "optimizer": dict, "scaler": dict}
        if not isinstance(resumed, dict) or not all(isinstance(resumed.get(name), kind) for name, kind in kinds.items()):
            raise LavinError(f"--resume: {path} was not written by train.py")
        once = ("out", "resume", "max_steps", "device", "compile")
        parser.set_defaults(**{name: value for name, value in resumed["config"].items() if name not in once})
        args = parser.parse_args()
    elif tiny.is_meant(args):
        parser.set_defaults(**tiny.DEFAULTS)
        args = parser.parse_args()
    if args.lr is None:
        args.lr = 9e-3 * args.batch_size / 256
    if not 0 <= args.dropout < 1 or not 0 < args.tau < math.inf or not 0 < args.lr < math.inf:
        parser.error("--dropout is at least 0 and below 1, --tau and --lr are above 0")
    for name in FIXED if resumed else ():
        before, now = resumed["config"].get(name, parser.get_default(name)), getattr(args, name)
        if before != now:
            raise LavinError(f"--resume: {path} was trained with {name} {before}, not {now}; leave the flag out")
    return args, resumed


def load_samples(lavin, samples, args):
    """[Sample] -> [Encoded], tokenized once; those whose answer is cut off entirely are counted and left out."""
    encoded = [lavin.encode(sample) for sample in samples]
    kept = [e for e in encoded if (e.labels != 0).any()]
    pictures = sum(e.image is not None for e in kept)
    print(f"data     {len(kept)} samples, {pictures} with a picture, {sum(len(e.tokens) for e in kept):,} tokens; "
          f"left out, their answer being cut off entirely: {len(encoded) - len(kept)}")
    if not kept:
        raise LavinError(f"--max-seq-len {args.max_seq_len} cuts off the answer of every sample; raise it")
    return kept


def draw_losses(out):
    """OUT/loss.png from OUT/metrics.jsonl: the loss of every step, and its mean over a fiftieth of the run."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    steps, losses = zip(*[(line["step"], line["loss"]) for line in lines if "loss" in line])
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


def train(lavin, encoded, optimizer, scaler, start, n_steps, steps_per_epoch, args):
    """The loop: learning rate, step, log, save; until n_steps are done, or a signal asks to stop."""
    signals = []

    def finish_the_step(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)           # a second one ends the run at once

    usual = {number: signal.signal(number, finish_the_step) for number in (signal.SIGINT, signal.SIGTERM)}
    plan = functools.partial(data.global_batch, lengths=[len(e.tokens) for e in encoded], batch_size=args.batch_size,
                             micro_batch=args.micro_batch, seed=args.seed)
    loader = data.ahead(data.Collated(encoded, plan, lavin.resolution), range(start, n_steps), args.workers)
    lavin.train()
    began = time.perf_counter()
    bar = tqdm(total=n_steps, initial=start, unit="step", file=sys.stdout)
    with open_metrics(args.out, start) as metrics, bar:
        for step, micro_batches in enumerate(loader, start + 1):
            lr = learning_rate(step - 1, steps_per_epoch, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(data.mixed_seed(args.seed, step))
            try:
                loss, norm = train_step(lavin, optimizer, scaler, micro_batches)
            except LavinError as error:
                raise LavinError(f"step {step}: {error}; stopped, no checkpoint written; try a lower --lr") from error
            seconds, began = time.perf_counter() - began, time.perf_counter()
            speed = sum(len(batch.ids) for batch in micro_batches) / seconds
            line = {"step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": lr, "samples_per_s": speed,
                    "grad_norm": norm if math.isfinite(norm) else None}
            metrics.write(json.dumps(line) + "\n")
            gpu = lavin.device.type == "cuda"
            memory = f" {torch.cuda.max_memory_allocated(lavin.device) / 1e9:.1f} GB" if gpu else ""
            bar.set_description(f"epoch {(step - 1) // steps_per_epoch + 1}/{args.epochs}", refresh=False)
            bar.set_postfix_str(f"loss {loss:.3f} {speed:.1f} samples/s{memory}", refresh=False)
            bar.update()
            every = args.save_every or steps_per_epoch
            if signals or step == n_steps or step % steps_per_epoch == 0 or step % every == 0:
                save(lavin, optimizer, scaler, step, steps_per_epoch, args)
            if signals:
                break
    draw_losses(args.out)
    for number, handler in usual.items():
        signal.signal(number, handler)
    if signals:
        print(f"stopped after step {step}; saved. --resume goes on from here")
        sys.exit(128 + signals[0])


def main():
    args, resumed = parse_args()
    remembered = resumed["config"] if resumed else {}
    tiny.prepare(args, remembered)
    choose_paths(args, remembered)
    args.llama, args.vit, args.data_root = (os.path.abspath(path) for path in (args.llama, args.vit, args.data_root))
    _, samples = data.load_sqa(args.data_root, "train", args.format, args.captions)
    if args.eval_limit != 0:
        problems, val_samples = data.load_sqa(args.data_root, "val", args.format, args.captions)
        val_samples = val_samples[:args.eval_limit]
    path = Path(args.out, "checkpoint.pth")
    check_writable(path, "--out")
    device, args.dtype = pick_device(args.device, args.dtype)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    torch.manual_seed(data.mixed_seed(args.seed, 0))
    lavin = LaVIN.load(args.llama, args.vit, path if resumed else None, device=device, dtype=DTYPES[args.dtype],
                       max_seq_len=args.max_seq_len, tau=args.tau, dropout=args.dropout)
    freeze(lavin, args)
    encoded = load_samples(lavin, samples, args)
    args.n_samples = len(encoded)
    optimizer, start = make_optimizer(lavin), 0
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    if resumed:
        if resumed["config"].get("n_samples") != len(encoded):
            raise LavinError(f"--resume: {path} knows {resumed['config'].get('n_samples')} samples, not {len(encoded)}")
        try:
            optimizer.load_state_dict(resumed["optimizer"])
            scaler.load_state_dict(resumed["scaler"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise LavinError(f"--resume: {path} holds no optimizer of this model ({error})") from error
        start = resumed["step"]
    steps_per_epoch = math.ceil(len(encoded) / args.batch_size)
    n_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    describe(lavin, args, args.epochs * steps_per_epoch, steps_per_epoch)
    lavin.llama.checkpointing = lavin.vit.checkpointing = args.checkpointing
    if args.compile:
        for block in [*lavin.llama.layers, *lavin.vit.resblocks]:
            block.compile(dynamic=True)
    train(lavin, encoded, optimizer, scaler, start, n_steps, steps_per_epoch, args)
    print(f"saved    {path}")
    if args.eval_limit != 0:
        print(f"scoring  {len(val_samples)} problems of the val split")
        with torch.compiler.set_stance("force_eager"):
            predictions, _ = score(lavin.eval(), problems, val_samples, args.format, workers=args.workers)
        scores = {name: None if math.isnan(s) else s for name, s in data.sqa_scores(problems, predictions).items()}
        with open(Path(args.out, "metrics.jsonl"), "a") as metrics:
            metrics.write(json.dumps({"step": n_steps, "split": "val", **scores}) + "\n")


if __name__ == "__main__":
    run(main)
