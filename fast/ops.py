"""Fast versions of single operations. Each equals a few plain lines (tests/test_ops.py).

    multiply_complex    RoPE's rotation of every pair of channels, without torch.compile
    attention           PyTorch's fused attention, or matrix products where those are faster
    attend_in_groups    causal attention, in one call for all samples of similar length
    add_experts         an adapter's output: its input plus both experts, weighted by the router
    cross_entropy       the summed loss, without the logits of all tokens in memory at once
    one_token_product   a matrix times a single token, at memory bandwidth
    keep_freed_memory   a setting of the C library, for training on a CPU
"""

import contextlib
import ctypes
import math
import os
import sys

import torch
import torch.nn.functional as F

LOGIT_ROWS = {"cpu": 128, "cuda": 1024}     # rows of logits that the loss computes at a time


def multiply_complex(pairs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotation in model.rotate, as complex numbers: (a + ib)(cos + i sin).

    pairs (..., D/2, 2), the last dimension holds a and b; cos and sin (..., D/2) -> like pairs.
    This takes one pass over memory instead of seven. torch.compile cannot compile complex numbers.
    """
    turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
    return torch.view_as_real(turned)


_acts_as_gpu = False


@contextlib.contextmanager
def acting_as_gpu():
    """Inside this context, tensors on the CPU take the GPU's path in attention and in the loss.

    extras/estimate.py computes the memory of a GPU on fake tensors, which are on the CPU.
    """
    global _acts_as_gpu
    _acts_as_gpu = True
    try:
        yield
    finally:
        _acts_as_gpu = False


def is_on_cpu(x: torch.Tensor) -> bool:
    """Does x take the CPU's path? Not inside acting_as_gpu."""
    return x.device.type == "cpu" and not _acts_as_gpu


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              is_causal: bool = False) -> torch.Tensor:
    """F.scaled_dot_product_attention: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D).

    On a CPU, the backward of PyTorch's fused kernel is slow in half precision. There, training uses
    plain matrix products, which keep all T² scores in memory. In bf16 on two Intel cores, forward
    and backward for 8 heads take 2.4 instead of 3.4 ms for 256 tokens, 5.2 instead of 8.9 ms for
    512, and 3 instead of 15 ms for 32 samples of 25 tokens (python -m bench.speed attention).
    """
    grouped = q.shape[1] != k.shape[1]      # several query heads share a key head, as in LLaMA 3
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    if not is_on_cpu(q) or not is_half or not q.requires_grad:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=grouped)
    if grouped:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)        # (B, H, T, D)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)        # (B, H, T, D)
    T = q.shape[2]
    mask = torch.zeros(T, T, dtype=q.dtype)
    if is_causal:
        mask = mask.fill_(-math.inf).triu(1)
    # The mask plus the scaled scores in one call, for all B·H heads.
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2),
                           alpha=q.shape[-1] ** -0.5)                   # (B H, T, T)
    y = scores.softmax(-1) @ v.flatten(0, 1)                            # (B H, T, D)
    return y.unflatten(0, q.shape[:2])                                  # (B, H, T, D)


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """The samples in groups of similar length, as lists of indices.

    Within a group, padding every sample to the longest adds at most half to the number of scores.
    """
    groups = []
    n_scores = 0                            # of the last group, without padding
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        n_scores += lengths[i] ** 2
        if groups and (len(groups[-1]) + 1) * lengths[i] ** 2 <= 1.5 * n_scores:
            groups[-1].append(i)
        else:
            groups.append([i])
            n_scores = lengths[i] ** 2
    return groups


def padded_rows(lengths: list[int]) -> tuple[list[list[int]], list[torch.Tensor], torch.Tensor]:
    """How concatenated samples become rows, each padded to the longest of its group.

    A slot is one place in a row.
    -> (groups, sources, slots). groups: as in similar_lengths. sources: for each group, the index
    of the token that fills each slot of its rows, (rows · longest,). slots: for each token, its
    slot among those of all groups, (T,).
    """
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes                                    # (n,)
    groups = similar_lengths(lengths)
    sources = []
    first_slots = [0] * len(lengths)        # each sample's first slot
    n_slots = 0
    for group in groups:
        longest = lengths[group[-1]]
        # Padding repeats a sample's last token.
        inside = torch.arange(longest).minimum(sizes[group, None] - 1)  # (rows, longest)
        sources.append((starts[group, None] + inside).flatten())
        for i in group:
            first_slots[i] = n_slots
            n_slots += longest
    shifts = torch.tensor(first_slots) - starts                         # (n,)
    n_tokens = sum(lengths)
    shifts = shifts.repeat_interleave(sizes, output_size=n_tokens)      # (T,)
    slots = torch.arange(n_tokens) + shifts
    return groups, sources, slots


# torch.compiler.disable would import the compiler: two more seconds at every start.
@torch._disable_dynamo
def attend_in_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                     lengths: torch.Tensor) -> torch.Tensor:
    """model.attend_to_each, with one call for all samples of similar length.

    q (1, H, T, D), k and v (1, K, T, D) -> (1, H, T, D). Within a group, each sample gets a row of
    its own, as long as the longest. The padding comes last, so the causal mask hides it from all
    real tokens. This is for CPUs: a GPU would wait for the indices in every layer.
    """
    groups, sources, slots = padded_rows(lengths.tolist())
    sizes = [len(indices) for indices in sources]
    sources = torch.cat(sources)
    picked = []
    for x in (q, k, v):
        # Once for all groups: the backward of each index_select takes a pass over all tokens.
        x = x[0].transpose(0, 1).index_select(0, sources)               # (slots, H, D)
        picked.append(x.split(sizes))
    outputs = []
    for group, *qkv in zip(groups, *picked):
        rows = [x.unflatten(0, (len(group), -1)).transpose(1, 2) for x in qkv]
        y = attention(*rows, is_causal=True)                            # (rows, H, longest, D)
        outputs.append(y.transpose(1, 2).flatten(0, 1))                 # (rows longest, H, D)
    y = torch.cat(outputs).index_select(0, slots)                       # (T, H, D)
    return y.transpose(0, 1)[None]                                      # (1, H, T, D)


def add_experts(y: torch.Tensor, scale: float, h: torch.Tensor, w: torch.Tensor,
                up: torch.Tensor, up_bias: torch.Tensor) -> torch.Tensor:
    """y + scale · (w0 up0(h) + w1 up1(h)) as a single matrix product.

    y (B, T, C), h (B, T, r), w (B, T or 1, E), up (E, C, r/2), up_bias (E, C) -> (B, T, C), with
    E = 2 experts. Adapter.mixed is the plain form of the sum.

    Each expert reads h in two groups, so it is a block-diagonal matrix (r, C). The weighted sum of
    both experts is then one product: [w0 h, w1 h, w0, w1] times a stack of the two matrices and the
    two biases. torch.addmm adds it to y in the same pass. On two CPU cores, forward and backward,
    the plain form takes 1.7 times as long at width 128, 2.8 times at 512 and 3.6 times at 4096
    (python -m bench.speed experts).
    """
    matrices = [torch.block_diag(*expert.chunk(2)).T for expert in up]      # (r, C) each
    stacked = torch.cat([*matrices, up_bias])                   # (E r + E, C)
    weighted = w.unsqueeze(-1) * h.unsqueeze(-2)                # (B, T, E, r)
    w = w.expand(*h.shape[:-1], -1)                             # (B, T, E)
    coefficients = torch.cat([weighted.flatten(-2), w], dim=-1)     # (B, T, E r + E)
    adapted = torch.addmm(y.flatten(0, 1), coefficients.flatten(0, 1), stacked, alpha=scale)
    return adapted.view_as(y).type_as(y)                        # (B, T, C)


class _CrossEntropy(torch.autograd.Function):
    """cross_entropy, below. forward also computes the gradient; backward only scales it."""

    @staticmethod
    def forward(ctx, x, weight, targets, n_rows):
        loss = torch.zeros((), device=x.device)
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for start in range(0, len(x), n_rows):
            rows = slice(start, start + n_rows)
            target = targets[rows, None]                        # (rows, 1)
            # The logits get no name, so that their memory is freed and reused immediately.
            log_p = F.linear(x[rows], weight).log_softmax(-1, dtype=torch.float32)
            loss -= log_p.gather(1, target).sum()
            if x_grad is not None:
                # d loss / d logits = softmax − one-hot. In place: this saves a pass over memory.
                gradient = log_p.exp_()
                minus_one = -torch.ones_like(target, dtype=gradient.dtype)
                gradient.scatter_add_(1, target, minus_one)
                x_grad[rows] = gradient @ weight
        ctx.save_for_backward(x_grad)
        return loss

    @staticmethod
    def backward(ctx, loss_grad):
        (x_grad,) = ctx.saved_tensors
        return x_grad * loss_grad, None, None, None


def cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                  n_rows: int | None = None) -> torch.Tensor:
    """F.cross_entropy(x @ weight.T, targets, reduction="sum") for a frozen weight: fp32, scalar.

    x (N, C), weight (vocabulary, C), targets (N,) int64. n_rows: how many rows of logits to compute
    at a time (default: LOGIT_ROWS of the device).

    Logits are large: 32,000 numbers for each answer token. Backward only needs the gradient of x.
    So we take a few rows at a time, and compute their gradient while they are in the CPU's cache.
    All rows' logits are never in memory together, and neither are their softmax and gradients.
    """
    if weight.requires_grad:
        raise ValueError("this loss gives the weight no gradient; train with F.cross_entropy")
    if n_rows is None:
        n_rows = LOGIT_ROWS["cpu" if is_on_cpu(x) else "cuda"]
    return _CrossEntropy.apply(x, weight, targets, n_rows)


def is_one_token(x: torch.Tensor) -> bool:
    """Is this a compiled decoding step for a single token, x (1, 1, C)?

    Such a step is memory-bound: it takes as long as reading the weights does.
    """
    if not torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.dim() == 3 and x.shape[0] == 1 and x.shape[1] == 1


def one_token_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x (1, 1, in) times weight (out, in) -> (1, 1, out), as a sum in fp32.

    The compiler turns this sum into one pass over the weight, which includes the dequantization.
    A matrix product of a single token reads the weight more slowly, in any dtype.
    """
    # On a CPU, one loop over four parts together reads the weight faster than one long sum.
    n_parts = 4 if x.device.type == "cpu" else 1
    x_flat = x.flatten().float()
    sums = [(part.float() * x_flat).sum(-1) for part in weight.chunk(n_parts)]
    return torch.cat(sums).type_as(x).view(1, 1, -1)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, unless the environment sets MALLOC_….

    By default, glibc returns the memory of large tensors to the system. The system then clears
    every page of the next tensor, which takes 2 to 10 % of a training step on a CPU.
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    if is_set or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)            # the C library of this process
    if hasattr(libc, "mallopt"):        # only glibc has it
        libc.mallopt(-4, 0)             # M_MMAP_MAX: no separate mapping for each large tensor
        libc.mallopt(-1, -1)            # M_TRIM_THRESHOLD: never return memory
