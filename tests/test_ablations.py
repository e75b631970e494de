"""The flags for the rows of the paper's ablation: what they train, and that checkpoints keep it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import checkpoints
import data
import generate
import train
from adapters import Adapter, AdapterConfig
from conftest import ADAPTER, LLAMA, VIT, difference, flags
from extras import runs
from extras.serve import Desk
from fast import ranks
from fast.fold import fold
from helpers import assert_same_run, checkpoint_of, read_metrics
from model import LaVIN, LLaMAConfig
from vit import ViTConfig

VIT_B_16 = ViTConfig(width=768, layers=12, patch=16)
SINGLE = ("--experts", 1, "--rank", 4, "--hidden", 32, "--scale", 0.5, "--weight-decay", 0.1,
          "--clip", 0.01)


def trained_adapter(config):
    torch.manual_seed(0)
    adapter = Adapter(64, config).eval()
    for p in (adapter.up, adapter.up_bias):
        torch.nn.init.normal_(p)
    return adapter


# A single expert


def test_a_single_expert_is_a_plain_adapter():
    """y + s up(down(y)), without routing."""
    adapter = trained_adapter(AdapterConfig(experts=1, scale=0.5))
    y = torch.randn(2, 5, 64)
    w = adapter.router(y)
    assert w.shape == (2, 5, 1) and (w == 1).all()
    plain = y + 0.5 * adapter.expert(0, adapter.down(y))
    assert difference(adapter(y, w), plain) < 1e-6
    h = adapter.down(y)
    assert difference(adapter.mixed(h, w), adapter.expert(0, h)) < 1e-6
    assert not list(adapter.router.parameters())


def test_a_single_expert_folds(samples):
    lavin = checkpoints.load(LLAMA, VIT, fresh=AdapterConfig(experts=1))
    for module in lavin.modules():
        if isinstance(module, Adapter):
            torch.nn.init.normal_(module.up, std=0.1)
    text = [sample for sample in samples if sample.image is None]
    batch = lavin.batch(text)
    assert Desk(lavin, {}, compiled=False).route == []          # the page shows no routing
    with torch.no_grad():
        assert difference(fold(lavin, 0).logits(batch), lavin.logits(batch)) < 1e-4


# The paper's rows, on ScienceQA with LLaMA-7B


@pytest.mark.parametrize("vit_config, experts, adapters, images, n_trained", [
    (VIT_B_16, 1, "llama", False, 1_704_192),       # text only
    (VIT_B_16, 1, "llama", True, 2_331_008),        # pictures, adapters in LLaMA only
    (VIT_B_16, 1, "all", True, 2_450_912),          # in the ViT as well
    (ViTConfig(), 1, "all", True, 2_683_456),       # a larger ViT
    (ViTConfig(), 2, "all", True, 3_781_296)])      # mixture of modality, with routing
def test_what_each_row_of_the_paper_trains(
        lavin, vit_config, experts, adapters, images, n_trained):
    with torch.device("meta"):
        whole = LaVIN(LLaMAConfig(), vit_config, AdapterConfig(experts=experts),
                      lavin.tokenizer, 512)
    settings = SimpleNamespace(
        adapters=adapters, images=images, experts=experts, routing=True)
    runs.freeze(whole, settings)
    assert sum(p.numel() for p in whole.parameters() if p.requires_grad) == n_trained


@pytest.mark.parametrize("row", ["--experts=1", "--no-routing"])
def test_a_modality_embedding_that_nothing_reads_counts_as_frozen(call, sqa, tmp_path, row):
    code, stdout, stderr = call(train, *flags(sqa, tmp_path / "out", row, "--dry-run"))
    assert code == 0, stderr
    trained, frozen = stdout.split("trained ")[1].splitlines()[:2]
    assert "modality embedding" not in trained
    assert "modality embedding 128" in frozen


def test_without_pictures_none_is_looked_at(call, sqa, tmp_path):
    """Training, scoring and generate.py do not even open their files."""
    for path in sqa.rglob("*.png"):
        path.unlink()
    out = tmp_path / "out"
    code, stdout, stderr = call(
        train, *flags(sqa, out, "--no-images", "--captions", "--max-steps", 2, "--eval-limit", 3))
    assert code == 0, stderr
    assert "24 samples, 0 with a picture" in stdout
    assert "projector" not in stdout.split("trained ")[1].splitlines()[0]
    assert checkpoint_of(out)["config"]["images"] is False
    code, stdout, stderr = call(
        generate, "--data", "sqa", "--data-root", sqa, "--adapter", out / "checkpoint.pth",
        "--max-new-tokens", 2)
    assert code == 0, stderr
    assert "12 outputs" in stdout


# All ablations together, in a checkpoint


def test_a_run_with_other_sizes_is_remembered_loaded_and_resumed(call, sqa, tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    assert call(train, *flags(sqa, whole, *SINGLE, "--max-steps", 4))[0] == 0
    assert call(train, *flags(sqa, parts, *SINGLE, "--max-steps", 2))[0] == 0
    assert call(train, "--resume", "--out", parts, "--max-steps", 4)[0] == 0
    assert_same_run(whole, parts)

    state = checkpoint_of(whole)["model"]
    assert not [name for name in state if "conv_D" in name or "expert_weights" in name]
    loaded = checkpoints.load(LLAMA, VIT, whole / "checkpoint.pth").adapter_config
    assert dataclasses.replace(loaded, dropout=0.1) == AdapterConfig(
        rank=4, projector_dim=32, scale=0.5, experts=1)
    code, stdout, stderr = call(checkpoints, whole / "checkpoint.pth")
    assert code == 0, stderr
    assert "rank 4 · projector's hidden size 32" in stdout
    assert "the adapters have a single expert" in stdout
    code, _, stderr = call(generate, "--show-routing", "--adapter", whole / "checkpoint.pth")
    assert code == 2
    assert "a single expert" in stderr


@pytest.mark.parametrize("flag, value", [
    ("--experts", 1), ("--rank", 4), ("--hidden", 32), ("--scale", 0.5), ("--tau", 7)])
def test_adapters_of_other_sizes_are_not_begun_with(fails, sqa, tmp_path, flag, value):
    fails(train, *flags(sqa, tmp_path / "out", "--adapter", ADAPTER, flag, value), says=[
        f"{flag} {value}", "the adapters of the checkpoint have"])


def test_an_odd_rank_is_refused(fails, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "out", "--rank", 5), says=["--rank", "even"])


def test_a_long_gradient_is_cut(lavin, samples):
    settings = train.Settings()
    optimizer = train.make_optimizer(lavin, settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    buffer = ranks.gradient_buffer(lavin)
    encoded = [lavin.encode(sample) for sample in samples]
    batch = data.collate(encoded, lavin.resolution)
    _, norm = train.train_step(lavin, optimizer, scaler, buffer, [batch])
    whole = buffer.clone()
    _, norm_again = train.train_step(lavin, optimizer, scaler, buffer, [batch], clip=norm / 4)
    assert norm_again == norm                       # the norm before clipping
    assert difference(buffer, whole / 4) < 1e-6
    train.train_step(lavin, optimizer, scaler, buffer, [batch], clip=norm * 4)
    assert torch.equal(buffer, whole)


def test_the_norm_in_the_log_is_that_of_the_whole_gradient(call, sqa, tmp_path):
    out = tmp_path / "out"
    assert call(train, *flags(sqa, out, "--clip", 1e-6, "--max-steps", 2))[0] == 0
    assert read_metrics(out)[1]["grad_norm"] > 1e-6
