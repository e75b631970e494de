"""Measure the time and the peak memory of loading a LLaMA, from two shards or a GGUF file.

    python -m bench.peak_memory [DTYPE [DEVICE [BITS [DIM LAYERS]]]]
    python -m bench.peak_memory                             400 MB, in bf16 on the CPU
    python -m bench.peak_memory bf16 cuda 16 4096 32        7B
    python -m bench.peak_memory --gguf                      the same 400 MB as a GGUF file
    python -m bench.peak_memory bf16 --gguf FILE            your own GGUF file

Loading should hold only the model in its target dtype and one tensor of each shard. A tensor of a
GGUF file is held twice: as stored, and dequantized to fp32. The script writes a checkpoint into a
temporary folder and loads it in a fresh process. It prints the peak memory of that process as the
operating system counts it, including mapped pages of the files, and on a GPU also the peak there.
All sizes are in MiB.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from adapters import AdapterConfig
from checkpoints import allocate, load_llama, open_llama, read_params
from extras import gguf
from extras.terminal import Parser, run
from extras.values import Kind
from fast.quantize import quantize
from files import DTYPES, LavinError, is_gguf
from model import LLaMA, LLaMAConfig

ROOT = Path(__file__).absolute().parent.parent
MIB = 2**20
VOCAB_SIZE = 512


def shard_shape(name: str, shape: torch.Size) -> list[int]:
    """The shape of a parameter in each of two shards. Meta halves matrices but not norms."""
    halved = list(shape)
    if len(shape) == 1:
        return halved
    if any(part in name for part in (".wo.", ".w2.", "tok_embeddings")):
        halved[1] //= 2
    else:
        halved[0] //= 2
    return halved


def shapes_of(params: dict) -> dict[str, torch.Size]:
    """{Meta's name: shape} of the weights of a LLaMA. params: the contents of its params.json."""
    with torch.device("meta"):
        config = LLaMAConfig(**params | {"vocab_size": VOCAB_SIZE})
        llama = LLaMA(config, AdapterConfig())
    shapes = {}
    for name, p in llama.named_parameters():
        if "adapter" not in name:
            shapes[name] = p.shape
    return shapes


def params_of(dim: int, layers: int) -> dict:
    """The params.json of a LLaMA with heads 128 wide."""
    return {"dim": dim, "n_layers": layers, "n_heads": dim // 128, "multiple_of": 256,
            "norm_eps": 1e-6, "vocab_size": -1}


def write_checkpoint(directory: Path, dim: int, layers: int) -> None:
    """Write a LLaMA of zeros in Meta's layout: two shards in fp16."""
    params = params_of(dim, layers)
    (directory / "params.json").write_text(json.dumps(params))
    for i in range(2):
        shard = {}
        for name, shape in shapes_of(params).items():
            shard[name] = torch.zeros(shard_shape(name, shape), dtype=torch.float16)
        torch.save(shard, directory / f"consolidated.{i:02}.pth")


def gguf_name(name: str) -> str:
    """Meta's name of a tensor -> llama.cpp's."""
    part, _, kind = name.rpartition(".")
    prefix = ""
    if part.startswith("layers."):
        _, number, part = part.split(".", 2)
        prefix = f"blk.{number}."
    for theirs, ours in gguf.NAMES.items():
        if ours == part:
            return f"{prefix}{theirs}.{kind}"
    raise ValueError(f"{name} has no name in GGUF")


def write_gguf(path: Path, dim: int, layers: int) -> None:
    """Write the same LLaMA as a GGUF file in fp16, without a vocabulary: nothing here reads one."""
    writer = gguf.import_gguf(path).GGUFWriter(path, "llama")
    params = params_of(dim, layers)
    shapes = shapes_of(params)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_head_count(params["n_heads"])
    writer.add_feed_forward_length(shapes["layers.0.feed_forward.w1.weight"][0])
    writer.add_layer_norm_rms_eps(params["norm_eps"])
    for name, shape in shapes.items():
        writer.add_tensor(gguf_name(name), np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def process_peak() -> float:
    """The peak memory of this process, in MiB.

    Linux only. getrusage would also count what the parent process held before it started this one.
    """
    status = Path("/proc/self/status").read_text()
    kilobytes = status.split("VmHWM:")[1].split()[0]
    return int(kilobytes) / 1024


def largest_tensor(source: str | gguf.File, llama: LLaMA) -> tuple[str, int]:
    """Return (what loading may hold besides the model, in words; its size in bytes)."""
    if not isinstance(source, gguf.File):
        # Two halves of the largest tensor, in fp16.
        return "one tensor of each shard", max(p.numel() * 2 for p in llama.parameters())
    sizes = []
    for name in source.names():
        _, stored, _ = source.tensors[name]
        sizes.append(math.prod(stored) + 4 * llama.get_parameter(name).numel())
    return "one tensor, stored and fp32", max(sizes)


def load(args) -> None:
    """Load the checkpoint in this process and print the measurements as JSON."""
    torch.empty(1, device=args.device)          # do not count CUDA's own memory
    if is_gguf(args.load):
        gguf.import_gguf(args.load)             # nor the library's
    before = process_peak()
    began = time.perf_counter()
    source = open_llama(args.load)
    with torch.device("meta"):
        llama = LLaMA(read_params(source, VOCAB_SIZE), AdapterConfig())
    for name, p in llama.named_parameters():
        p.requires_grad_("adapter" in name)
    what, largest = largest_tensor(source, llama)
    outside = [m for name, m in llama.named_modules() if not name.startswith("layers.")]
    allocate(outside, args.device, DTYPES[args.dtype])
    for block in load_llama(llama, source, args.device, DTYPES[args.dtype]):
        if args.bits < 16:
            quantize(block, args.bits)
    seconds = time.perf_counter() - began

    size = 0
    for tensor in [*llama.parameters(), *llama.buffers()]:
        if not tensor.requires_grad:
            size += tensor.nbytes
    result = {
        "before": before,
        "after": process_peak(),
        "model": size / MIB,
        what: largest / MIB,
        "seconds": seconds,
    }
    if args.device == "cuda":
        result["peak on the GPU"] = torch.cuda.max_memory_allocated() / MIB
    print(json.dumps(result))


def measure(dtype: str = "bf16", device: str = "cpu", bits: int = 16, dim: int = 2048,
            layers: int = 4, as_gguf: bool = False,
            gguf_file: str | None = None) -> dict[str, float]:
    """Write a checkpoint and load it in a fresh process -> what `load` prints there.

    as_gguf: write a GGUF file instead. gguf_file: write nothing, and load this one.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = directory
        if gguf_file:
            path = os.path.abspath(gguf_file)
            gguf.File(path)                     # report a faulty file here, not in the new process
        elif as_gguf:
            path = f"{directory}/zeros.gguf"
            write_gguf(Path(path), dim, layers)
        else:
            write_checkpoint(Path(directory), dim, layers)
        command = [
            sys.executable, "-m", "bench.peak_memory", dtype, device, str(bits), "--load", path]
        output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE)
    if output.returncode != 0:
        raise LavinError(f"loading {path} on {device} failed; its message is above")
    return json.loads(output.stdout)


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", nargs="?", choices=DTYPES, default="bf16")
    parser.add_argument("device", nargs="?", default="cpu")
    parser.add_argument("bits", nargs="?", type=int, choices=[16, 8, 4], default=16)
    parser.add_argument("dim", nargs="?", type=Kind(int, low=128, high=2**14).parse, default=2048)
    parser.add_argument("layers", nargs="?", type=Kind(int, low=1, high=200).parse, default=4)
    parser.add_argument("--gguf", metavar="FILE", nargs="?", const="", help="load this GGUF file; "
                        "without FILE, write one and load it")
    parser.add_argument("--load", metavar="PATH", help="load this checkpoint in this process")
    args = parser.parse_args()
    if args.load:
        load(args)
        return
    as_gguf = args.gguf is not None         # --gguf without FILE gives ""
    result = measure(
        args.dtype, args.device, args.bits, args.dim, args.layers, as_gguf, args.gguf)
    for name, value in result.items():
        print(f"{name:28} {value:10.1f}")


if __name__ == "__main__":
    run(main)
