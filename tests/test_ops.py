"""fast/ops.py: every function gives the same as a few plain lines."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from adapters import Adapter, AdapterConfig
from conftest import ROOT, difference, relative_error
from fast.ops import (add_experts, attend_in_groups, attention, cross_entropy, is_one_token,
                      one_token_product, similar_lengths)
from model import LLaMAConfig, attend_to_each, rope_angles, rope_frequencies, rotate

BF16_ERROR = 2**-8      # the relative error of rounding to bf16


# rotate


HEADS_OF_16 = LLaMAConfig(dim=48, n_heads=3)


def plain_rotate(x, cos, sin):
    """a' = a cos − b sin, b' = a sin + b cos, for pairs (a, b) of neighbouring channels."""
    rotated = torch.empty_like(x)
    a = x[..., 0::2]
    b = x[..., 1::2]
    rotated[..., 0::2] = a * cos - b * sin
    rotated[..., 1::2] = a * sin + b * cos
    return rotated


def compile_recording(function):
    """Compile a function -> (the compiled function, a list that gets the source of every graph)."""
    sources = []

    def backend(graph_module, inputs):
        sources.append(graph_module.code)
        return graph_module.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True), sources


@pytest.mark.parametrize("positions", [
    torch.arange(7)[None],
    torch.tensor([[0, 1, 2, 3, 0, 1, 2], [3, 9, 81, 500, 2047, 0, 5]]),
], ids=["one row of positions", "one for each sample"])
@pytest.mark.parametrize("compiled", [False, True])
def test_rotate(positions, compiled):
    """Values and gradients of both branches equal those of the plain lines in fp32."""
    function = rotate
    sources = []
    if compiled:
        function, sources = compile_recording(rotate)
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 16, requires_grad=True)
    gradient = torch.randn(2, 7, 3, 16)
    rope = rope_angles(positions, rope_frequencies(HEADS_OF_16))

    rotated = function(x, rope)
    expected = plain_rotate(x, *rope)
    assert rotated.shape == x.shape
    assert difference(rotated, expected) < 1e-6
    x_grad, = torch.autograd.grad(rotated, x, gradient)
    expected_grad, = torch.autograd.grad(expected, x, gradient)
    assert difference(x_grad, expected_grad) < 1e-6
    if compiled:
        assert len(sources) == 1
        assert "complex" not in sources[0]          # the branch for the compiler


@pytest.mark.parametrize("compiled", [False, True])
def test_rotate_computes_in_fp32(compiled):
    """Input and output are in bf16. Only the result is rounded."""
    function = rotate
    if compiled:
        function, _ = compile_recording(rotate)
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 16).bfloat16()
    rope = rope_angles(torch.arange(7)[None], rope_frequencies(HEADS_OF_16))
    rotated = function(x, rope)
    expected = plain_rotate(x.float(), *rope)
    assert rotated.dtype == torch.bfloat16
    error = (rotated.float() - expected).abs()
    assert (error <= BF16_ERROR * expected.abs() + 1e-6).all()


# attention


def random_attention(n_tokens, dtype, n_heads=6, n_kv_heads=2):
    """Queries, keys and values of one row, and a gradient for the output."""
    torch.manual_seed(0)
    q = torch.randn(1, n_heads, n_tokens, 16, dtype=dtype, requires_grad=True)
    k = torch.randn(1, n_kv_heads, n_tokens, 16, dtype=dtype, requires_grad=True)
    v = torch.randn(1, n_kv_heads, n_tokens, 16, dtype=dtype, requires_grad=True)
    return q, k, v, torch.randn(1, n_heads, n_tokens, 16, dtype=dtype)


def values_and_gradients(function, q, k, v, gradient):
    y = function(q, k, v)
    return y, *torch.autograd.grad(y, (q, k, v), gradient)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype, allowed", [
    (torch.float32, 1e-6), (torch.bfloat16, 4 * BF16_ERROR), (torch.float16, 1e-2)])
def test_attention(is_causal, dtype, allowed):
    """Values and gradients are those of the formula in fp64, with keys for several queries."""
    q, k, v, gradient = random_attention(9, dtype)

    def formula(q, k, v):
        k = k.repeat_interleave(3, dim=1)
        v = v.repeat_interleave(3, dim=1)
        scores = q @ k.transpose(-1, -2) / 4
        if is_causal:
            later = torch.ones(9, 9, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-1) @ v

    def fast(q, k, v):
        return attention(q, k, v, is_causal)

    found = values_and_gradients(fast, q, k, v, gradient)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = values_and_gradients(formula, *exact, gradient.double())
    for a, b in zip(found, expected):
        assert a.dtype == dtype
        assert relative_error(a, b) < allowed


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [6, 1, 5, 3], [9, 30, 10, 1, 8, 31]])
def test_attend_in_groups(lengths):
    """One call for each group gives what one call for each sample gives, with gradients."""
    q, k, v, gradient = random_attention(sum(lengths), torch.float32)

    def loop(q, k, v):
        return attend_to_each(q, k, v, torch.tensor(lengths))

    def grouped(q, k, v):
        return attend_in_groups(q, k, v, torch.tensor(lengths))

    found = values_and_gradients(grouped, q, k, v, gradient)
    expected = values_and_gradients(loop, q, k, v, gradient)
    for a, b in zip(found, expected):
        assert a.shape == b.shape
        assert difference(a, b) < 1e-6


def test_a_group_has_samples_of_similar_length():
    assert similar_lengths([20]) == [[0]]
    assert similar_lengths([20, 22, 21]) == [[0, 2, 1]]
    assert similar_lengths([70, 20, 60, 21]) == [[1, 3], [2, 0]]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (64,), generator=generator).tolist()
    groups = similar_lengths(lengths)
    assert sorted(sum(groups, [])) == list(range(64))       # each sample once
    assert len(groups) < 16
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert len(sizes) * max(sizes) ** 2 <= 1.5 * sum(size ** 2 for size in sizes)


# add_experts


def with_gradients(function, inputs, adapter, out_grad):
    """Return the result, and the gradients of the inputs and the adapter's two parameters.

    inputs: y, h and w.
    """
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    gradients = torch.autograd.grad(
        result, [*inputs, adapter.up, adapter.up_bias], out_grad.type_as(result))
    return [result, *gradients]


@pytest.mark.parametrize("n_weights", [7, 1], ids=["each token", "each sample"])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_add_experts(n_weights, dtype, allowed):
    """It equals y + s · Adapter.mixed, the paper's formula. bf16 means autocast."""
    torch.manual_seed(0)
    adapter = Adapter(64, AdapterConfig(scale=0.5))
    for p in (adapter.up, adapter.up_bias):
        torch.nn.init.normal_(p)
    y = torch.randn(3, 7, 64)
    h = torch.randn(3, 7, 8)
    w = torch.randn(3, n_weights, 2).softmax(-1)
    out_grad = torch.randn(3, 7, 64)

    def add_plain(y, h, w):
        return y + adapter.scale * adapter.mixed(h, w)

    def add_fast(y, h, w):
        return add_experts(y, adapter.scale, h, w, adapter.up, adapter.up_bias)

    exact = with_gradients(add_plain, (y, h, w), adapter, out_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        fast = with_gradients(add_fast, (y.to(dtype), h, w), adapter, out_grad)
        plain = with_gradients(add_plain, (y.to(dtype), h, w), adapter, out_grad)
    assert fast[0].dtype == dtype
    names = ("value", "gradient of y", "gradient of h", "gradient of w", "gradient of up",
             "gradient of up_bias")
    for name, a, b, c in zip(names, fast, plain, exact):
        assert a.shape == b.shape, name
        assert relative_error(a.float(), b.float()) < allowed, name
        assert relative_error(a.float(), c) < allowed, name


@pytest.mark.parametrize("n_weights", [7, 1], ids=["each token", "each sample"])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_an_adapter_mixes_as_the_paper_does(n_weights, dtype, allowed):
    """Adapter.forward, which calls add_experts, equals y + s · Adapter.mixed."""
    torch.manual_seed(0)
    adapter = Adapter(64, AdapterConfig(scale=0.5)).eval()
    for p in (adapter.up, adapter.up_bias):
        torch.nn.init.normal_(p)
    y = torch.randn(3, 7, 64).to(dtype)
    w = torch.randn(3, n_weights, 2).softmax(-1)
    expected = y.float() + 0.5 * adapter.mixed(adapter.down(y.float()), w)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        adapted = adapter(y, w)
    assert adapted.dtype == dtype
    assert relative_error(adapted.float(), expected) < allowed


# cross_entropy


@pytest.mark.parametrize("n", [0, 1, 128, 300])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_cross_entropy(n, dtype, allowed):
    """The loss equals F.cross_entropy's: with a gradient that is scaled, and without a gradient."""
    torch.manual_seed(0)
    x = torch.randn(n, 32).to(dtype).requires_grad_()
    weight = torch.randn(500, 32).to(dtype)
    targets = torch.randint(0, 500, (n,))
    expected = F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")
    expected_grad, = torch.autograd.grad(3 * expected, x)

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = cross_entropy(x, weight, targets)
        with torch.no_grad():                       # then no gradient is computed
            assert cross_entropy(x, weight, targets) == loss
    x_grad, = torch.autograd.grad(3 * loss, x)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert difference(loss, expected) <= allowed * max(1, expected)
    assert x_grad.shape == x.shape
    assert x_grad.dtype == dtype
    assert difference(x_grad, expected_grad) <= allowed * 3 * weight.abs().max()


# one_token_product


@pytest.mark.parametrize("n_out", [352, 64, 13, 3])
@pytest.mark.parametrize("x_dtype, weight_dtype", [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),                # as in a compiled step of a bf16 model
    (torch.bfloat16, torch.bfloat16),
])
def test_one_token_product(n_out, x_dtype, weight_dtype):
    """It equals F.linear in fp32. The sum is not rounded, only the result if it is bf16."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 128).to(x_dtype)
    weight = torch.randn(n_out, 128).to(weight_dtype)
    product = one_token_product(weight, x)
    expected = F.linear(x.float(), weight.float())
    assert product.shape == (1, 1, n_out)
    assert product.dtype == x_dtype
    error = (product.float() - expected).abs()
    rounding = BF16_ERROR if x_dtype == torch.bfloat16 else 0
    assert (error <= rounding * expected.abs() + 1e-4).all()


def test_one_token_product_rounds_less_than_a_product_in_bf16():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 4096)
    weight = torch.randn(64, 4096).bfloat16()
    exact = F.linear(x, weight.float())
    usual = F.linear(x.bfloat16(), weight)
    assert relative_error(one_token_product(weight, x), exact) < 1e-5
    assert relative_error(usual.float(), exact) > 1e-3


def test_only_a_compiled_step_of_one_row_is_one_token():
    """The shape has to be (1, 1, C), the step compiled, and gradients off."""
    def answer(x):
        return x + 1 if is_one_token(x) else x

    compiled, _ = compile_recording(answer)
    zero = torch.zeros(1, 1, 4)
    with torch.no_grad():
        assert difference(compiled(zero), 1) == 0
        assert difference(answer(zero), 0) == 0
        for shape in ((2, 1, 4), (1, 2, 4), (1, 4)):
            assert difference(compiled(torch.zeros(shape)), 0) == 0
    assert difference(compiled(zero), 0) == 0       # training


# keep_freed_memory


MEMORY = """
import torch
from fast.ops import keep_freed_memory

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024

def growth():
    before = resident()
    large = torch.ones(2**24)           # 64 MB
    del large
    return resident() - before

growth()
print(growth())
keep_freed_memory()
print(growth())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_set", [False, True])
def test_freed_memory_is_kept(is_set):
    """Measure the MB that stay after a tensor of 64 MB is freed, before the call and after it."""
    environment = {name: os.environ[name] for name in os.environ if "MALLOC_" not in name}
    if is_set:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)      # a user's own choice stays
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, env=environment,
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    before, after = [float(line) for line in result.stdout.split()]
    assert before < 8
    if is_set:
        assert after < 8
    else:
        assert after > 56
