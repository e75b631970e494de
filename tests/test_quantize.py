"""LLaMA's matrices in 8 and 4 bits: how far off, the same gradient, the same model."""

import weakref

import pytest
import torch

import adapters
import quantize
import tiny
from conftest import ADAPTER, LLAMA, VIT, difference
from files import LavinError
from model import LaVIN


def unpacked(linear):
    return torch.cat([quantize.unpack(rows, linear.in_features, *linear.buffers()) for rows in linear.tiles])


def test_levels_are_qloras():
    """Its appendix E lists them."""
    published = [-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0,
                 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
    assert difference(quantize.nf4_levels(), torch.tensor(published)) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(352, 128), (128, 352), (64, 3)])
def test_error_of_every_number_is_bounded(bits, shape):
    """8 bits: half a step of the row's scale. 4 bits: half the widest gap between levels, of the block's scale; the
    scale itself is half a step of its own scale off."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0])[:, None]
    linear = quantize.PackedLinear(weight, bits)
    error = (unpacked(linear) - weight).abs()
    if bits == 8:
        bound = weight.abs().amax(1, keepdim=True) / 254
    else:
        largest = weight.flatten().unflatten(0, (-1, 64)).abs().amax(1, keepdim=True)
        off = (largest - largest.mean()).abs().max() / 254
        bound = (largest * quantize.nf4_levels().diff().max() / 2 + off).expand(-1, 64).reshape(shape)
    assert (error <= bound * 1.001).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_product_and_gradient_are_those_of_the_unpacked_matrix(bits, monkeypatch):
    monkeypatch.setattr(quantize, "TILE", 128 * 64 * 2)             # several tiles, the last one smaller
    linear = quantize.PackedLinear(torch.randn(352, 128), bits)
    assert len(linear.tiles) == 3
    x = torch.randn(2, 5, 128, requires_grad=True)
    y, weight = linear(x), unpacked(linear)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert difference(y, x @ weight.T) < 1e-4 and difference(x.grad, gradient @ weight) < 1e-4


def test_nothing_in_full_size_is_kept_for_the_way_back():
    linear, kept = quantize.PackedLinear(torch.randn(512, 512), 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(torch.randn(1, 512, requires_grad=True))
    packed = sum(b.nbytes for b in linear.buffers())
    assert sum(t.nbytes for t in kept) == packed and packed < 512 * 512 * 0.53


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_model_is_the_one_whose_matrices_were_rounded(bits, samples):
    packed, rounded = (LaVIN.load(LLAMA, VIT, ADAPTER, bits=b) for b in (bits, 16))
    names = [name for name, module in packed.llama.named_modules() if isinstance(module, quantize.PackedLinear)]
    assert len(names) == 7 * len(packed.llama.layers)
    for name in names:
        rounded.llama.get_submodule(name).weight.data = unpacked(packed.llama.get_submodule(name))
    losses, gradients = [], []
    packed.llama.checkpointing = True                               # which reads what is kept for the way back once only
    for lavin in (packed, rounded):
        losses.append(lavin(lavin.batch(samples)))
        losses[-1].backward()
        gradients.append(adapters.to_official(lavin, grad=True))
    assert difference(*losses) < 1e-5
    for name, gradient in gradients[0].items():
        assert difference(gradient, gradients[1][name]) < 1e-5 * max(1, gradient.abs().max()), name


def test_matrices_in_full_are_gone_before_the_next_block_is_read(monkeypatch):
    pack, seen = quantize.pack, []

    def watched(block, bits):
        assert not any(weight() is not None for weight in seen)
        seen.append(weakref.ref(block.feed_forward.w1.weight))
        pack(block, bits)

    monkeypatch.setattr(quantize, "pack", watched)
    assert len(LaVIN.load(LLAMA, VIT, bits=8).llama.layers) == len(seen)


def test_the_small_world_in_4_bits_loses_less_than_2_points():
    scores = []
    for bits in (16, 4):
        lavin = LaVIN.load(tiny.PATHS["llama"], tiny.PATHS["vit"], bits=bits)
        of_skills = tiny.letter_scores(lavin.llama, lavin.tokenizer, n=5)
        scores.append(sum(of_skills.values()) / len(of_skills))
    assert scores[1] > scores[0] - 2


def test_what_cannot_be_cut_into_blocks_is_refused():
    with pytest.raises(LavinError, match="--bits 8"):
        quantize.PackedLinear(torch.randn(9, 7), 4)
