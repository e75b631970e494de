"""Quantization of LLaMA's frozen matrices to 8 or 4 bits.

8 bits: integers, with one scale per row.
4 bits: QLoRA's NF4 (arXiv 2305.14314). Each block of 64 numbers is divided by its largest absolute
value. The results are rounded to 16 levels, which are equally likely under a normal distribution.
The scales of the blocks are rounded to 8-bit integers (in QLoRA, to 8-bit floats). That makes 4.13
bits per number.

Forward and backward dequantize a matrix tile by tile, so the full matrix never exists. Trained
parameters are not quantized. Neither are the embeddings, norms and `output`: they keep their dtype.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from fast.ops import is_one_token, one_token_product
from files import LavinError

BLOCK = 64              # numbers that share a scale
GROUP = 256             # scales that share a second-level scale
TILE = 2**22            # numbers dequantized at a time, approximately


def nf4_levels() -> torch.Tensor:
    """QLoRA's 16 levels (appendix E): quantiles of the normal distribution, scaled to [-1, 1].

    7 levels are below 0, 8 are above 0, and one is 0.
    """
    def quantiles(n):
        p = torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1]
        return torch.special.ndtri(p)

    levels = torch.cat([-quantiles(8), torch.zeros(1), quantiles(9).flip(0)])
    return (levels / levels.max()).float()


def quantize_8bit(weight: torch.Tensor):
    """(out, in) -> codes (out, in) int8 and scales (out, 1) fp32."""
    largest = weight.float().abs().amax(1, keepdim=True)
    scales = largest.clamp(min=1e-12) / 127
    codes = (weight / scales).round().to(torch.int8)
    return codes, scales


def quantize_4bit(weight: torch.Tensor):
    """(out, in) -> (codes, scale_codes, group_scales, mean, pairs).

    codes (out · in / 2,): uint8, two 4-bit codes in each. scale_codes (groups, 256): int8, the
    blocks' scales, quantized in groups after subtracting their mean (). group_scales (groups, 1):
    the scale of each group. pairs (256, 2): the two levels of each uint8.
    """
    if weight.numel() % BLOCK:
        shape = tuple(weight.shape)
        raise LavinError(f"--bits 4: a matrix of {shape} cannot be divided into blocks of {BLOCK}; "
                         "use --bits 8")
    levels = nf4_levels().to(weight.device)
    blocks = weight.flatten().unflatten(0, (-1, BLOCK)).float()             # (blocks, 64)
    scales = blocks.abs().amax(1).clamp(min=1e-12)                          # (blocks,)
    boundaries = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales[:, None], boundaries, out_int32=True)
    codes = codes.to(torch.uint8).unflatten(1, (-1, 2))                     # (blocks, 32, 2)
    codes = (codes[..., 0] * 16 + codes[..., 1]).flatten()
    pairs = torch.cartesian_prod(levels, levels)                            # (256, 2)

    mean = scales.mean()
    padding = -len(scales) % GROUP
    groups = F.pad(scales - mean, (0, padding)).unflatten(0, (-1, GROUP))   # (groups, 256)
    group_scales = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    scale_codes = (groups / group_scales).round().to(torch.int8)
    return codes, scale_codes, group_scales, mean, pairs


def dequantize(rows: slice, width: int, codes, scales, group_scales=None, mean=None, pairs=None):
    """Some rows of a matrix from quantize_8bit or quantize_4bit: (rows, width) fp32.

    The arguments after `width` are what one of these two returned.
    """
    if pairs is None:                                                       # 8 bits
        return codes[rows] * scales[rows]
    scale_codes = scales
    first = rows.start * width
    last = rows.stop * width
    numbers = F.embedding(codes[first // 2:last // 2].int(), pairs)         # (…, 2)
    block_scales = (scale_codes * group_scales + mean).flatten()            # (blocks,)
    block_scales = block_scales[first // BLOCK:last // BLOCK]
    return (numbers.view(-1, BLOCK) * block_scales[:, None]).view(-1, width)


class QuantizedProduct(torch.autograd.Function):
    """x (…, in) -> x Wᵀ (…, out) for a quantized W.

    Backward dequantizes W again, so only the codes are kept between the two passes. W is frozen, so
    only x gets a gradient.
    """

    @staticmethod
    def forward(ctx, x, tiles, *quantized):
        width = x.shape[-1]
        ctx.tiles = tiles
        ctx.width = width
        ctx.save_for_backward(*quantized)
        outputs = []
        for rows in tiles:
            W = dequantize(rows, width, *quantized).to(x.dtype)
            outputs.append(F.linear(x, W))
        return torch.cat(outputs, dim=-1)

    @staticmethod
    def backward(ctx, gradient):
        quantized = ctx.saved_tensors       # checkpointing lets us read these only once
        x_grad = 0
        for rows in ctx.tiles:
            W = dequantize(rows, ctx.width, *quantized).to(gradient.dtype)
            x_grad = x_grad + gradient[..., rows] @ W
        return x_grad, None, *[None] * len(quantized)


class QuantizedLinear(nn.Module):
    """nn.Linear with a frozen weight in 8 or 4 bits. A bias is not quantized."""

    def __init__(self, weight: torch.Tensor, bits: int, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        tensors = quantize_8bit(weight) if bits == 8 else quantize_4bit(weight)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"quantized{i}", tensor, persistent=False)
        n_rows = max(1, TILE // self.in_features // BLOCK) * BLOCK          # whole blocks
        self.tiles = []
        for start in range(0, self.out_features, n_rows):
            self.tiles.append(slice(start, min(start + n_rows, self.out_features)))

    def forward(self, x):
        if is_one_token(x):
            all_rows = slice(0, self.out_features)
            W = dequantize(all_rows, self.in_features, *self.buffers())
            y = one_token_product(W, x)
        else:
            y = QuantizedProduct.apply(x, self.tiles, *self.buffers())
        if self.bias is not None:
            y = y + self.bias
        return y


def quantize(block: nn.Module, bits: int) -> None:
    """Quantize the seven matrices of one LLaMA block in place."""
    for module in (block.attention, block.feed_forward):
        for name, linear in list(module.named_children()):
            quantized = QuantizedLinear(linear.weight.detach(), bits, linear.bias)
            setattr(module, name, quantized)


def n_quantized(module: nn.Module) -> int:
    """How many numbers of a module are quantized."""
    total = 0
    for child in module.modules():
        if isinstance(child, QuantizedLinear):
            total += child.in_features * child.out_features
    return total
