"""LLaMA's matrices in 8 and 4 bits: the size of the errors, the gradient, and the model."""

import weakref

import pytest
import torch

import checkpoints
from conftest import ADAPTER, LLAMA, VIT, difference
from fast import quantize
from fast.quantize import QuantizedLinear
from files import LavinError
from tiny import pretrain, world


def dequantized(linear):
    """The whole matrix (out, in) of a QuantizedLinear, which itself never makes all of it."""
    parts = []
    for rows in linear.tiles:
        parts.append(quantize.dequantize(rows, linear.in_features, *linear.buffers()))
    return torch.cat(parts)


def test_levels_are_qloras():
    """They equal the list in appendix E of the QLoRA paper."""
    published = [
        -1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
    assert difference(quantize.nf4_levels(), torch.tensor(published)) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(352, 128), (128, 352), (64, 3)])
def test_error_of_every_number_is_bounded(bits, shape):
    """Rows of very different sizes.

    With 8 bits, an error is at most half a step of the row's scale. With 4 bits, it is at most half
    the widest gap between two levels, times the block's scale. That scale is itself off by at most
    half a step.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None]
    linear = QuantizedLinear(weight, bits)
    error = (dequantized(linear) - weight).abs()
    if bits == 8:
        bound = weight.abs().amax(1, keepdim=True) / 254
    else:
        blocks = weight.flatten().unflatten(0, (-1, 64))
        largest = blocks.abs().amax(1, keepdim=True)                # (blocks, 1)
        scale_error = (largest - largest.mean()).abs().max() / 254
        half_gap = quantize.nf4_levels().diff().max() / 2
        bound = (largest * half_gap + scale_error).expand(-1, 64).reshape(shape)
    assert (error <= bound * 1.001).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_product_and_gradient_are_those_of_the_dequantized_matrix(bits, monkeypatch):
    monkeypatch.setattr(quantize, "TILE", 128 * 64 * 2)             # three tiles, the last smaller
    linear = QuantizedLinear(torch.randn(352, 128), bits)
    assert len(linear.tiles) == 3
    weight = dequantized(linear)
    x = torch.randn(2, 5, 128, requires_grad=True)
    y = linear(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert difference(y, x @ weight.T) < 1e-4
    assert difference(x.grad, gradient @ weight) < 1e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bias_is_added(bits):
    weight = torch.randn(64, 64)
    bias = torch.randn(64)
    x = torch.randn(2, 5, 64)
    with_bias = QuantizedLinear(weight, bits, bias)(x)
    without = QuantizedLinear(weight, bits)(x)
    assert difference(with_bias, without + bias) < 1e-6


def test_nothing_in_full_size_is_kept_for_backward():
    linear = QuantizedLinear(torch.randn(512, 512), 4)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    def give_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        linear(torch.randn(1, 512, requires_grad=True))
    n_bytes = sum(buffer.nbytes for buffer in linear.buffers())
    assert sum(tensor.nbytes for tensor in kept) == n_bytes
    assert n_bytes < 512 * 512 * 0.53


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_is_the_one_whose_matrices_were_rounded(bits, samples):
    """A quantized LaVIN has the loss and gradients of one with dequantized matrices in fp32."""
    quantized = checkpoints.load(LLAMA, VIT, ADAPTER, bits=bits)
    rounded = checkpoints.load(LLAMA, VIT, ADAPTER)
    n_matrices = 0
    n_numbers = 0
    for name, module in quantized.llama.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = rounded.llama.get_submodule(name)
            linear.weight.data = dequantized(module)
            n_matrices += 1
            n_numbers += linear.weight.numel()
    assert n_matrices == 7 * len(quantized.llama.layers)
    assert n_numbers == quantize.n_quantized(quantized)
    quantized.llama.checkpointing = True        # saved tensors can then be read only once

    loss = quantized(quantized.batch(samples))
    loss.backward()
    gradients = checkpoints.to_official(quantized, grad=True)
    expected_loss = rounded(rounded.batch(samples))
    expected_loss.backward()
    expected_gradients = checkpoints.to_official(rounded, grad=True)
    assert difference(loss, expected_loss) < 1e-5
    for name, gradient in gradients.items():
        assert difference(gradient, expected_gradients[name]) < 1e-5 * gradient.abs().max(), name


def test_matrices_in_full_are_gone_before_the_next_block_is_read(monkeypatch):
    seen = []

    def watched(block, bits):
        assert all(weight() is None for weight in seen)
        seen.append(weakref.ref(block.feed_forward.w1.weight))
        quantize.quantize(block, bits)

    monkeypatch.setattr(checkpoints, "quantize", watched)
    lavin = checkpoints.load(LLAMA, VIT, bits=8)
    assert len(seen) == len(lavin.llama.layers)


@pytest.fixture
def share_of_right_letters(monkeypatch):
    """share_of_right_letters(bits): of several hundred questions of the small world."""
    letter_loss = pretrain.letter_loss
    collected = []

    def collecting(*args):
        loss, is_right = letter_loss(*args)
        collected.append(is_right)
        return loss, is_right

    def share(bits):
        collected.clear()
        lavin = checkpoints.load(world.PATHS["llama"], world.PATHS["vit"], bits=bits)
        pretrain.letter_scores(lavin.llama, lavin.tokenizer, n=20)
        is_right = torch.cat(collected)
        assert len(is_right) > 300
        return is_right.float().mean().item()

    monkeypatch.setattr(pretrain, "letter_loss", collecting)
    return share


def test_the_small_world_in_4_bits_loses_less_than_2_points(share_of_right_letters):
    assert share_of_right_letters(4) > share_of_right_letters(16) - 0.02


def test_what_cannot_be_cut_into_blocks_is_refused():
    with pytest.raises(LavinError, match="--bits 8"):
        QuantizedLinear(torch.randn(9, 7), 4)
