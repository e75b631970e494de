"""How fast training and generation are, and how much memory they take.

    python -m bench.speed train                 every row of the table that this machine can measure
    python -m bench.speed train --shape 7B --micro-batch 4 --checkpointing --bits 4        one row
    python -m bench.speed generate              the same for generation
    python -m bench.speed experts               fast.ops.add_experts and the plain form
    python -m bench.speed attention             fast.ops.attention and PyTorch's, in bf16 on a CPU

The models have the shapes of real models and random weights. Prompts and answers are as long as
ScienceQA's.

`train` prints samples and tokens per second, peak memory, and the hours for 20 epochs of ScienceQA.
It computes the FLOPs of a step from the model's shapes. It compares the FLOP/s with those of large
matrix products, measured on the same machine between the steps. --share adds how much time the
adapters add to a step. --pictures adds the cost of decoding real files.

`generate` prints tokens per second of a single conversation. Each token reads all of LLaMA's
weights once, so the script compares the bytes read per second with the memory bandwidth. It also
prints the speed of plain LLaMA without adapters and the time to the first token. --sqa adds the
time for ScienceQA's whole test split. --hf adds the speed of Hugging Face's generate with the same
weights.
"""

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import train
from adapters import Adapter, AdapterConfig
from checkpoints import allocate, modules_outside_blocks
from extras import hf, runs
from extras.estimate import MODEL_SHAPES, flops
from extras.terminal import Parser, run
from extras.values import Kind
from fast.engine import Engine, continue_prompts
from fast.fold import NoAdapter, fold
from fast.ops import add_experts, attention, keep_freed_memory
from fast.quantize import quantize
from fast.ranks import gradient_buffer
from files import DTYPES, LavinError, pick_device
from model import LaVIN, LLaMA, pick

ROOT = Path(__file__).absolute().parent.parent
# ScienceQA's training split as 48 quantiles by length: (tokens of the prompt, tokens of the answer,
# has a picture).
PROBLEMS = [
    (41, 16, 1), (52, 9, 0), (46, 21, 1), (61, 52, 0), (42, 108, 0), (44, 118, 1), (43, 134, 1),
    (43, 145, 1), (45, 150, 1), (81, 118, 0), (45, 158, 0), (38, 171, 0), (39, 177, 1),
    (68, 155, 0), (58, 170, 0), (67, 168, 1), (61, 180, 0), (45, 201, 1), (41, 211, 0),
    (45, 213, 1), (39, 224, 1), (101, 166, 0), (64, 207, 0), (52, 222, 0), (65, 213, 0),
    (51, 230, 0), (58, 227, 0), (110, 182, 1), (101, 196, 1), (39, 272, 1), (112, 206, 1),
    (68, 260, 1), (74, 266, 1), (124, 226, 1), (91, 269, 1), (112, 259, 1), (62, 322, 1),
    (124, 280, 1), (79, 340, 0), (61, 372, 0), (82, 368, 0), (107, 355, 0), (187, 290, 0),
    (262, 232, 1), (75, 437, 0), (127, 404, 0), (69, 501, 0), (82, 525, 0)]
BATCH = 32
STEPS_OF_A_RUN = 20 * 398       # 20 epochs of 12,726 samples
WARM_UP_STEPS = 3               # not timed; the blocks compile during them
ROWS = {
    "train": {
        "cuda": [
            "--shape 7B --micro-batch 8 --pictures --share",
            "--shape 7B --micro-batch 4",
            "--shape 7B --micro-batch 32 --checkpointing",
            "--shape 13B --micro-batch 8",
            "--shape 7B --micro-batch 4 --checkpointing --bits 4",
            "--shape 13B --micro-batch 4 --checkpointing --bits 4",
        ],
        "cpu": [
            "--shape mid --dtype fp32 --compile --micro-batch 16 --steps 5 --share",
            "--shape mid --dtype bf16 --compile --micro-batch 16 --steps 5",
        ],
    },
    "generate": {
        "cuda": [
            "--shape 7B --compile --sqa",
            "--shape 7B --compile --bits 8",
            "--shape 7B --compile --bits 4",
        ],
        "cpu": [
            "--shape mid --dtype fp32 --compile --hf",
            "--shape mid --dtype bf16 --compile --hf",
        ],
    },
}


# Models, samples and timing


def fill_at_random(module: nn.Module) -> None:
    """Fill frozen matrices with small random numbers, and norms and biases with 1.

    Tensors on the meta device are skipped.
    """
    for p in module.parameters():
        if p.device.type == "meta" or p.requires_grad:
            continue
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
        else:
            nn.init.ones_(p)


def build(shape: str, device: torch.device, dtype: torch.dtype, bits: int) -> LaVIN:
    """A LaVIN with random weights, made block by block as checkpoints.load does."""
    lavin = MODEL_SHAPES[shape].on_meta()
    allocate(modules_outside_blocks(lavin), device, dtype)
    fill_at_random(lavin)
    for block in lavin.llama.layers:
        allocate(block.modules(), device, dtype)
        fill_at_random(block)
        if bits < 16:
            quantize(block, bits)
    lavin.init_trained()
    return lavin.train()


def encode_problems(lavin: LaVIN, pictures: list) -> list[data.Encoded]:
    """Samples with the lengths of PROBLEMS, each of them twice: three global batches of 32.

    pictures: paths or pictures. The samples take them in turn.
    """
    encoded = []
    for i, (n_prompt, n_answer, has_picture) in enumerate(PROBLEMS):
        start = 1 + 3 + n_prompt            # BOS and the picture's prefix
        image = None
        if has_picture:
            start += lavin.n_features
            image = pictures[i % len(pictures)]
        generator = np.random.default_rng(i)
        tokens = generator.integers(10, 30000, start + n_answer + 1).astype(np.int32)[:511]
        labels = tokens.copy()
        labels[:start] = data.IGNORED
        is_feature = np.zeros(len(tokens), dtype=bool)
        if has_picture:
            is_feature[4:4 + lavin.n_features] = True
        encoded.append(data.Encoded(tokens, labels, is_feature, image, str(i)))
    return encoded * 2


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is done: it works asynchronously, but the CPU measures the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(args, device, dtype, compiled) -> str:
    compile_state = "on" if compiled else "off"
    return (f"{args.shape} {dtype} on {device}, {args.bits} bits, compile {compile_state}, "
            f"torch {torch.__version__}")


# Training


def flops_of_step(lavin: LaVIN, batches: list[data.Batch]) -> int:
    """The FLOPs that one step on these micro-batches needs."""
    count = 0
    for batch in batches:
        lengths = batch.lengths.tolist()
        count += flops(lavin, lengths, batch.n_answer, len(batch.pixels))
    return count


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    best = 0.0
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def time_steps(lavin: LaVIN, loads) -> Iterator[float]:
    """Train, and yield the seconds of each step. loads: the micro-batches of each step.

    The time to fetch the micro-batches counts. The caller's own time between two steps does not.
    """
    optimizer = train.make_optimizer(lavin, train.Settings())
    scaler = torch.amp.GradScaler(lavin.device.type, enabled=False)
    gradients = gradient_buffer(lavin)
    began = time.perf_counter()
    for micro_batches in loads:
        train.train_step(lavin, optimizer, scaler, gradients, micro_batches)
        synchronize(lavin.device)
        yield time.perf_counter() - began
        began = time.perf_counter()


def median_step(lavin: LaVIN, loads, n: int) -> float:
    """The median seconds of n steps after the warm-up."""
    seconds = list(itertools.islice(time_steps(lavin, loads), WARM_UP_STEPS + n))
    return statistics.median(seconds[WARM_UP_STEPS:])


class IdentityAdapter(nn.Module):
    """Replaces an adapter. The optimizer sees the same parameters, and the router still runs."""

    def __init__(self, adapter: Adapter, uses_w: bool):
        super().__init__()
        self.adapter = adapter
        self.router = adapter.router
        self.uses_w = uses_w        # so that backward reaches the routing

    def forward(self, y, w):
        if self.uses_w:
            return y + 0 * w.sum()
        return y


def remove_adapters(lavin: LaVIN) -> None:
    """Replace the adapters by the identity, but keep the whole backward pass.

    If no block had trained parameters, backward would stop before the first block. So the
    embeddings of both models are multiplied by a factor of 1 that needs a gradient.
    """
    one = nn.Parameter(torch.ones((), device=lavin.device))

    def times_one(module, inputs, y):
        return (y * one).type_as(y)

    for i, block in enumerate(lavin.llama.layers):
        block.adapter = IdentityAdapter(block.adapter, uses_w=i == 0)
    for block in lavin.vit.resblocks:
        block.adapter = IdentityAdapter(block.adapter, uses_w=False)
    lavin.vit.conv1.register_forward_hook(times_one)
    lavin.llama.tok_embeddings.register_forward_hook(times_one)


def measure_adapters(lavin, loads, step, n):
    """Print how much the adapters add to the time of a step. This removes lavin's adapters."""
    remove_adapters(lavin)
    torch._dynamo.reset()
    identity = median_step(lavin, loads, n)
    added = 100 * (step / identity - 1)
    print(f"  the adapters add {added:.1f} % to the {identity:.3f} s of a step without them")


def measure_pictures(lavin, plan, step, n):
    """Print how long a step takes if workers decode its pictures from files."""
    workers = data.default_workers()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i in range(48):         # roughly as large and detailed as ScienceQA's pictures
            files.append(Path(folder, f"{i}.png"))
            Image.effect_noise((480, 300), 60).convert("RGB").save(files[i])
        batches = data.Batches(encode_problems(lavin, files), plan, lavin.resolution)
        loads = data.prefetch(batches, range(WARM_UP_STEPS + n), workers)
        with_files = median_step(lavin, loads, n)
    print(f"  with pictures decoded by {workers} workers, a step takes {with_files / step:.3f} × "
          "as long")


def prepare_training(args, device, dtype, compiled):
    lavin = build(args.shape, device, dtype, args.bits)
    lavin.llama.checkpointing = args.checkpointing
    lavin.vit.checkpointing = args.checkpointing
    if compiled:
        train.compile_blocks(lavin)
    if device.type == "cpu":
        keep_freed_memory()
    return lavin


def measure_training(args) -> None:
    torch.manual_seed(0)
    device, dtype = pick_device(args.device, args.dtype)
    compiled = args.compile
    if compiled is None:
        compiled = device.type == "cuda"
    lavin = prepare_training(args, device, DTYPES[dtype], compiled)
    white = Image.new("RGB", (lavin.resolution, lavin.resolution), "white")
    encoded = encode_problems(lavin, [white])
    plan = functools.partial(
        data.global_batch, lengths=[len(e.tokens) for e in encoded], batch_size=BATCH,
        micro_batch=args.micro_batch, seed=0)
    batches = data.Batches(encoded, plan, lavin.resolution)
    ready = [batches[i] for i in range(3)]
    loads = itertools.cycle(ready)

    seconds = []
    rates = []
    for step_seconds in itertools.islice(time_steps(lavin, loads), WARM_UP_STEPS + args.steps):
        seconds.append(step_seconds)
        # Measured between the steps, so that other work on the machine slows both equally.
        rates.append(matrix_rate(device, DTYPES[dtype]))
    step = statistics.median(seconds[WARM_UP_STEPS:])
    checkpointing = "on" if args.checkpointing else "off"
    print(f"{describe(args, device, dtype, compiled)}, micro-batch {args.micro_batch}, "
          f"checkpointing {checkpointing}")
    print_training(lavin, ready, step, statistics.median(rates), runs.peak_memory(device))
    if args.pictures:
        measure_pictures(lavin, plan, step, args.steps)
    if args.share:
        measure_adapters(lavin, loads, step, args.steps)


def print_training(lavin, ready, step, rate, peak):
    """Print a row. ready: each step's micro-batches; step in s, rate in FLOP/s, peak in bytes."""
    work = statistics.mean(flops_of_step(lavin, micro_batches) for micro_batches in ready)
    tokens = 0                      # of an average step
    for micro_batches in ready:
        tokens += sum(len(batch.tokens) for batch in micro_batches) / len(ready)
    hours = STEPS_OF_A_RUN * step / 3600
    print(f"  step {step:.3f} s · {BATCH / step:.1f} samples/s · {tokens / step:.0f} tokens/s · "
          f"{work / 1e12:.2f} TFLOP")
    print(f"  {work / step / 1e12:.3f} TFLOP/s = {100 * work / step / rate:.0f} % of the matrix "
          f"rate {rate / 1e12:.3f}")
    print(f"  peak memory {peak / 1e9:.2f} GB · 20 epochs of ScienceQA {hours:.2f} h", flush=True)


# Generation


def memory_rate(device: torch.device) -> float:
    """Memory bandwidth in bytes per second: the best of copying (reads and writes) and summing."""
    a = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    b = torch.ones_like(a)

    def copy():
        b.copy_(a)

    best = 0.0
    for _ in range(8):
        for work, size in ((copy, 2 * a.nbytes), (a.sum, a.nbytes)):
            synchronize(device)
            began = time.perf_counter()
            work()
            synchronize(device)
            best = max(best, size / (time.perf_counter() - began))
    return best


def make_prompt(lavin: LaVIN, n: int, has_picture: bool) -> data.Encoded:
    """A random prompt of n tokens, including those of a picture."""
    tokens = np.random.default_rng(n).integers(10, 30000, n).astype(np.int32)
    labels = np.full_like(tokens, data.IGNORED)
    is_feature = np.zeros(n, dtype=bool)
    image = None
    if has_picture:
        is_feature[4:4 + lavin.n_features] = True       # after BOS and the picture's prefix
        image = torch.zeros(3, lavin.resolution, lavin.resolution)
    return data.Encoded(tokens, labels, is_feature, image, str(n))


def run_greedy(engine: Engine, batch: data.Batch, n: int) -> tuple[float, float, list[int]]:
    """Continue a prompt by n tokens, as a conversation does.

    -> the seconds to the first token, the median seconds of the others, and all n ids.
    """
    engine.lengths.clear()
    began = time.perf_counter()
    logits = engine.prefill(batch)
    ids = [int(pick(logits, temperature=0.0, top_p=1.0))]
    first = time.perf_counter() - began
    seconds = []
    for _ in range(n - 1):
        began = time.perf_counter()
        logits = engine.step(ids[-1:])
        ids.append(int(pick(logits, temperature=0.0, top_p=1.0)))
        seconds.append(time.perf_counter() - began)
    return first, statistics.median(seconds), ids


def hf_state(llama: LLaMA) -> dict[str, torch.Tensor]:
    """LLaMA's weights with Hugging Face's names, and with its order of rows in wq and wk."""
    hf_names = {ours: theirs for theirs, ours in hf.LLAMA_NAMES.items()}
    half = llama.config.head_dim // 2
    state = {}
    for name, tensor in llama.state_dict().items():
        name = name.removesuffix(".weight")
        if name.endswith((".wq", ".wk")):       # pairs (2i, 2i + 1) become (i, i + D/2)
            tensor = tensor.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        if name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            state[f"model.layers.{layer}.{hf_names[part]}.weight"] = tensor
        else:
            state[f"{hf_names[name]}.weight"] = tensor
    return state


def hf_model(llama: LLaMA, device: torch.device):
    """The same LLaMA as a Hugging Face model, or None if transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    c = llama.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, rms_norm_eps=c.norm_eps)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device=device).to(llama.norm.weight.dtype)
    # RoPE's frequencies are not in the state dict, so they have to be computed again.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.load_state_dict(hf_state(llama))
    return model


def run_hf(model, batch: data.Batch, n: int) -> tuple[float, list[int]]:
    """Hugging Face's generate -> its seconds per token, the median of three runs, and the n ids.

    The time to the first token is measured separately and subtracted.
    """
    prompt = batch.tokens[None]
    seconds = []
    for _ in range(3):
        took = {}
        for n_tokens in (1, n):
            began = time.perf_counter()
            ids = model.generate(
                prompt, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False,
                pad_token_id=0)
            took[n_tokens] = time.perf_counter() - began
        seconds.append((took[n] - took[1]) / (n - 1))
    return statistics.median(seconds), ids[0, len(batch.tokens):].tolist()


def without_adapters(folded: LaVIN) -> LaVIN:
    """Plain LLaMA: a folded LLaMA without the biases or adapters that folding left in it."""
    for block in folded.llama.layers:
        block.adapter = NoAdapter()
        for matrix in (block.attention.wq, block.attention.wk, block.attention.wv):
            if isinstance(matrix, nn.Linear):           # a quantized one has no bias
                matrix.bias = None
    return folded


def measure_conversation(text: LaVIN, plain: LaVIN, args) -> None:
    """Print tokens per second at batch 1: folded, without adapters, Hugging Face's generate."""
    n = 200
    device = text.device
    batch = data.collate([make_prompt(text, 40, False)], text.resolution).to(device)
    folded_engine = Engine(text, 1, 512, args.compile)
    plain_engine = Engine(plain, 1, 512, args.compile)
    for engine in (folded_engine, plain_engine):
        run_greedy(engine, batch, 8)            # compiles, and captures the CUDA graph
    rates = []
    folded_steps = []
    plain_steps = []
    for _ in range(3):              # in turns, so that other work on the machine slows all equally
        rates.append(memory_rate(device))
        folded_steps.append(run_greedy(folded_engine, batch, n)[1])
        _, seconds, plain_ids = run_greedy(plain_engine, batch, n)
        plain_steps.append(seconds)
    step = statistics.median(folded_steps)
    plain_step = statistics.median(plain_steps)
    rate = statistics.median(rates)

    llama = text.llama
    size = sum(t.nbytes for t in [*llama.parameters(), *llama.buffers()])
    size -= llama.tok_embeddings.weight.nbytes          # a token reads only one of its rows
    print(f"  batch 1: {1 / step:.1f} tokens/s = {100 * size / step / rate:.0f} % of what memory "
          f"allows: {size / 1e9:.3f} GB per token at {rate / 1e9:.1f} GB/s")
    print(f"  plain LLaMA without adapters {1 / plain_step:.1f} tokens/s", flush=True)

    model = hf_model(plain.llama, device) if args.hf else None
    if model is not None:
        hf_step, hf_ids = run_hf(model, batch, n)
        same = sum(a == b for a, b in zip(hf_ids, plain_ids))
        print(f"  Hugging Face's generate {1 / hf_step:.1f} tokens/s: "
              f"we are {hf_step / step:.2f} × as fast; {same} of {n} tokens equal")


def measure_first_token(picture: LaVIN) -> None:
    engine = Engine(picture, 1, 512)
    batch = data.collate([make_prompt(picture, 300, True)], picture.resolution)
    seconds = min(run_greedy(engine, batch, 2)[0] for _ in range(5))
    print(f"  first token after {1e3 * seconds:.0f} ms, for a prompt of 300 tokens with a picture",
          flush=True)


def measure_test_split(text: LaVIN, picture: LaVIN, name: str, part: int, n_new: int) -> None:
    """Print the seconds for the 4,241 problems of ScienceQA's test split, n_new tokens for each.

    Only one in `part` of them is answered, and the time is multiplied by `part`.
    """
    prompts = {0: [], 1: []}        # by modality
    n = 4241 // part
    for n_prompt, _, has_picture in itertools.islice(itertools.cycle(PROBLEMS), n):
        length = n_prompt + 4 + text.n_features * has_picture
        prompts[has_picture].append(make_prompt(text, length, bool(has_picture)))
    began = time.perf_counter()
    for modality, model in enumerate((text, picture)):
        prompts[modality].sort(key=lambda prompt: len(prompt.tokens), reverse=True)
        for _ in continue_prompts(model, prompts[modality], 64, n_new):
            pass
    seconds = part * (time.perf_counter() - began)
    print(f"  ScienceQA's test split, {name}: {seconds:.0f} s ({part} times the time of {n} "
          "problems)", flush=True)


def measure_generation(args) -> None:
    torch.manual_seed(0)
    device, dtype = pick_device(args.device, args.dtype)
    lavin = build(args.shape, device, DTYPES[dtype], args.bits).eval()
    print(describe(args, device, dtype, args.compile))
    began = time.perf_counter()
    text = fold(lavin, 0)
    picture = fold(lavin, 1)
    synchronize(device)
    print(f"  folding for two modalities {time.perf_counter() - began:.2f} s")
    plain = without_adapters(fold(lavin, 0))
    measure_conversation(text, plain, args)
    measure_first_token(picture)
    if args.sqa:
        measure_test_split(text, picture, "stopping at the letter", part=4, n_new=5)
        measure_test_split(text, picture, "64 new tokens each", part=12, n_new=64)


# Single operations


def time_passes(function, *inputs) -> float:
    """The seconds of a forward and a backward pass, the median of 20."""
    seconds = []
    device = inputs[0].device
    for _ in range(20):
        synchronize(device)
        began = time.perf_counter()
        function(*inputs).sum().backward()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_experts(args) -> None:
    """Print how much faster add_experts is than Adapter.mixed and a sum, at 1,200 tokens."""
    device, _ = pick_device(args.device, "fp32")
    if device.type == "cpu":
        keep_freed_memory()             # as training does
    for width in (128, 512, 4096):
        torch.manual_seed(0)
        adapter = Adapter(width, AdapterConfig()).to(device)
        y = torch.randn(1, 1200, width, device=device, requires_grad=True)
        h = torch.randn(1, 1200, adapter.down.out_features, device=device, requires_grad=True)
        w = torch.rand(1, 1200, 2, device=device, requires_grad=True)

        def add_plain(y, h, w):
            return y + adapter.scale * adapter.mixed(h, w)

        def add_fast(y, h, w):
            return add_experts(y, adapter.scale, h, w, adapter.up, adapter.up_bias)

        fast = time_passes(add_fast, y, h, w)
        plain = time_passes(add_plain, y, h, w)
        print(f"width {width:5}: the plain form {1e3 * plain:.2f} ms, "
              f"add_experts {1e3 * fast:.2f} ms, {plain / fast:.1f} × as fast")


def measure_attention() -> None:
    """Print how much faster fast.ops.attention is than PyTorch's, for 8 heads in bf16 on a CPU."""
    keep_freed_memory()                 # as training does

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours(q, k, v):
        return attention(q, k, v, is_causal=True)

    for n_samples, n_tokens in ((1, 64), (1, 256), (1, 512), (32, 25)):
        torch.manual_seed(0)
        inputs = []
        for _ in range(3):
            x = torch.randn(n_samples, 8, n_tokens, 64, dtype=torch.bfloat16)
            inputs.append(x.requires_grad_())
        fused_seconds = time_passes(fused, *inputs)
        our_seconds = time_passes(ours, *inputs)
        print(f"{n_samples:3} × {n_tokens:4} tokens: PyTorch's {1e3 * fused_seconds:.2f} ms, "
              f"ours {1e3 * our_seconds:.2f} ms, {fused_seconds / our_seconds:.1f} × as fast")


def run_rows(what: str, device: torch.device) -> None:
    """Measure each row in a process of its own, because peak memory belongs to a process.

    LavinError at the end if a row failed.
    """
    if device.type not in ROWS[what]:
        raise LavinError(f"--device {device}: there are rows for cpu and cuda; give --shape")
    failed = []
    for row in ROWS[what][device.type]:
        cpu = Path("/proc/cpuinfo")
        has_bf16 = device.type != "cpu" or (cpu.exists() and "bf16" in cpu.read_text())
        if what == "train" and "bf16" in row and not has_bf16:
            print(f"{row}: skipped; this CPU has no bf16 instructions and would take hours")
            continue
        command = [sys.executable, "-m", "bench.speed", what, "--device", str(device), *row.split()]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(row)
    if failed:
        raise LavinError(f"no figures for {len(failed)} of the rows: {'; '.join(failed)}")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "generate", "experts", "attention"])
    parser.add_argument("--shape", choices=MODEL_SHAPES, help="measure one row (default: all rows)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    parser.add_argument("--bits", type=int, choices=[16, 8, 4], default=16)
    parser.add_argument("--micro-batch", type=Kind(int, low=1, high=BATCH).parse, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--pictures", action="store_true", help="also decode pictures from files")
    parser.add_argument("--share", action="store_true", help="also run without adapters")
    parser.add_argument("--sqa", action="store_true", help="also time ScienceQA's test split")
    parser.add_argument("--hf", action="store_true",
                        help="also time Hugging Face's generate, if transformers is installed")
    parser.add_argument("--steps", type=Kind(int, low=1, high=1000).parse, default=9)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.hf and args.bits < 16:
        parser.error("--hf goes with --bits 16")
    if args.what == "experts":
        measure_experts(args)
    elif args.what == "attention":
        measure_attention()
    elif args.shape is None:
        for name, value in vars(args).items():
            if name not in ("what", "device") and value != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for one row; add --shape")
        device, _ = pick_device(args.device, "auto")
        run_rows(args.what, device)
    elif args.what == "train":
        measure_training(args)
    else:
        measure_generation(args)


if __name__ == "__main__":
    run(main)
