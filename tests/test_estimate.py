"""Memory and arithmetic of training, computed: against real tensors, and against themselves."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import train
from conftest import LLAMA, VIT
from extras import estimate
from extras.estimate import LiveBytes, Memory
from fast import ranks
from fast.ops import LOGIT_ROWS
from test_train import flags


@pytest.fixture(scope="module")
def shape():
    """The golden model's, with two layers of LLaMA and four of the ViT."""
    settings = train.Settings(llama=str(LLAMA), vit=str(VIT))
    return estimate.read_shape(settings).with_layers(2, 4)


@pytest.fixture
def batch(lavin, samples):
    """The golden samples, two of them with a picture, as a model of four ViT layers reads them."""
    lavin.n_features = 1
    encoded = [lavin.encode(sample) for sample in samples]
    return estimate.blank(encoded, lavin.resolution)


def steps(shape, settings, batch, fake):
    """What steps_memory finds for one batch, with fake tensors or real ones."""
    live = LiveBytes(shape.llama.vocab_size)
    lavin = shape.on_meta()
    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True), live:
            return estimate.steps_memory(lavin, settings, [batch], live)
    with live:
        return estimate.steps_memory(lavin, settings, [batch], live)


# LiveBytes


def test_live_bytes_of_a_product_worked_out_by_hand():
    """a and b of 6 numbers each, the product of 4 while it lives; a view takes nothing."""
    with LiveBytes(vocab_size=7) as live:
        a = torch.zeros(2, 3)
        b = torch.zeros(3, 2)
        assert live.live == 4 * 12
        product = a @ b
        view = product[0]
        del product
        assert live.live == 4 * 16
        del view
        assert live.live == 4 * 12
        assert live.peak == 4 * 16
        live.restart()
        logits = torch.zeros(5, 7)
        assert live.peak == 4 * (12 + 35) and live.logits_at_peak == 4 * 35
        del a, b, logits
    assert live.live == live.live_logits == 0


def test_live_bytes_are_rounded_to_blocks():
    with LiveBytes(vocab_size=7, block=512) as live:
        tensors = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
        assert live.live == 512 + 512 + 1024
        del tensors


# Memory


@pytest.mark.parametrize("dtype, bits", [("fp32", 16), ("bf16", 16), ("bf16", 8), ("bf16", 4)])
def test_fake_tensors_take_what_real_ones_take(shape, batch, dtype, bits):
    """To the byte, part by part, with and without checkpointing."""
    settings = train.Settings(dtype=dtype, bits=bits)
    fake = steps(shape, settings, batch, fake=True)
    real = steps(shape, settings, batch, fake=False)
    assert fake == real
    assert fake[False, 0].activations > fake[True, 0].activations > 0


def test_weights_and_trained_are_what_the_model_holds(shape, batch):
    memory = steps(shape, train.Settings(dtype="bf16"), batch, fake=True)[False, 0]
    lavin = shape.on_meta()
    n_frozen = sum(p.numel() for p in lavin.parameters() if not p.requires_grad)
    trained = [p for p in lavin.parameters() if p.requires_grad]
    n_trained = sum(p.numel() for p in trained)
    assert memory.weights == 2 * n_frozen
    # In fp32: a parameter, its gradient, AdamW's two moments; AdamW counts each one's steps.
    assert memory.trained == 4 * (4 * n_trained + len(trained))


def test_a_step_takes_as_much_as_the_training_loops(shape, batch):
    """train.train_step holds the numbers that it looks at, a few bytes more."""
    live = LiveBytes(shape.llama.vocab_size)
    with live:
        lavin = shape.on_meta()
        estimate.give_memory(lavin, torch.float32, 16)
        for p in lavin.parameters():
            torch.nn.init.normal_(p, std=0.02)
        optimizer = train.make_optimizer(lavin, train.Settings())
        gradients = ranks.gradient_buffer(lavin)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        peaks = []
        for _ in range(2):          # the first one makes the moments
            live.restart()
            estimate.take_step(lavin, optimizer, gradients, batch)
        peaks.append(live.peak)
        live.restart()
        train.train_step(lavin, optimizer, scaler, gradients, [batch])
        peaks.append(live.peak)
    assert peaks[0] <= peaks[1] <= peaks[0] + 100


def test_small_models_give_the_large_ones_memory(shape, batch):
    """Five layers of LLaMA and twelve of the ViT, from models of one and two, four and eight.

    All gradients are one tensor, and the allocator rounds that once.
    """
    settings = train.Settings(dtype="bf16", bits=4)
    large = shape.with_layers(5, 12)
    live = LiveBytes(large.llama.vocab_size, estimate.BLOCK)
    lavin = large.on_meta()
    lavin.logit_rows = LOGIT_ROWS["cuda"]
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        expected = estimate.steps_memory(lavin, settings, [batch], live)
    computed = estimate.training_memory(large, settings, [batch])
    for key, memory in expected.items():
        for name, size in vars(memory).items():
            assert abs(getattr(computed[key], name) - size) <= estimate.BLOCK, (key, name)


def test_the_largest_micro_batch():
    memory = {1: 10.0, 4: 16.0, 8: 36.0}        # 2 a sample up to 4, then 5
    assert estimate.largest_micro_batch(memory, 9.9) == 0
    assert estimate.largest_micro_batch(memory, 10) == 1
    assert estimate.largest_micro_batch(memory, 13.9) == 2
    assert estimate.largest_micro_batch(memory, 16) == 4
    assert estimate.largest_micro_batch(memory, 25.9) == 5
    assert estimate.largest_micro_batch(memory, 100) == 8


def test_the_peak_is_that_of_loading_where_this_takes_more():
    memory = Memory(weights=5, trained=1, activations=3, logits=2, loading=4)
    assert memory.peak == 11
    assert dataclasses.replace(memory, loading=12).peak == 12
    assert memory.needed == 11 + estimate.UNSEEN


# Arithmetic


def test_operations_are_those_that_torch_counts(samples):
    """But for the attention, of which torch counts both halves, and the adapters' mixed experts."""
    lavin = checkpoints.load(LLAMA, VIT).train()
    batch = lavin.batch(samples)
    routed = lavin.route().detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        lavin(batch, routed).backward()
    counted = counter.get_total_flops()
    encoded = [lavin.encode(sample) for sample in samples]
    assert estimate.flops_of(lavin, encoded) == pytest.approx(counted, rel=0.1)


def test_hours():
    assert estimate.hours(work=3.6e18, tflops=100, share=0.5) == pytest.approx(20)


# train.py


def test_a_dry_run_for_a_gpu_that_is_not_here(call, sqa, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more = ("--dry-run", "--device", "cuda", "--tflops", 100, "--bits", 4)
    code, stdout, stderr = call(train, *flags(sqa, tmp_path / "out", *more))
    assert code == 0, stderr
    assert "device   cuda · bf16 · compile off" in stdout
    assert "GB, computed: weights" in stdout
    assert "h, an estimate" in stdout
    assert stdout.splitlines()[-1].split() == ["--bits", "4", "--checkpointing", *["8"] * 6]
    assert not (tmp_path / "out").exists()


def test_a_computed_dry_run_needs_no_weights(call, sqa, tmp_path, monkeypatch):
    """params.json and the tokenizer suffice; without CLIP's file, ViT-L/14 is meant."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "params.json").write_bytes((LLAMA / "params.json").read_bytes())
    tokenizer = LLAMA / "tokenizer.model"
    if not tokenizer.exists():
        tokenizer = LLAMA.parent / "tokenizer.model"
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    code, stdout, stderr = call(train, *flags(
        sqa, tmp_path / "out", "--dry-run", "--device", "cuda", "--bits", 4, "--batch-size", 1,
        "--llama", folder, "--vit", tmp_path / "none.pt"))
    assert code == 0, stderr
    assert "ViT 303," in stdout                 # million


def test_a_computed_dry_run_is_for_one_gpu(fails, sqa, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(train, *flags(sqa, tmp_path / "out", "--dry-run", "--device", "cuda"),
          says=["--dry-run", "torchrun"])


def test_tflops_without_a_dry_run_is_refused(fails, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "out", "--tflops", 100), says=["--tflops", "--dry-run"])
