"""How long it takes to load a LLaMA of two shards, and how much memory at most.

    python -m bench.peak_memory [DTYPE [DEVICE [BITS [DIM LAYERS]]]]
    python -m bench.peak_memory                             400 MB, in bf16 on the CPU
    python -m bench.peak_memory bf16 cuda 16 4096 32        7B

Loading should hold the model in its target dtype and one tensor of each shard, and nothing else.
The script writes a checkpoint into a temporary folder and loads it in a fresh process. It prints
the most memory that this process ever held, as the operating system counts it, mapped pages of the
files included; and for a GPU the most that was held there. All sizes are in MB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from adapters import AdapterConfig
from checkpoints import allocate, load_llama, read_params
from extras.terminal import Parser, run
from fast.quantize import quantize
from files import DTYPES
from model import LLaMA, LLaMAConfig

ROOT = Path(__file__).absolute().parent.parent
MB = 2**20
VOCAB_SIZE = 512


def shard_shape(name: str, shape: torch.Size) -> list[int]:
    """The shape of one of two shards' part of a parameter: Meta halves matrices and no norms."""
    halved = list(shape)
    if len(shape) == 1:
        return halved
    if any(part in name for part in (".wo.", ".w2.", "tok_embeddings")):
        halved[1] //= 2
    else:
        halved[0] //= 2
    return halved


def write_checkpoint(directory: Path, dim: int, layers: int) -> None:
    """A LLaMA of zeros in Meta's layout, in two shards of fp16."""
    params = {"dim": dim, "n_layers": layers, "n_heads": dim // 128, "multiple_of": 256,
              "norm_eps": 1e-6, "vocab_size": -1}
    (directory / "params.json").write_text(json.dumps(params))
    with torch.device("meta"):
        config = LLaMAConfig(**params | {"vocab_size": VOCAB_SIZE})
        llama = LLaMA(config, AdapterConfig())
    for i in range(2):
        shard = {}
        for name, p in llama.named_parameters():
            if "adapter" not in name:
                shape = shard_shape(name, p.shape)
                shard[name] = torch.zeros(shape, dtype=torch.float16)
        torch.save(shard, directory / f"consolidated.{i:02}.pth")


def process_peak() -> float:
    """The most memory that this process has held, in MB.

    Linux only. getrusage would also count what the parent process held before it started this one.
    """
    status = Path("/proc/self/status").read_text()
    kilobytes = status.split("VmHWM:")[1].split()[0]
    return int(kilobytes) / 1024


def load(args) -> None:
    """Load the checkpoint in this process, and print what that took as JSON."""
    torch.empty(1, device=args.device)          # CUDA's own memory is not the loader's
    before = process_peak()
    began = time.perf_counter()
    with torch.device("meta"):
        llama = LLaMA(read_params(args.load, VOCAB_SIZE), AdapterConfig())
    for name, p in llama.named_parameters():
        p.requires_grad_("adapter" in name)
    # Two halves of the largest tensor, in fp16.
    largest = max(p.numel() * 2 for p in llama.parameters())
    outside = [m for name, m in llama.named_modules() if not name.startswith("layers.")]
    allocate(outside, args.device, DTYPES[args.dtype])
    for block in load_llama(llama, args.load, args.device, DTYPES[args.dtype]):
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
        "model": size / MB,
        "one tensor of each shard": largest / MB,
        "seconds": seconds,
    }
    if args.device == "cuda":
        result["peak on the GPU"] = torch.cuda.max_memory_allocated() / MB
    print(json.dumps(result))


def measure(dtype: str = "bf16", device: str = "cpu", bits: int = 16, dim: int = 2048,
            layers: int = 4) -> dict[str, float]:
    """Write a checkpoint and load it in a fresh process -> what `load` prints there."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), dim, layers)
        command = [
            sys.executable, "-m", "bench.peak_memory", dtype, device, str(bits),
            "--load", directory]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return json.loads(output.stdout)


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", nargs="?", choices=DTYPES, default="bf16")
    parser.add_argument("device", nargs="?", default="cpu")
    parser.add_argument("bits", nargs="?", type=int, choices=[16, 8, 4], default=16)
    parser.add_argument("dim", nargs="?", type=int, default=2048)
    parser.add_argument("layers", nargs="?", type=int, default=4)
    parser.add_argument("--load", metavar="FOLDER", help="load this checkpoint in this process")
    args = parser.parse_args()
    if args.load:
        load(args)
        return
    result = measure(args.dtype, args.device, args.bits, args.dim, args.layers)
    for name, value in result.items():
        print(f"{name:26} {value:10.1f}")


if __name__ == "__main__":
    run(main)
