"""Folding: merge the adapters into the matrices that read their output.

A folded model runs nearly as fast as plain LLaMA. For one modality, the routing weights w are
constants (router.py). The adapter is then a single affine map, A(y) = y + U (D y + d) + u. D and d
are the weight and bias of `down`. U and u are the weights and biases of the two experts, mixed by w
and scaled by s. So each matrix W that reads A(y) can absorb the adapter exactly:

    W A(y) = (W + W U D) y + W (U d + u)

The ViT keeps its adapters. There, every token of a picture has its own w, so no constant matrix
can absorb them.
"""

import copy
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import Adapter
from model import LaVIN


class NoAdapter(nn.Module):
    """Replaces an adapter that was merged into wq, wk and wv."""

    def forward(self, y, w):
        return y


class ConstantAdapter(nn.Module):
    """y + U (D y + d) + u: an adapter with its experts already mixed.

    It is used in front of quantized matrices. Merging into one would round it a second time.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)     # D (r, C)
        self.up = nn.Parameter(up, requires_grad=False)         # U (C, r)
        self.bias = nn.Parameter(bias, requires_grad=False)     # U d + u (C,)

    def forward(self, y, w):
        return y + F.linear(F.linear(y, self.down), self.up, self.bias)


def constant_matrices(adapter: Adapter, w: torch.Tensor):
    """Return U (C, r) and U d + u (C,) of an adapter with the routing weights w (E,)."""
    up = 0
    for w_e, expert in zip(w, adapter.up):
        # The two groups of an expert form one block-diagonal matrix.
        up = up + w_e * torch.block_diag(*expert.chunk(2))      # (C, r)
    up = adapter.scale * up
    bias = adapter.scale * (w @ adapter.up_bias) + up @ adapter.down.bias
    return up, bias


def merge(adapter: Adapter, w: torch.Tensor, matrices: list[nn.Module],
          dtype: torch.dtype) -> nn.Module:
    """Merge an adapter into the matrices that read its output -> the module that replaces it."""
    up, bias = constant_matrices(adapter, w)
    down = adapter.down.weight                                  # (r, C)
    if not isinstance(matrices[0], nn.Linear):                  # quantized
        return ConstantAdapter(down.to(dtype), up.to(dtype), bias.to(dtype))
    for linear in matrices:
        W = linear.weight.float()
        merged_bias = W @ bias
        if linear.bias is not None:                             # in Qwen2, or folded earlier
            merged_bias = linear.bias.float() + merged_bias
        merged = torch.addmm(W, W @ up, down)                   # W + W U D
        linear.weight = nn.Parameter(merged.to(dtype), requires_grad=False)
        linear.bias = nn.Parameter(merged_bias.to(dtype), requires_grad=False)
    return NoAdapter()


@torch.no_grad()
def fold(lavin: LaVIN, modality: int) -> LaVIN:
    """Return a LaVIN for one modality (0: text only, 1: with a picture). Its LLaMA has no adapters.

    wq, wk and wv are merged copies. All other tensors are shared with `lavin`, which does not
    change. Quantized matrices are shared too: a ConstantAdapter stays in front of them.
    Call this in eval mode, so that dropout does not change the routing weights.
    Raises ValueError if `lavin` is already folded or if there is no such modality.
    """
    if lavin.folded_for is not None:
        raise ValueError(f"fold({modality}): this LaVIN is already folded for {lavin.folded_for}")
    if modality not in (0, 1):
        raise ValueError(f"fold({modality}): the modalities are 0 and 1")
    # deepcopy shares the objects in its memo instead of copying them.
    shared = [*lavin.parameters(), *lavin.buffers(), lavin.tokenizer]
    folded = copy.deepcopy(lavin, memo={id(thing): thing for thing in shared})
    dtype = lavin.llama.norm.weight.dtype
    routed = lavin.route()                                      # (L, 2 modalities, E experts)
    for block, w in zip(folded.llama.layers, routed[:, modality]):
        attention = block.attention
        matrices = [attention.wq, attention.wk, attention.wv]
        block.adapter = merge(block.adapter, w, matrices, dtype)
    folded.folded_for = modality
    folded.llama.config = dataclasses.replace(
        lavin.llama.config, attention_bias=True, folded=True)
    return folded
