"""How fast training and generation are, and what they take. Random weights of a named shape, lengths as ScienceQA's.

    python tests/bench.py train                     every row of README's table that this machine can measure
    python tests/bench.py train --shape 7B --bits 4 --checkpointing --micro-batch 4          one row
    python tests/bench.py generate                  the same for generation

train prints samples and tokens a second, the share of the machine's own matrix rate that the model's arithmetic reached
(counted from shapes, real tokens alone; the rate measured in the same run), peak memory, the hours of 20 epochs of
ScienceQA, the share of the step that the adapters take, and with --pictures what decoding real files costs.
generate prints tokens a second at batch 1, and the share of what the memory allows, each token taking all weights once;
the time to the first token, folded against plain LLaMA, ScienceQA's test split (--sqa) and Hugging Face's generate (--hf).
"""

import argparse
import functools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import hf  # noqa: E402
import quantize  # noqa: E402
import train  # noqa: E402
from adapters import AdapterConfig  # noqa: E402
from decode import Decoder, continued, pick  # noqa: E402
from files import DTYPES, pick_device, run  # noqa: E402
from model import LaVIN, LLaMAConfig, allocate  # noqa: E402
from vit import ViTConfig  # noqa: E402

SHAPES = {"7B": (LLaMAConfig(), ViTConfig()),
          "13B": (LLaMAConfig(dim=5120, n_layers=40, n_heads=40), ViTConfig()),
          "mid": (LLaMAConfig(dim=512, n_layers=8, n_heads=8), ViTConfig(width=512, layers=12))}
# Tokens of prompt and answer, and whether there is a picture: 48 quantiles of ScienceQA's training split by length.
PROBLEMS = [
    (41, 16, 1), (52, 9, 0), (46, 21, 1), (61, 52, 0), (42, 108, 0), (44, 118, 1), (43, 134, 1), (43, 145, 1), (45, 150, 1),
    (81, 118, 0), (45, 158, 0), (38, 171, 0), (39, 177, 1), (68, 155, 0), (58, 170, 0), (67, 168, 1), (61, 180, 0), (45, 201, 1),
    (41, 211, 0), (45, 213, 1), (39, 224, 1), (101, 166, 0), (64, 207, 0), (52, 222, 0), (65, 213, 0), (51, 230, 0), (58, 227, 0),
    (110, 182, 1), (101, 196, 1), (39, 272, 1), (112, 206, 1), (68, 260, 1), (74, 266, 1), (124, 226, 1), (91, 269, 1),
    (112, 259, 1), (62, 322, 1), (124, 280, 1), (79, 340, 0), (61, 372, 0), (82, 368, 0), (107, 355, 0), (187, 290, 0),
    (262, 232, 1), (75, 437, 0), (127, 404, 0), (69, 501, 0), (82, 525, 0)]
STEPS_OF_A_RUN, BATCH = 20 * 398, 32        # 20 epochs of 12,726 samples
ROWS = {"train": {"cuda": [["--shape", "7B", "--micro-batch", "8", "--pictures", "--share"],
                 ["--shape", "7B", "--micro-batch", "4"],
                 ["--shape", "7B", "--micro-batch", "32", "--checkpointing"],
                 ["--shape", "13B", "--micro-batch", "8"],
                 ["--shape", "7B", "--micro-batch", "4", "--checkpointing", "--bits", "4"],
                 ["--shape", "13B", "--micro-batch", "4", "--checkpointing", "--bits", "4"]],
        "cpu": [["--shape", "mid", "--dtype", "fp32", "--compile", "--micro-batch", "16", "--steps", "5", "--share"],
                ["--shape", "mid", "--dtype", "bf16", "--compile", "--micro-batch", "16", "--steps", "5"]]},
        "generate": {
        "cuda": [["--shape", "7B", "--compile", "--sqa"], ["--shape", "7B", "--compile", "--bits", "8"],
                 ["--shape", "7B", "--compile", "--bits", "4"]],
        "cpu": [["--shape", "mid", "--dtype", "fp32", "--compile", "--hf"],
                ["--shape", "mid", "--dtype", "bf16", "--compile", "--hf"]]}}


class Tokenizer:
    """Stands in for sentencepiece where no text is read."""

    def encode(self, text):
        return [1, 2, 3]

    def eos_id(self):
        return -1


def build(shape, device, dtype, bits):
    """LaVIN with random weights, block by block as when it is loaded."""
    llama, vit = SHAPES[shape]
    with torch.device("meta"):
        lavin = LaVIN(llama, vit, AdapterConfig(), Tokenizer(), 512)
    for block in [None, *lavin.llama.layers]:
        outside = [m for name, m in lavin.named_modules() if not name.startswith("llama.layers.")]
        allocate(outside if block is None else block.modules(), device, dtype)
        for p in (block or lavin).parameters():
            if p.device.type != "meta" and not p.requires_grad:
                torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
        if block is not None and bits < 16:
            quantize.pack(block, bits)
    lavin.init_trained()
    return lavin.train()


def problems(lavin, pictures=None):
    """Encoded samples of PROBLEMS' lengths, each twice: three global batches of 32. pictures: files to decode, else white."""
    white = Image.new("RGB", (lavin.resolution, lavin.resolution), "white")
    encoded = []
    for i, (prompt, answer, pictured) in enumerate(PROBLEMS):
        n_prompt = 1 + 3 + prompt + (lavin.n_features if pictured else 0)
        tokens = np.random.default_rng(i).integers(10, 30000, n_prompt + answer + 1).astype(np.int32)[:511]
        labels = np.where(np.arange(len(tokens)) < n_prompt, 0, tokens)
        image = (pictures[i % len(pictures)] if pictures else white) if pictured else None
        encoded.append(data.Encoded(tokens, labels, image, str(i)))
    return encoded * 2


def flops(lavin, batches):
    """Of one step on these micro-batches: twice the numbers of every matrix a token, forward, and back to the input;
    three times for what is trained; attention, halved where it is causal, forward and twice back."""
    llama, vit = lavin.llama.config, lavin.vit
    C, per_layer = llama.dim, sum(linear.in_features * linear.out_features for module in (
        lavin.llama.layers[0].attention, lavin.llama.layers[0].feed_forward) for linear in module.children())
    V, vit_tokens, count = vit.class_embedding.numel(), len(vit.positional_embedding), 0
    for batch in batches:
        for T in batch.lengths:
            count += llama.n_layers * (4 * per_layer * T + 6 * 2 * C * 8 * T + 6 * T * T * C)
        count += 4 * C * llama.vocab_size * batch.n_answer
        count += len(batch.pixels) * vit_tokens * len(vit.resblocks) * (4 * 12 * V * V + 6 * 2 * V * 8 + 12 * vit_tokens * V)
    return count


def matrix_rate(device, dtype):
    """FLOP/s of a large product of matrices: the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b, best = *(torch.randn(n, n, device=device).to(dtype) for _ in range(2)), 0.0
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(lavin, loads, n, between=lambda: None):
    """Median seconds of n steps, after three that warm up (compilation is among them); between is called between them."""
    optimizer, scaler = train.make_optimizer(lavin), torch.amp.GradScaler(lavin.device.type, enabled=False)
    gradients, seconds = train.gradient_buffer(lavin), []
    began = time.perf_counter()
    for i, batches in enumerate(loads):
        train.train_step(lavin, optimizer, scaler, gradients, batches)
        synchronize(lavin.device)
        seconds.append(time.perf_counter() - began)
        if i + 1 == 3 + n:
            return statistics.median(seconds[3:])
        between()
        began = time.perf_counter()


def without_adapters(lavin):
    """The same step, adapters replaced by the identity; a factor of 1 keeps the way back to the first block open."""
    one = torch.nn.Parameter(torch.ones((), device=lavin.device))
    for block in [*lavin.llama.layers, *lavin.vit.resblocks]:
        block.adapter.forward = lambda y, w: y
    lavin.llama.layers[0].adapter.forward = lambda y, w: y + 0 * w.sum()        # so that there is a way to the router
    lavin.vit.conv1.register_forward_hook(lambda module, inputs, y: y * one)
    lavin.llama.tok_embeddings.register_forward_hook(lambda module, inputs, y: (y * one).type_as(y))


def measure(args):
    torch.manual_seed(0)
    device, dtype = pick_device(args.device, args.dtype)
    lavin = build(args.shape, device, DTYPES[dtype], args.bits)
    lavin.llama.checkpointing = lavin.vit.checkpointing = args.checkpointing
    if device.type == "cpu":
        train.keep_freed_memory()
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    if compiled:
        train.compile_blocks(lavin)
    encoded = problems(lavin)
    plan = functools.partial(data.global_batch, lengths=[len(e.tokens) for e in encoded], batch_size=BATCH,
                             micro_batch=args.micro_batch, seed=0)
    ready = [[data.collate([encoded[i] for i in indices], lavin.resolution) for indices in plan(step)] for step in range(3)]
    loads = (ready[i % 3] for i in range(10**6))
    rates = []                                          # between the steps, as other work on the machine comes and goes
    step = time_steps(lavin, loads, args.steps, lambda: rates.append(matrix_rate(device, DTYPES[dtype])))
    rate = statistics.median(rates)
    work = statistics.mean(flops(lavin, batches) for batches in ready)
    tokens = statistics.mean(sum(len(b.tokens) for b in batches) for batches in ready)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{args.shape} {dtype} on {device}, {args.bits} bits, micro-batch {args.micro_batch}, "
          f"checkpointing {'on' if args.checkpointing else 'off'}, compile {'on' if compiled else 'off'}, torch {torch.__version__}\n"
          f"  step {step:.3f} s · {BATCH / step:.1f} samples/s · {tokens / step:.0f} tokens/s · {work / 1e12:.2f} TFLOP\n"
          f"  {work / step / 1e12:.3f} TFLOP/s = {100 * work / step / rate:.0f} % of the matrix rate {rate / 1e12:.3f}\n"
          f"  peak memory {peak / 1e9:.2f} GB · 20 epochs of ScienceQA {STEPS_OF_A_RUN * step / 3600:.2f} h", flush=True)
    if args.pictures:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, f"{i}.png") for i in range(48)]
            for file in files:                          # about the size and the detail of ScienceQA's pictures
                Image.effect_noise((480, 300), 60).convert("RGB").resize((480, 300)).save(file)
            dataset = data.Collated(problems(lavin, files), plan, lavin.resolution)
            decoded = time_steps(lavin, data.ahead(dataset, range(3 + args.steps), data.default_workers()), args.steps)
            print(f"  with pictures decoded by {data.default_workers()} workers {decoded / step:.3f} × that step")
    if args.share:
        without_adapters(lavin)
        torch._dynamo.reset()
        identity = time_steps(lavin, loads, args.steps)
        print(f"  adapters' share {100 * (step / identity - 1):.1f} % over {identity:.3f} s with the identity in their place")


def memory_rate(device):
    """Bytes a second that memory gives: the best of copying (read and written) and of summing."""
    a = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    b, best = torch.ones_like(a), 0.0
    for _ in range(8):
        for work, size in ((lambda: b.copy_(a), 2 * a.nbytes), (a.sum, a.nbytes)):
            synchronize(device)
            began = time.perf_counter()
            work()
            synchronize(device)
            best = max(best, size / (time.perf_counter() - began))
    return best


def prompt(lavin, n, pictured):
    """An Encoded of n tokens in all."""
    tokens = np.random.default_rng(n).integers(10, 30000, n).astype(np.int32)
    image = torch.zeros(3, lavin.resolution, lavin.resolution) if pictured else None
    return data.Encoded(tokens, np.zeros_like(tokens), image, str(n))


def run_greedy(decoder, batch, n):
    """n tokens behind a prompt, as chat.py decodes -> (seconds to the first, median seconds of the others, the ids)."""
    decoder.lengths.clear()
    began = time.perf_counter()
    ids, seconds = [int(pick(decoder.read(batch), 0.0, 1.0))], []
    first = time.perf_counter() - began
    for _ in range(n - 1):
        began = time.perf_counter()
        ids.append(int(pick(decoder.step(ids[-1:]), 0.0, 1.0)))
        seconds.append(time.perf_counter() - began)
    return first, statistics.median(seconds), ids


def hugging_face(llama, batch, n):
    """Median seconds a token of transformers' generate with the same weights, of three runs, and its ids; None if not installed."""
    try:
        import transformers
    except ImportError:
        return None
    c, state, names = llama.config, {}, {ours: theirs for theirs, ours in hf.LLAMA_NAMES.items()}
    for name, tensor in llama.state_dict().items():
        layer, _, ours = name.removesuffix(".weight").rpartition("layers.")[2].partition(".")
        if ".wq." in name or ".wk." in name:            # pairs (2i, 2i + 1) become (i, i + D/2)
            tensor = tensor.unflatten(0, (-1, c.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        state[f"model.layers.{layer}.{names[ours]}.weight" if ours else f"{names[layer]}.weight"] = tensor
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, rms_norm_eps=c.norm_eps))
    model.to_empty(device=batch.tokens.device).to(llama.norm.weight.dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)         # its frequencies are no part of the state
    model.load_state_dict(state)
    seconds = []
    for _ in range(3):
        times = []
        for tokens in (1, n):
            began = time.perf_counter()
            ids = model.generate(batch.tokens[None], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
            times.append(time.perf_counter() - began)
        seconds.append((times[1] - times[0]) / (n - 1))
    return statistics.median(seconds), ids[0, len(batch.tokens):].tolist()


def measure_generation(args):
    torch.manual_seed(0)
    device, dtype = pick_device(args.device, args.dtype)
    lavin = build(args.shape, device, DTYPES[dtype], args.bits).eval()
    began = time.perf_counter()
    text, picture = lavin.fold(0), lavin.fold(1)
    synchronize(device)
    print(f"{args.shape} {dtype} on {device}, {args.bits} bits, compile {'on' if args.compile else 'off'}, torch {torch.__version__}\n"
          f"  folding for two modalities {time.perf_counter() - began:.2f} s")
    N, batch = 200, data.collate([prompt(lavin, 40, False)], lavin.resolution).to(device)
    plain = lavin.fold(0)
    for block in plain.llama.layers if args.bits == 16 else ():
        for linear in (block.attention.wq, block.attention.wk, block.attention.wv):
            linear.bias = None
    decoders = {"folded": Decoder(text, 1, 512, args.compile), "plain LLaMA": Decoder(plain, 1, 512, args.compile)}
    for decoder in decoders.values():
        run_greedy(decoder, batch, 8)                   # compiles, captures
    rates, steps, tokens = [], {name: [] for name in decoders}, {}
    for _ in range(3):                                  # in turns, as other work on the machine comes and goes
        rates.append(memory_rate(device))
        for name, decoder in decoders.items():
            _, step, tokens[name] = run_greedy(decoder, batch, N)
            steps[name].append(step)
    step, rate, llama = statistics.median(steps["folded"]), statistics.median(rates), text.llama
    size = sum(t.nbytes for t in [*llama.parameters(), *llama.buffers()]) - llama.tok_embeddings.weight.nbytes
    print(f"  batch 1: {1 / step:.1f} tokens/s = {100 * size / step / rate:.0f} % of what memory allows: {size / 1e9:.3f} GB a token at "
          f"{rate / 1e9:.1f} GB/s\n  plain LLaMA without adapters {1 / statistics.median(steps['plain LLaMA']):.1f} tokens/s", flush=True)
    if args.hf and (theirs := hugging_face(plain.llama, batch, N)):
        same = sum(a == b for a, b in zip(theirs[1], tokens["plain LLaMA"]))
        print(f"  Hugging Face's generate {1 / theirs[0]:.1f} tokens/s: we are {theirs[0] / step:.2f} × as fast; {same} of {N} tokens equal")
    first = Decoder(picture, 1, 512)
    batch = data.collate([prompt(lavin, 300, True)], lavin.resolution)
    print(f"  first token of 300 with a picture after {1e3 * min(run_greedy(first, batch, 2)[0] for _ in range(5)):.0f} ms", flush=True)
    for name, n, part, new in (("stopping at the letter", 4241, 4, 5), ("64 new tokens each", 4241, 12, 64)) if args.sqa else ():
        encoded = [prompt(lavin, p + 4 + lavin.n_features * pictured, bool(pictured)) for p, _, pictured in PROBLEMS * 100][:n // part]
        began = time.perf_counter()
        for modality, model in enumerate((text, picture)):
            chosen = sorted((e for e in encoded if (e.image is not None) == modality), key=lambda e: -len(e.tokens))
            for _ in continued(model, chosen, 64, new):
                pass
        print(f"  ScienceQA's test split, {name}: {part * (time.perf_counter() - began):.0f} s ({part} times a part of {len(encoded)})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["train", "generate"])
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--bits", type=int, choices=[16, 8, 4], default=16)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--pictures", action="store_true", help="also measure with files to decode")
    parser.add_argument("--share", action="store_true", help="also measure with the identity in the adapters' place")
    parser.add_argument("--sqa", action="store_true", help="also answer ScienceQA's test split")
    parser.add_argument("--hf", action="store_true", help="also Hugging Face's generate, where transformers is installed")
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    if args.shape:
        return (measure if args.what == "train" else measure_generation)(args)
    for row in ROWS[args.what][pick_device(args.device, "auto")[0].type]:       # each in a process of its own: its own peak of memory
        if args.what == "train" and "bf16" in row and "bf16" not in Path("/proc/cpuinfo").read_text():
            print(f"{' '.join(row)}: this CPU has no bf16 instructions, and would take hours")
        else:
            subprocess.run([sys.executable, __file__, args.what, *row], check=False)


if __name__ == "__main__":
    run(main)
