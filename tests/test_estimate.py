"""The computed memory and FLOPs of training agree with real tensors and with each other."""

import dataclasses
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import train
from conftest import LLAMA, VIT, flags
from extras import estimate
from extras.estimate import CORNERS, LiveBytes, Memory
from fast import ops, ranks


@pytest.fixture(scope="module")
def shape():
    """The golden model's shape, with one layer of LLaMA and four of the ViT."""
    settings = train.Settings(llama=str(LLAMA), vit=str(VIT))
    return estimate.read_shape(settings).with_layers(1, 4)


@pytest.fixture
def encoded(lavin, samples):
    """The golden samples, encoded for a ViT of four layers. Two of them have a picture."""
    lavin.n_features = 1
    return [lavin.encode(sample) for sample in samples]


@pytest.fixture
def batch(encoded, shape):
    return estimate.blank(encoded, shape.vit.resolution)


@pytest.fixture
def text_batch(encoded, shape):
    without = [sample for sample in encoded if sample.image is None]
    return estimate.blank(without, shape.vit.resolution)


def fake_steps(shape, settings, batch):
    """The memory that steps_memory computes for one batch."""
    live = LiveBytes(shape.llama.vocab_size)
    lavin = shape.on_meta()
    batch = estimate.with_features(batch, lavin.n_features)
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        return estimate.steps_memory(lavin, settings, [batch], live)


def real_steps(shape, settings, batch):
    """The same with real tensors."""
    live = LiveBytes(shape.llama.vocab_size)
    lavin = shape.on_meta()
    batch = estimate.with_features(batch, lavin.n_features)
    with live:
        return estimate.steps_memory(lavin, settings, [batch], live)


# LiveBytes


def test_live_bytes_of_a_product_worked_out_by_hand():
    """a and b have 6 numbers each, and their product has 4 while it lives. A view takes nothing."""
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


def test_fake_tensors_take_what_real_ones_take(shape, batch):
    """They agree to the byte in every part, with and without checkpointing."""
    settings = train.Settings(dtype="fp32")
    fake = fake_steps(shape, settings, batch)
    assert fake == real_steps(shape, settings, batch)
    assert fake[False, 0].activations > fake[True, 0].activations > 0


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fake_quantized_weights_take_what_real_ones_take(shape, text_batch, bits):
    settings = train.Settings(dtype="bf16", bits=bits)
    fake = fake_steps(shape, settings, text_batch)
    assert fake == real_steps(shape, settings, text_batch)


def test_weights_and_trained_are_what_the_model_holds(shape, text_batch):
    memory = real_steps(shape, train.Settings(dtype="bf16"), text_batch)[False, 0]
    lavin = shape.on_meta()
    n_frozen = sum(p.numel() for p in lavin.parameters() if not p.requires_grad)
    trained = [p for p in lavin.parameters() if p.requires_grad]
    n_trained = sum(p.numel() for p in trained)
    assert memory.weights == 2 * n_frozen
    # In fp32: a parameter, its gradient, AdamW's two moments, and a step count per parameter.
    assert memory.trained == 4 * (4 * n_trained + len(trained))


def test_a_step_takes_as_much_as_the_training_loops(shape, batch):
    """train.train_step also holds the numbers that it looks at, which are a few bytes."""
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
        for _ in range(2):          # the first step makes the moments
            live.restart()
            estimate.take_step(lavin, optimizer, gradients, batch)
        peaks.append(live.peak)
        live.restart()
        train.train_step(lavin, optimizer, scaler, gradients, [batch])
        peaks.append(live.peak)
    assert peaks[0] <= peaks[1] <= peaks[0] + 100


@pytest.mark.parametrize("bits", [16, 4])
def test_small_models_give_the_large_ones_memory(shape, batch, bits):
    """LLaMA has 5 layers and the ViT 12. The small models have 1 and 2, and 4 and 8 layers."""
    settings = train.Settings(dtype="bf16", bits=bits)
    large = shape.with_layers(5, 12)
    at_corners = []
    for n_llama, n_vit in CORNERS:
        small = shape.with_layers(n_llama, n_vit)
        at_corners.append(real_steps(small, settings, batch))
    assert estimate.extrapolate_memory(large, at_corners) == real_steps(large, settings, batch)


def test_a_gpu_takes_more_rows_of_logits_and_rounds_up(shape, text_batch):
    """The vocabulary is so large that the logits are alive at the peak."""
    shape = dataclasses.replace(shape, llama=dataclasses.replace(shape.llama, vocab_size=32_000))
    settings = train.Settings(dtype="bf16")
    key = False, 0
    on_gpu = estimate.training_memory(shape, settings, [text_batch], ways=(False,))[key]
    with ops.acting_as_gpu():               # else a CPU keeps the scores of attention in bf16
        on_cpu = real_steps(shape, settings, text_batch)[key]
    for name, size in vars(on_cpu).items():
        assert getattr(on_gpu, name) >= size, name
    # Logits in bf16, and twice in fp32: before the softmax and after it.
    n_rows = min(text_batch.n_answer, 1024)
    assert on_gpu.logits == pytest.approx(10 * n_rows * shape.llama.vocab_size, abs=1536)


def test_the_largest_micro_batch():
    memory = {1: 10.0, 4: 16.0, 8: 36.0}        # 2 per sample up to 4 samples, then 5
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
    """They differ by less than a tenth.

    The differences are in attention, where torch counts both halves, and in the adapters' mixed
    experts.
    """
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
    """params.json and the tokenizer are enough. Without CLIP's file, ViT-L/14 is assumed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "llama"
    folder.mkdir()
    shutil.copy(LLAMA / "params.json", folder)
    shutil.copy(LLAMA.parent / "tokenizer.model", folder)
    code, stdout, stderr = call(train, *flags(
        sqa, tmp_path / "out", "--dry-run", "--device", "cuda", "--tflops", 100, "--bits", 4,
        "--batch-size", 1, "--no-images", "--llama", folder, "--vit", tmp_path / "none.pt"))
    assert code == 0, stderr
    assert "assuming the shape of ViT-L/14" in stdout
    assert "ViT 303," in stdout                 # million parameters
    assert "device   cuda · bf16 · compile off" in stdout
    assert "GB, computed: weights" in stdout
    assert "h, an estimate" in stdout
    fitting = stdout.splitlines()[-1].split()
    assert fitting == ["--bits", "4", "--checkpointing", "1", "1", "1", "1", "1", "1"]
    assert not (tmp_path / "out").exists()


def test_a_computed_dry_run_is_for_one_gpu(fails, sqa, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(train, *flags(sqa, tmp_path / "out", "--dry-run", "--device", "cuda"),
          says=["--dry-run", "torchrun"])


def test_tflops_without_a_dry_run_is_refused(fails, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "out", "--tflops", 100), says=["--tflops", "--dry-run"])
