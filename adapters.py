"""What is trained: the adapter, the projector, and their checkpoint in the layout of the released files.

The paper's Mixture-of-Modality Adapter: a linear bottleneck in front of every attention, with one
down-projection and two up-projections, the experts, mixed by the router's weights. The projector turns the
ViT's features into tokens of LLaMA.

    python adapters.py FILE [--fold DIR]        what is in a checkpoint, ours or released; merged into LLaMA
"""

import argparse
import os
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from files import LavinError, read_checkpoint, run, tensors_of
from router import Router


@dataclass
class AdapterConfig:
    rank: int = 8
    hidden: int = 128       # of the projector
    tau: float = 10.0       # temperature of the routers: 10 for 7B, 5 for 13B
    scale: float = 1.0
    dropout: float = 0.1


class Adapter(nn.Module):
    """A(y; w) = y + s (w0 up0(h) + w1 up1(h)), h = dropout(down(y)).

    Each `up` is a 1×1 convolution in two groups: half g of the output reads half g of the hidden units.
    """

    def __init__(self, width, config):
        super().__init__()
        self.scale = config.scale
        self.down = nn.Linear(width, config.rank)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Parameter(torch.empty(2, width, config.rank // 2))     # of both experts
        self.up_bias = nn.Parameter(torch.empty(2, width))
        self.router = Router(width, config.tau)
        self.reset_parameters()

    def reset_parameters(self):
        """Both experts start at zero: a fresh adapter is the identity."""
        nn.init.xavier_uniform_(self.down.weight)
        for parameter in (self.down.bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)
        self.router.reset_parameters()

    def forward(self, y, w):
        """y (B, T, C), w (B, T or 1, 2) -> (B, T, C)."""
        h = self.dropout(self.down(y))                                      # (B, T, r)
        # Two groups are one block-diagonal matrix, and two weighted experts one product with both of them.
        up = torch.cat([torch.block_diag(*expert.chunk(2)) for expert in self.up], dim=1)     # (C, 2r)
        mixed = F.linear(torch.cat([w[..., :1] * h, w[..., 1:] * h], dim=-1), up) + w @ self.up_bias
        return y + self.scale * mixed.type_as(y)


class Folded(nn.Module):
    """What stands in an adapter's place once its modality, and with it w, is settled: nothing, or U (D y + d) + u."""

    def __init__(self, *matrices):
        super().__init__()
        self.matrices = nn.ParameterList(nn.Parameter(m, requires_grad=False) for m in matrices)

    def forward(self, y, w):
        """As Adapter's; w is not looked at."""
        if not len(self.matrices):
            return y
        down, up, bias = self.matrices
        return y + F.linear(F.linear(y, down), up, bias)


@torch.no_grad()
def fold(adapter, w, attention, dtype):
    """Settle the experts' weights w (2,): changes the matrices of `attention`, returns what the adapter leaves behind.

    A(y; w) = y + U (D y + d) + u is linear, so each matrix W behind it does the adapter's work exactly:
    W A(y) = (W + W U D) y + W (U d + u). A packed matrix would have to be rounded once more to take it up, so before
    packed ones U and D remain: one expert instead of two and a router.
    """
    up = adapter.scale * sum(w_e * torch.block_diag(*expert.chunk(2)) for w_e, expert in zip(w, adapter.up))        # (C, r)
    bias = adapter.scale * (w @ adapter.up_bias) + up @ adapter.down.bias
    if not isinstance(attention.wq, nn.Linear):
        return Folded(*(t.to(dtype) for t in (adapter.down.weight, up, bias)))
    for linear in (attention.wq, attention.wk, attention.wv):
        W, before = linear.weight.float(), 0 if linear.bias is None else linear.bias.float()
        linear.bias = nn.Parameter((before + W @ bias).to(dtype), requires_grad=False)
        linear.weight = nn.Parameter(torch.addmm(W, W @ up, adapter.down.weight).to(dtype), requires_grad=False)
    return Folded()


class Projector(nn.Module):
    """Features of the ViT -> tokens of LLaMA: Linear(V -> hidden), SiLU, Linear(hidden -> C)."""

    def __init__(self, vit_width, hidden, width):
        super().__init__()
        self.conv_A = nn.Linear(vit_width, hidden)      # "conv" in the checkpoint, a Linear there too
        self.conv_B = nn.Linear(hidden, width)
        self.reset_parameters()

    def reset_parameters(self):
        for linear in (self.conv_A, self.conv_B):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features):
        """(N, F, V) -> (N, F, C)."""
        return self.conv_B(F.silu(self.conv_A(features)))


def _official(lavin, of):
    """{official name: view of `of(parameter)` in the official shape}: the one table between our names and theirs."""
    named = {"adapter_modality_embedding.weight": of(lavin.modality_embedding)}
    named |= {f"adapter_proj.{name}": of(p) for name, p in lavin.projector.named_parameters()}
    for prefix, blocks in (("layers", lavin.llama.layers),
                           ("backbone.visual.transformer.resblocks", lavin.vit.resblocks)):
        for i, block in enumerate(blocks):
            a, up, up_bias = block.adapter, of(block.adapter.up), of(block.adapter.up_bias)
            ours = {
                "conv_A.weight": of(a.down.weight)[..., None], "conv_A.bias": of(a.down.bias),
                "conv_B.weight": up[0, ..., None], "conv_B.bias": up_bias[0],
                "conv_D.weight": up[1, ..., None], "conv_D.bias": up_bias[1],
                "expert_weights.weight": of(a.router.weight), "expert_weights.bias": of(a.router.bias),
            }
            named |= {f"{prefix}.{i}.adapter_attn.{name}": tensor for name, tensor in ours.items()}
    return named


def to_official(lavin, grad=False):
    """The trained parameters, or with grad=True their gradients (0 where none flowed), by official name and shape.

    The tensors share memory with the model's.
    """
    if grad:
        return _official(lavin, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    return _official(lavin, lambda p: p.detach())


def official_checkpoint(lavin, format, bits=16):
    """{"model", "args"} as the reference writes and reads them: trained tensors on the CPU, argparse.Namespace."""
    c = lavin.config
    args = argparse.Namespace(
        adapter_type="attn", visual_adapter_type="router", adapter_dim=c.rank, adapter_scale=c.scale,
        temperature=c.tau, hidden_proj=c.hidden, dropout=c.dropout, n_prompt=lavin.n_features,
        max_seq_len=lavin.max_seq_len, prompt_format=format, bits=f"{bits}bit")
    return {"model": {name: t.cpu().clone() for name, t in to_official(lavin).items()}, "args": args}


def read(path):
    """A LaVIN checkpoint, released or ours -> ({official name: tensor}, AdapterConfig, {setting: value}).

    Rank and hidden size come from the shapes, τ, scale and dropout from the file's `args`, defaults where it has
    none. The settings are those of the run: all of them in our files ("config"), the context and the prompt
    format in the reference's. Raises LavinError if it is not such a file.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise LavinError(f"{path}: not a LaVIN checkpoint: it has no \"model\"")
    state = {name.removeprefix("module."): t for name, t in tensors_of(checkpoint["model"], path).items()}
    try:
        args = vars(checkpoint.get("args") or argparse.Namespace())
        config = AdapterConfig(
            rank=len(state["layers.0.adapter_attn.conv_A.weight"]),
            hidden=len(state["adapter_proj.conv_A.weight"]),
            tau=float(args.get("temperature", AdapterConfig.tau)),
            scale=float(args.get("adapter_scale", AdapterConfig.scale)),
            dropout=float(args.get("dropout", AdapterConfig.dropout)))
        settings = {"max_seq_len": args.get("max_seq_len"), "format": args.get("prompt_format"),
                    "step": checkpoint.get("step"), "epoch": checkpoint.get("epoch")}
        return state, config, settings | checkpoint.get("config", {})
    except (KeyError, TypeError, ValueError) as error:
        raise LavinError(f"{path}: not a LaVIN checkpoint ({error!r})") from error


def describe(path):
    """Print what a checkpoint is -> its settings."""
    state, config, settings = read(path)
    parts = {"layers": "LLaMA", "backbone": "ViT", "adapter_proj": "projector", "adapter_modality_embedding": "modality embedding"}
    counts, blocks = Counter(), {}
    for name, tensor in state.items():
        part, *rest = name.split(".")
        counts[parts.get(part, part)] += tensor.numel()
        if name.endswith("adapter_attn.conv_A.weight"):
            blocks.setdefault(parts[part], []).append(tensor.shape[1])
    print(f"{path}: {sum(counts.values()):,} trained parameters: "
          + " · ".join(f"{part} {count:,}" for part, count in counts.items()))
    print(" · ".join(f"{part} of {len(widths)} blocks, {widths[0]} wide" for part, widths in blocks.items()))
    print(f"rank {config.rank} · projector's hidden size {config.hidden} · τ {config.tau:g} · scale {config.scale:g} · "
          f"dropout {config.dropout:g}")
    names = ("step", "epoch", "data", "format", "epochs", "batch_size", "lr", "max_seq_len", "seed", "bits", "adapters", "routing")
    known = {name: value for name in names if (value := settings.get(name)) is not None}
    print(" · ".join(f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in known.items()))
    return settings


def main():
    parser = argparse.ArgumentParser(description="Say what is in a LaVIN checkpoint, ours or released.")
    parser.add_argument("file")
    parser.add_argument("--llama", help="the model that it belongs to, for the routing weights (default: as remembered)")
    parser.add_argument("--vit", help="its CLIP (default: as remembered)")
    parser.add_argument("--fold", metavar="DIR", help="write there LLaMA with the adapters merged into it, for text only: "
                        "Meta's layout, fp16, wq, wk and wv with biases")
    args = parser.parse_args()
    settings = describe(args.file)
    llama, vit = args.llama or settings.get("llama"), args.vit or settings.get("vit")
    if not llama or not vit or not os.path.exists(llama) or not os.path.exists(vit):
        if args.fold:
            raise LavinError("--fold needs the LLaMA that the adapters belong to: --llama DIR --vit FILE")
        return print("routing  depends on LLaMA as well: --llama DIR --vit FILE shows it")
    from model import LaVIN, save_folded        # which imports this file

    lavin = LaVIN.load(llama, vit, args.file, delta=settings.get("delta"))
    for i, (text, picture) in enumerate(lavin.route().tolist(), 1):
        print(f"layer {i:3}   text {text[0]:.3f} {text[1]:.3f}   picture {picture[0]:.3f} {picture[1]:.3f}")
    if args.fold:
        save_folded(lavin.fold(0), args.fold)
        print(f"written: {args.fold}, to be asked by python generate.py --llama {args.fold} --vit {vit} --adapter none --prompt …")


if __name__ == "__main__":
    run(main)
