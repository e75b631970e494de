"""Peak memory of loading a LLaMA of two shards: the model in its target dtype plus one tensor of each shard.

    python tests/peak_memory.py [bf16|fp32]

Writes a checkpoint of about 400 MB into a temporary directory, loads it in a fresh process, and prints what the
operating system says was the most memory that the process ever held (mapped pages of the files included).
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from adapters import AdapterConfig
from model import LLaMA, LLaMAConfig, allocate, load_llama, read_params

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MB = 2**20


def write_checkpoint(directory):
    params = {"dim": 2048, "n_layers": 4, "n_heads": 16, "multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}
    (directory / "params.json").write_text(json.dumps(params))
    with torch.device("meta"):
        llama = LLaMA(LLaMAConfig(**params | {"vocab_size": 512}), AdapterConfig())
    shards = [{}, {}]
    for name, p in llama.named_parameters():
        if "adapter" not in name:
            dim = 1 if any(part in name for part in (".wo.", ".w2.", "tok_embeddings")) else 0
            whole = torch.zeros(p.shape, dtype=torch.float16)
            for shard, piece in zip(shards, whole.chunk(2, dim) if p.dim() > 1 else [whole, whole]):
                shard[name] = piece.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{i:02}.pth")


def peak():
    """The most memory that this process has held, in MB (Linux; getrusage would count what its parent held)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def load(directory, dtype):
    """In the fresh process: (peak before, peak after, the model, one tensor of each shard), MB."""
    before = peak()
    with torch.device("meta"):
        llama = LLaMA(read_params(directory, 512), AdapterConfig())
    for name, p in llama.named_parameters():
        p.requires_grad_("adapter" in name)
    allocate(llama, "cpu", dtype)
    load_llama(llama, directory)
    sizes = [p.nbytes / MB for p in llama.parameters() if not p.requires_grad]
    tensor = max(p.numel() * 2 / MB for p in llama.parameters())        # fp16 on disk, halves of two shards
    print(json.dumps({"before": before, "after": peak(), "model": sum(sizes), "one tensor of each shard": tensor}))


def measure(dtype):
    directory = Path(tempfile.mkdtemp())
    try:
        write_checkpoint(directory)
        output = subprocess.run([sys.executable, __file__, "load", str(directory), dtype], check=True, capture_output=True)
        return json.loads(output.stdout)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        load(Path(sys.argv[2]), DTYPES[sys.argv[3]])
    else:
        print(measure(*sys.argv[1:] or ["bf16"]))
