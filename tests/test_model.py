"""The model: its sizes, and that different ways to compute it give the same result."""

import dataclasses
import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import checkpoints
import data
import model
import vit
from adapters import AdapterConfig
from conftest import ADAPTER, LLAMA, VIT, difference
from fast import engine
from model import LaVIN, LLaMA, LLaMAConfig, RMSNorm, pick, rotate
from vit import LayerNorm, ViTConfig


def test_norms_are_computed_in_fp32_whatever_the_products_are():
    """Autocast computes some sums in bf16, such as linalg.vecdot's. A norm's sum stays in fp32."""
    norm = RMSNorm(128, 1e-5)
    norm.weight.data.fill_(1.0)
    x = torch.randn(7, 128) * 3
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(norm(x), expected) < 1e-5


@pytest.mark.parametrize("make_norm", [lambda: RMSNorm(128, 1e-5), lambda: LayerNorm(128)])
def test_norms_do_not_overflow_in_fp16(make_norm):
    """The square of 300 is beyond fp16's largest number."""
    norm = make_norm().half()
    norm.weight.data.fill_(1.0)
    signs = torch.tensor([1.0, -1.0]).repeat(64)
    assert difference(norm(300 * signs.half()).float(), signs) < 1e-3


# Sizes


# 40 adapters of LLaMA, all adapters of the ViT, the projector, the modality embedding
TRAINED_13B = (
    40 * ((5120 * 8 + 8) + 2 * (5120 * 4 + 5120) + (5120 * 2 + 2))
    + 491_760
    + (1024 * 128 + 128) + (128 * 5120 + 5120)
    + 2 * 5120)


@pytest.mark.parametrize("config, trained", [
    (LLaMAConfig(), 3_781_296),
    (LLaMAConfig(dim=5120, n_layers=40, n_heads=40), TRAINED_13B),
], ids=["7B", "13B"])
def test_trained_parameters(config, trained):
    with torch.device("meta"):
        lavin = LaVIN(config, ViTConfig(), AdapterConfig(), None, 512)
    assert sum(p.numel() for p in lavin.parameters() if p.requires_grad) == trained


PARAMS_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-6}
PARAMS_13B = {"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256, "norm_eps": 1e-6}
PARAMS_70B = {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096,
              "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}


@pytest.mark.parametrize("params, hidden, kv", [
    (PARAMS_7B, 11008, 32),
    (PARAMS_13B, 13824, 40),
    (PARAMS_70B, 28672, 8),
], ids=["7B", "13B", "LLaMA-2 70B"])
def test_params_json(tmp_path, params, hidden, kv):
    """From Meta's params.json we compute the sizes that the checkpoints have."""
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    config = checkpoints.read_params(tmp_path, 32000)
    assert config.hidden_dim == hidden
    assert config.n_kv_heads == kv
    assert config.vocab_size == 32000


# LLaMA, with random weights


SMALL = LLaMAConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32, multiple_of=32)


def random_llama(config, seed=0):
    torch.manual_seed(seed)
    llama = LLaMA(config, AdapterConfig()).eval()
    checkpoints.allocate(llama.modules(), "cpu", torch.float32)
    for p in llama.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return llama


def test_grouped_query_attention_is_attention_with_repeated_keys():
    """2 key heads for 4 query heads give the same as 4 key heads that are equal in pairs."""
    grouped = random_llama(SMALL)
    full = random_llama(dataclasses.replace(SMALL, n_kv_heads=4))
    state = grouped.state_dict()
    for name in state:
        if ".wk." in name or ".wv." in name:
            heads = state[name].unflatten(0, (2, 16))
            state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 5, 64)
    w = torch.full((2, 2, 1, 2), 0.5)
    assert difference(grouped(x, w), full(x, w)) < 1e-5


def test_rope_theta_is_honoured_and_only_differences_of_positions_matter():
    llama = random_llama(SMALL)
    other = random_llama(dataclasses.replace(SMALL, rope_theta=500000.0))
    x = torch.randn(1, 40, 64)
    w = torch.full((2, 1, 1, 2), 0.5)
    assert difference(llama(x, w), other(x, w)) > 1e-2
    shifted = torch.arange(7, 47)[None]
    assert difference(llama(x, w), llama(x, w, positions=shifted)) < 1e-5
    cosines, _ = llama.rope(torch.tensor(3))
    angles = 3 / 10000 ** (torch.arange(0, 16, 2) / 16)
    assert difference(cosines, torch.cos(angles)) < 1e-6


def test_samples_in_a_row_are_samples_alone():
    """attend with lengths gives the same as one call for each sample."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 9, 16)
    k = torch.randn(1, 2, 9, 16)
    v = torch.randn(1, 2, 9, 16)
    lengths = torch.tensor([4, 1, 4])
    together = model.attend(q, k, v, lengths)
    alone = []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        part = slice(start, end)
        alone.append(model.attend(q[:, :, part], k[:, :, part], v[:, :, part]))
    assert difference(together, torch.cat(alone, dim=2)) < 1e-6


# Equivalences


def masked_attention(attention, y, rope, mask):
    """Attention, written out: softmax(q k / sqrt(D)) v, with weight 0 where the mask is False."""
    q = attention.wq(y).unflatten(-1, (-1, attention.head_dim))     # (B, T, H, D)
    k = attention.wk(y).unflatten(-1, (-1, attention.head_dim))
    v = attention.wv(y).unflatten(-1, (-1, attention.head_dim))
    q = rotate(q, rope).transpose(1, 2)                             # (B, H, T, D)
    k = rotate(k, rope).transpose(1, 2)
    v = v.transpose(1, 2)
    scores = q @ k.transpose(-1, -2) / attention.head_dim ** 0.5    # (B, H, T, T)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return attention.wo((p @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("number", range(4))
def test_the_modality_token_may_be_left_out_of_the_sequence(lavin, samples, number):
    """The paper's way gives the same logits as ours.

    In the paper, the token stands in front of the sequence, and a mask hides it. Every layer
    computes the experts' weights from it.
    """
    batch = lavin.batch([samples[number]])
    token = lavin.modality_embedding[batch.modality[:1]]            # (1, C)
    x = torch.cat([token[None], lavin.embed(batch)], dim=1)
    T = x.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[1:, 0] = False
    rope = lavin.llama.rope(torch.arange(T))
    for layer in lavin.llama.layers:
        y = layer.attention_norm(x)
        w = layer.adapter.router(y[:, :1])
        x = x + masked_attention(layer.attention, layer.adapter(y, w), rope, mask)
        x = x + layer.feed_forward(layer.ffn_norm(x))
    logits = lavin.llama.output(lavin.llama.norm(x))
    assert difference(logits[:, 1:], lavin.logits(batch)) < 2e-5


def test_a_picture_has_the_same_features_in_any_company(lavin, samples):
    pixels = lavin.batch(samples).pixels
    both = lavin.image_features(pixels)
    for i in range(2):
        alone = lavin.image_features(pixels[i:i + 1])
        assert difference(both[i], alone[0]) < 1e-5


def test_text_only_samples_never_enter_the_vit(lavin, samples, monkeypatch):
    seen = []

    def counted(pixels):
        seen.append(len(pixels))
        return torch.zeros(len(pixels), 2, 64)

    monkeypatch.setattr(lavin.vit, "forward", counted)
    lavin(lavin.batch([samples[1], samples[3]]))
    assert seen == []
    lavin(lavin.batch(samples))
    assert seen == [2]


def test_logits_are_computed_only_where_there_is_a_label(lavin, samples, monkeypatch):
    shapes = []
    cross_entropy = model.cross_entropy

    def watched(x, *others):
        shapes.append(tuple(x.shape))
        return cross_entropy(x, *others)

    monkeypatch.setattr(model, "cross_entropy", watched)
    batch = lavin.batch(samples)
    lavin(batch)
    assert shapes == [(batch.n_answer, 64)]
    assert batch.n_answer < len(batch.tokens) / 2


def test_the_loss_is_the_mean_over_the_labels_of_the_logits(lavin, samples):
    """The loss of forward equals the loss computed from all logits."""
    batch = lavin.batch(samples)
    logits = lavin.logits(batch)
    log_p = []
    ends = batch.lengths.cumsum(0).tolist()
    for i, (length, end) in enumerate(zip(batch.lengths.tolist(), ends)):
        labels = batch.labels[end - length:end]
        for t in range(1, length):
            if labels[t] != data.IGNORED:
                log_p.append(logits[i, t - 1].log_softmax(-1)[labels[t]])
    assert len(log_p) == batch.n_answer
    assert difference(lavin(batch), -torch.stack(log_p).mean()) < 1e-5


def test_fresh_adapters_are_the_identity():
    """Their random weights do not change a loss: routers, down-projections, modality tokens."""
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        lavin = checkpoints.load(LLAMA, VIT)
        batch = lavin.batch([data.Sample("Name a metal.", " Iron.")])
        losses.append(lavin(batch).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(samples, expected, dtype):
    """Frozen weights have this dtype and trained ones fp32. The loss is within 2 % of fp32's."""
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER, dtype=dtype)
    for name, p in lavin.named_parameters():
        expected_dtype = torch.float32 if p.requires_grad else dtype
        assert p.dtype == expected_dtype, name
    loss = lavin(lavin.batch(samples))
    loss.backward()
    assert loss.dtype == torch.float32
    assert difference(loss, expected["loss_batch"]) < 0.02 * expected["loss_batch"]
    assert lavin.logits(lavin.batch(samples)).dtype == torch.float32
    assert len(lavin.generate(samples, 3)) == 4
    assert len(engine.generate(lavin, samples, 3)) == 4


def test_checkpointing_changes_nothing(lavin, samples, monkeypatch):
    """Gradients are equal to the bit, with recomputed and with stored activations.

    The model is in train mode, so the recomputed dropout must have the same masks.
    """
    checkpointed = []

    def counted(layer, *args, **options):
        checkpointed.append(layer)
        return checkpoint(layer, *args, **options)

    monkeypatch.setattr(model, "checkpoint", counted)
    monkeypatch.setattr(vit, "checkpoint", counted)
    lavin.train()
    batch = lavin.batch(samples)
    torch.manual_seed(0)
    lavin(batch).backward()
    assert not checkpointed
    plain = {}
    for name, gradient in checkpoints.to_official(lavin, grad=True).items():
        plain[name] = gradient.clone()
    lavin.zero_grad()
    lavin.llama.checkpointing = True
    lavin.vit.checkpointing = True
    torch.manual_seed(0)
    lavin(batch).backward()
    assert checkpointed == [*lavin.vit.resblocks, *lavin.llama.layers]
    for name, gradient in checkpoints.to_official(lavin, grad=True).items():
        assert difference(gradient, plain[name]) == 0, name


# Picking a token


def test_pick_takes_the_likeliest_at_temperature_0():
    logits = torch.tensor([[0.1, 2.0, 1.9], [3.0, -1.0, 0.0]])
    assert pick(logits, 0.0, 1.0).tolist() == [1, 0]


def test_pick_draws_from_the_nucleus_in_proportion():
    """Of the probabilities 0.5, 0.3, 0.15 and 0.05, top_p 0.7 keeps the first two, as 5 to 3."""
    torch.manual_seed(0)
    p = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = p.log().expand(4000, 4)
    drawn = pick(logits, 1.0, 0.7).bincount(minlength=4) / 4000
    assert difference(drawn, torch.tensor([0, 0.625, 0, 0.375])) < 0.03
    drawn = pick(logits, 1.0, 1.0).bincount(minlength=4) / 4000
    assert difference(drawn, p) < 0.03
    assert set(pick(logits, 1.0, 0.0).tolist()) == {1}
