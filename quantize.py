"""LLaMA's frozen matrices in 8 or 4 bits.

8 bits: whole numbers, and a scale for each row. 4 bits: NF4 of QLoRA (arXiv 2305.14314): numbers in blocks of 64, each
divided by the block's largest, are rounded to 16 levels that are equally likely under a normal distribution; the
blocks' scales themselves are kept in 8 bits. That makes 4.13 bits a number.
A matrix is unpacked tile by tile where it is needed, forward and backward: it is never there as a whole. What is trained
is as it was, and so are embeddings, norms and `output`, in 16 bits.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from decode import is_one_token, one_product
from files import LavinError

BLOCK = 64              # numbers that share a scale
GROUP = 256             # scales that share a scale of their own
TILE = 2**22            # numbers that are unpacked at a time, about


def nf4_levels():
    """QLoRA's 16 levels (appendix E): quantiles of the normal distribution, 7 below 0, 0, 8 above, scaled to [-1, 1]."""
    above, below = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1]) for n in (9, 8))
    levels = torch.cat([-below, torch.zeros(1), above.flip(0)])
    return (levels / levels.max()).float()


def pack8(weight):
    """(out, in) -> codes (out, in) int8, scales (out, 1) fp32."""
    scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scales).round().to(torch.int8), scales


def pack4(weight):
    """(out, in) -> codes, two of 4 bits in each uint8; scales as codes int8, their scales and their mean, fp32; and what
    the 256 pairs of codes stand for (256, 2)."""
    if weight.numel() % BLOCK:
        raise LavinError(f"--bits 4: a matrix of {tuple(weight.shape)} cannot be cut into blocks of {BLOCK}; take --bits 8")
    levels = nf4_levels().to(weight.device)
    blocks = weight.flatten().unflatten(0, (-1, BLOCK)).float()
    scales = blocks.abs().amax(1).clamp(min=1e-12)
    codes = torch.bucketize(blocks / scales[:, None], (levels[1:] + levels[:-1]) / 2, out_int32=True)
    codes = codes.to(torch.uint8).unflatten(1, (-1, 2))
    mean = scales.mean()
    groups = F.pad(scales - mean, (0, -len(scales) % GROUP)).unflatten(0, (-1, GROUP))
    of_groups = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    pairs = torch.cartesian_prod(levels, levels)
    return (codes[..., 0] * 16 + codes[..., 1]).flatten(), (groups / of_groups).round().to(torch.int8), of_groups, mean, pairs


def unpack(rows, width, codes, scales, of_groups=None, mean=None, pairs=None):
    """The rows (a slice) of what pack8 or pack4 packed, (rows, width) fp32."""
    if pairs is None:
        return codes[rows] * scales[rows]
    numbers = F.embedding(codes[rows.start * width // 2:rows.stop * width // 2].int(), pairs)
    scales = (scales * of_groups + mean).flatten()[rows.start * width // BLOCK:rows.stop * width // BLOCK]
    return (numbers.view(-1, BLOCK) * scales[:, None]).view(-1, width)


class Product(torch.autograd.Function):
    """x (…, in) -> x Wᵀ (…, out), W packed. Back to x alone, by unpacking W once more: only the codes are kept."""

    @staticmethod
    def forward(ctx, x, tiles, *packed):
        ctx.tiles, ctx.width = tiles, x.shape[-1]
        ctx.save_for_backward(*packed)
        return torch.cat([F.linear(x, unpack(rows, x.shape[-1], *packed).to(x.dtype)) for rows in tiles], dim=-1)

    @staticmethod
    def backward(ctx, gradient):
        dx, packed = 0, ctx.saved_tensors               # asked for once: all that checkpointing allows
        for rows in ctx.tiles:
            dx = dx + gradient[..., rows] @ unpack(rows, ctx.width, *packed).to(gradient.dtype)
        return dx, None, *[None] * len(packed)


class PackedLinear(nn.Module):
    """nn.Linear, its frozen weight packed in 8 or 4 bits; its bias, if any, as it is."""

    def __init__(self, weight, bits, bias=None):
        super().__init__()
        (self.out_features, self.in_features), self.bias = weight.shape, bias
        for i, tensor in enumerate({8: pack8, 4: pack4}[bits](weight)):
            self.register_buffer(f"packed{i}", tensor, persistent=False)
        step = max(1, TILE // self.in_features // BLOCK) * BLOCK        # whole blocks
        starts = range(0, self.out_features, step)
        self.tiles = [slice(start, min(start + step, self.out_features)) for start in starts]

    def forward(self, x):
        if is_one_token(x):
            y = one_product(unpack(slice(0, self.out_features), self.in_features, *self.buffers()), x)
        else:
            y = Product.apply(x, self.tiles, *self.buffers())
        return y if self.bias is None else y + self.bias


def pack(block, bits):
    """Replace the matrices of one of LLaMA's blocks, all seven."""
    for module in (block.attention, block.feed_forward):
        for name, linear in list(module.named_children()):
            setattr(module, name, PackedLinear(linear.weight.detach(), bits, linear.bias))


def packed(module):
    """How many numbers are packed in a module."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, PackedLinear))
