"""The model: its sizes, and that it equals itself by every other way of computing it."""

import dataclasses
import json

import pytest
import torch

import adapters
import data
from adapters import AdapterConfig
from conftest import ADAPTER, LLAMA, VIT, difference
from model import CrossEntropy, LaVIN, LLaMA, LLaMAConfig, RMSNorm, allocate, read_params, rotate
from vit import ViTConfig


def test_norms_are_computed_in_fp32_whatever_the_products_are():
    """Autocast computes some sums in bf16 (linalg.vecdot's, for one); a norm's must not be."""
    norm, x = RMSNorm(128, 1e-5), torch.randn(7, 128) * 3
    norm.weight.data.fill_(1.0)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(norm(x), expected) < 1e-5


# Sizes


@pytest.mark.parametrize("config, trained", [
    (LLaMAConfig(), 3_781_296),
    # 13B: 40 layers of (5120·8 + 8) + 2·(5120·4 + 5120) + (5120·2 + 2), the ViT's 491,760, the projector's
    # 1024·128 + 128 + 128·5120 + 5120, the embedding's 2·5120
    (LLaMAConfig(dim=5120, n_layers=40, n_heads=40), 40 * 102_410 + 491_760 + 791_680 + 10_240),
], ids=["7B", "13B"])
def test_trained_parameters(config, trained):
    with torch.device("meta"):
        lavin = LaVIN(config, ViTConfig(), AdapterConfig(), None, 512)
    assert sum(p.numel() for p in lavin.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize("params, hidden, kv", [
    ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-6}, 11008, 32),
    ({"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256, "norm_eps": 1e-6}, 13824, 40),
    ({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
      "norm_eps": 1e-5}, 28672, 8),
], ids=["7B", "13B", "LLaMA-2 70B"])
def test_params_json(tmp_path, params, hidden, kv):
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    config = read_params(tmp_path, 32000)
    assert (config.hidden_dim, config.n_kv_heads, config.vocab_size) == (hidden, kv, 32000)


def random_llama(config, seed=0):
    torch.manual_seed(seed)
    llama = LLaMA(config, AdapterConfig()).eval()
    allocate(llama.modules(), "cpu", torch.float32)
    for p in llama.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return llama


SMALL = LLaMAConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32, multiple_of=32)


def test_grouped_query_attention_is_attention_with_repeated_keys():
    grouped = random_llama(SMALL)
    full = random_llama(dataclasses.replace(SMALL, n_kv_heads=4))
    state = grouped.state_dict()
    for name in state:
        if ".wk." in name or ".wv." in name:
            state[name] = state[name].unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x, w = torch.randn(2, 5, 64), torch.full((2, 2, 1, 2), 0.5)
    assert difference(grouped(x, w), full(x, w)) < 1e-5


def test_rope_theta_is_honoured_and_only_differences_of_positions_matter():
    llama, other = random_llama(SMALL), random_llama(dataclasses.replace(SMALL, rope_theta=500000.0))
    x, w = torch.randn(1, 40, 64), torch.full((2, 1, 1, 2), 0.5)
    assert difference(llama(x, w), other(x, w)) > 1e-2
    assert difference(llama(x, w), llama(x, w, positions=torch.arange(7, 47)[None])) < 1e-5
    assert difference(llama.rope(torch.tensor(3))[0], torch.cos(3 / 10000 ** (torch.arange(0, 16, 2) / 16))) < 1e-6


# Equivalences


def test_the_modality_token_may_be_left_out_of_the_sequence(lavin, samples):
    """DESIGN §2 the long way: the token in front, a mask that hides it, the weights read off it in every layer."""
    batch = lavin.batch(samples[:1])
    x = torch.cat([lavin.modality_embedding[batch.modality[:1]][None], lavin.embed(batch)], dim=1)
    T = x.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[1:, 0] = False
    rope = lavin.llama.rope(torch.arange(T))

    def attend(attention, y):
        q, k, v = (linear(y).unflatten(-1, (-1, attention.head_dim)) for linear in (attention.wq, attention.wk, attention.wv))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))
        scores = (q @ k.transpose(-1, -2) / attention.head_dim ** 0.5).masked_fill(~mask, -torch.inf)
        return attention.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    for layer in lavin.llama.layers:
        y = layer.attention_norm(x)
        x = x + attend(layer.attention, layer.adapter(y, layer.adapter.router(y[:, :1])))
        x = x + layer.feed_forward(layer.ffn_norm(x))
    assert difference(lavin.llama.output(lavin.llama.norm(x))[:, 1:], lavin.logits(batch).detach()) < 2e-5


def test_a_picture_has_the_same_features_in_any_company(lavin, samples):
    pixels = lavin.batch(samples).pixels
    both = lavin.image_features(pixels)
    for i in range(2):
        assert difference(both[i], lavin.image_features(pixels[i:i + 1])[0].detach()) < 1e-5


def test_text_only_samples_never_enter_the_vit(lavin, samples, monkeypatch):
    seen = []
    monkeypatch.setattr(lavin.vit, "forward", lambda pixels: seen.append(len(pixels)) or torch.zeros(len(pixels), 2, 64))
    lavin(lavin.batch([samples[1], samples[3]]))
    assert seen == []
    lavin(lavin.batch(samples))
    assert seen == [2]


def test_logits_are_computed_only_where_there_is_a_label(lavin, samples, monkeypatch):
    rows, apply = [], CrossEntropy.apply
    monkeypatch.setattr(CrossEntropy, "apply", lambda x, *rest: rows.append(x.shape) or apply(x, *rest))
    batch = lavin.batch(samples)
    lavin(batch)
    assert rows == [(batch.n_answer, 64)] and batch.n_answer < len(batch.tokens) / 2


@pytest.mark.parametrize("n", [0, 1, 128, 300])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_cross_entropy_by_parts_is_that_of_the_whole(n, dtype, allowed):
    """Its loss, and its gradient under a factor; without one to be made, the loss alone."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(n, 32).to(dtype).requires_grad_(), torch.randn(500, 32).to(dtype), torch.randint(0, 500, (n,))
    whole = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight).float(), targets, reduction="sum")
    theirs, = torch.autograd.grad(3 * whole, x)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = CrossEntropy.apply(x, weight, targets)
        with torch.no_grad():
            assert CrossEntropy.apply(x, weight, targets) == loss
    ours, = torch.autograd.grad(3 * loss, x)
    assert ours.dtype == dtype and (difference(ours, theirs) if n else 0) <= allowed * 3 * weight.abs().max()
    assert loss.dtype == torch.float32 and difference(loss, whole) <= allowed * max(1, whole)


def test_fresh_adapters_are_the_identity():
    """Text-only loss does not depend on what is random in them: routers, down-projections, modality tokens."""
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        lavin = LaVIN.load(LLAMA, VIT)
        losses.append(lavin(lavin.batch([data.Sample("Name a metal.", " Iron.")])).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(samples, expected, dtype):
    lavin = LaVIN.load(LLAMA, VIT, ADAPTER, dtype=dtype)
    assert {p.dtype for p in lavin.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lavin.parameters() if not p.requires_grad} == {dtype}
    loss = lavin(lavin.batch(samples))
    loss.backward()
    assert loss.dtype == torch.float32 and difference(loss, expected["loss_batch"]) < 0.02 * expected["loss_batch"]
    assert lavin.logits(lavin.batch(samples)).dtype == torch.float32
    assert len(lavin.generate(samples, 3)) == 4


def test_checkpointing_changes_nothing(lavin, samples):
    batch = lavin.batch(samples)
    lavin(batch).backward()
    plain = {name: g.clone() for name, g in adapters.to_official(lavin, grad=True).items()}
    lavin.zero_grad()
    lavin.llama.checkpointing = lavin.vit.checkpointing = True
    lavin(batch).backward()
    for name, gradient in adapters.to_official(lavin, grad=True).items():
        assert difference(gradient, plain[name]) == 0, name
