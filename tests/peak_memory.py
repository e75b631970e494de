"""Time and peak memory of loading a LLaMA of two shards: the model in its target dtype plus one tensor of each shard.

    python tests/peak_memory.py [bf16|fp32] [cpu|cuda] [bits] [dim layers]      7B: bf16 cuda 16 4096 32

Writes a checkpoint (without more, of about 400 MB) into a temporary directory, loads it in a fresh process, and prints
what the operating system says was the most memory that the process ever held (mapped pages of the files included), and
for a GPU the most that it held there.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import quantize
from adapters import AdapterConfig
from model import LLaMA, LLaMAConfig, allocate, load_llama, read_params

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MB = 2**20


def write_checkpoint(directory, dim, layers):
    params = {"dim": dim, "n_layers": layers, "n_heads": dim // 128, "multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}
    (directory / "params.json").write_text(json.dumps(params))
    with torch.device("meta"):
        llama = LLaMA(LLaMAConfig(**params | {"vocab_size": 512}), AdapterConfig())
    for i in range(2):
        shard = {}
        for name, p in llama.named_parameters():
            if "adapter" not in name:
                cut = None if p.dim() == 1 else 1 if any(part in name for part in (".wo.", ".w2.", "tok_emb")) else 0
                shard[name] = torch.zeros([n // 2 if d == cut else n for d, n in enumerate(p.shape)], dtype=torch.float16)
        torch.save(shard, directory / f"consolidated.{i:02}.pth")


def peak():
    """The most memory that this process has held, in MB (Linux; getrusage would count what its parent held)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def load(directory, dtype, device, bits):
    """In the fresh process: (peak before, peak after, the model, one tensor of each shard), MB; and seconds."""
    torch.empty(1, device=device)                                       # CUDA's own memory is not the loader's
    before, began = peak(), time.perf_counter()
    with torch.device("meta"):
        llama = LLaMA(read_params(directory, 512), AdapterConfig())
    for name, p in llama.named_parameters():
        p.requires_grad_("adapter" in name)
    tensor = max(p.numel() * 2 / MB for p in llama.parameters())        # fp16 on disk, halves of two shards
    allocate([m for name, m in llama.named_modules() if not name.startswith("layers.")], device, dtype)
    for block in load_llama(llama, directory, device, dtype):
        if bits < 16:
            quantize.pack(block, bits)
    sizes = [p.nbytes / MB for p in [*llama.parameters(), *llama.buffers()] if not p.requires_grad]
    gpu = {"peak on the GPU": torch.cuda.max_memory_allocated() / MB} if device == "cuda" else {}
    print(json.dumps({"before": before, "after": peak(), "model": sum(sizes), "one tensor of each shard": tensor,
                      "seconds": time.perf_counter() - began} | gpu))


def measure(dtype="bf16", device="cpu", bits=16, dim=2048, layers=4):
    directory = Path(tempfile.mkdtemp())
    try:
        write_checkpoint(directory, int(dim), int(layers))
        output = subprocess.run([sys.executable, __file__, "load", str(directory), dtype, device, str(bits)], check=True,
                                capture_output=True)
        return json.loads(output.stdout)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        load(Path(sys.argv[2]), DTYPES[sys.argv[3]], sys.argv[4], int(sys.argv[5]))
    else:
        print(measure(*sys.argv[1:]))
