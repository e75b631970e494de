"""Adapter and router are compared with the paper's formulas in the authors' own modules."""

import pytest
import torch
import torch.nn as nn

import checkpoints
from adapters import Adapter, AdapterConfig
from conftest import ADAPTER, difference
from router import Router

PREFIXES = ("layers.2.adapter_attn", "backbone.visual.transformer.resblocks.5.adapter_attn")


def official_conv(state, name):
    """A convolution with the weights of the official file.

    Its kernel has length 1. The down-projection conv_A has one group. The experts' up-projections,
    conv_B and conv_D, have two groups, so each weight sees only half of the input channels.
    """
    weight = state[f"{name}.weight"]                                # (out, in / groups, 1)
    groups = 1 if name.endswith("conv_A") else 2
    conv = nn.Conv1d(weight.shape[1] * groups, weight.shape[0], 1, groups=groups)
    conv.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"]})
    return conv


def apply_conv(conv, x):
    """(B, T, in) -> (B, T, out). Conv1d expects the channels before the time."""
    return conv(x.transpose(1, 2)).transpose(1, 2)


def our_adapter(state, prefix, config):
    """An Adapter with the same weights."""
    width = state[f"{prefix}.conv_A.weight"].shape[1]
    adapter = Adapter(width, config).eval()
    with torch.no_grad():
        adapter.down.weight.copy_(state[f"{prefix}.conv_A.weight"][..., 0])
        adapter.down.bias.copy_(state[f"{prefix}.conv_A.bias"])
        for e, name in enumerate(("conv_B", "conv_D")):
            adapter.up[e].copy_(state[f"{prefix}.{name}.weight"][..., 0])
            adapter.up_bias[e].copy_(state[f"{prefix}.{name}.bias"])
        adapter.router.weight.copy_(state[f"{prefix}.expert_weights.weight"])
        adapter.router.bias.copy_(state[f"{prefix}.expert_weights.bias"])
    return adapter


@pytest.fixture(scope="module")
def state():
    state, _, _ = checkpoints.read_adapter(ADAPTER)
    return state


def random_weights(*shape):
    """Random weights of two experts: positive, with sum 1."""
    return torch.rand(*shape, 2).softmax(-1)


# The adapter


@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_adapter_is_the_identity(training):
    """This is exact, with or without dropout, for any weights of the experts."""
    torch.manual_seed(0)
    adapter = Adapter(64, AdapterConfig()).train(training)
    y = torch.randn(2, 5, 64)
    for w in (random_weights(2, 5), random_weights(2, 1)):
        assert difference(adapter(y, w), y) == 0


@pytest.mark.parametrize("prefix", PREFIXES, ids=["LLaMA", "ViT"])
@pytest.mark.parametrize("n_weights", [5, 1], ids=["each token", "each sample"])
def test_mixed_is_two_grouped_convolutions(state, prefix, n_weights):
    """Adapter.mixed equals w0 conv_B(h) + w1 conv_D(h)."""
    torch.manual_seed(0)
    adapter = our_adapter(state, prefix, AdapterConfig())
    h = torch.randn(3, 5, 8)
    w = random_weights(3, n_weights)
    conv_B = official_conv(state, f"{prefix}.conv_B")
    conv_D = official_conv(state, f"{prefix}.conv_D")
    expected = w[..., :1] * apply_conv(conv_B, h) + w[..., 1:] * apply_conv(conv_D, h)
    assert expected.abs().max() > 0.1
    assert difference(adapter.mixed(h, w), expected) < 1e-6


@pytest.mark.parametrize("prefix", PREFIXES, ids=["LLaMA", "ViT"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_forward_is_the_papers_formula(state, prefix, scale):
    """A(y; w) = y + s (w0 up0(h) + w1 up1(h)) with h = down(y), written with convolutions."""
    torch.manual_seed(0)
    adapter = our_adapter(state, prefix, AdapterConfig(scale=scale))
    y = torch.randn(3, 5, adapter.down.in_features)
    w = random_weights(3, 5)
    h = apply_conv(official_conv(state, f"{prefix}.conv_A"), y)
    up_0 = apply_conv(official_conv(state, f"{prefix}.conv_B"), h)
    up_1 = apply_conv(official_conv(state, f"{prefix}.conv_D"), h)
    expected = y + scale * (w[..., :1] * up_0 + w[..., 1:] * up_1)
    assert difference(adapter(y, w), expected) < 1e-6


def test_the_loaded_model_has_the_official_weights(lavin, state):
    """checkpoints.load gives the adapters of LLaMA and of the ViT the weights in the file."""
    blocks = (lavin.llama.layers[2], lavin.vit.resblocks[5])
    for block, prefix in zip(blocks, PREFIXES):
        expected = our_adapter(state, prefix, lavin.adapter_config)
        ours = dict(block.adapter.named_parameters())
        for name, p in expected.named_parameters():
            assert difference(ours[name], p) == 0, name


# The router


def test_weights_are_the_papers_softmax_and_sum_to_1():
    """softmax((y W + b) / τ), in fp32 even under autocast."""
    torch.manual_seed(0)
    router = Router(64, 5.0)
    y = torch.randn(2, 7, 64)
    w = router(y)
    logits = (y @ router.weight.T + router.bias) / 5.0
    exp = logits.exp()
    assert w.shape == (2, 7, 2)
    assert difference(w, exp / exp.sum(-1, keepdim=True)) < 1e-6
    assert difference(w.sum(-1), 1) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        half = router(y)
    assert half.dtype == torch.float32
    assert difference(half.sum(-1), 1) < 1e-6
    assert difference(half, w) < 1e-2


def test_a_larger_tau_is_closer_to_one_half():
    """This holds for every token, from τ = 1 over 5 and 10 to 100."""
    torch.manual_seed(0)
    router = Router(64, 1.0)
    y = torch.randn(2, 7, 64)
    distances = []
    for tau in (1.0, 5.0, 10.0, 100.0):
        router.tau = tau
        distances.append((router(y) - 0.5).abs())
    for nearer, farther in zip(distances[1:], distances):
        assert (nearer < farther).all()
    assert distances[-1].max() < 0.01


def test_routes_sum_to_1_and_move_towards_one_half_with_tau(lavin):
    routed = lavin.route()
    assert routed.shape == (4, 2, 2)
    assert difference(routed.sum(-1), 1) < 1e-6
    for layer in lavin.llama.layers:
        layer.adapter.router.tau = 1e4
    assert difference(lavin.route(), 0.5) < 1e-3
