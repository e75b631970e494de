"""Parity with the reference: its own numbers, computed in fp32 on a CPU from the checkpoints in tests/golden.

    python -m pytest -q -s tests/test_reference.py      prints the largest difference of each quantity

The prompts of all 23 formats are in test_data.py.
"""

import torch

import adapters
import train
from decode import continued
from conftest import difference


def assert_close(what, ours, theirs, tolerance):
    largest = difference(ours, theirs)
    print(f"{what:30} {largest:.1e} (at most {tolerance:.0e})")
    assert largest <= tolerance, f"{what}: {largest}"


def test_pixels_and_features(lavin, samples, expected):
    batch = lavin.batch(samples)
    assert_close("\npixels", batch.pixels, expected["pixels"], 0)
    features = lavin.image_features(batch.pixels)
    assert_close("image features", features, expected["image_features"], 1e-5)
    assert_close("projected features", lavin.projector(features), expected["image_embeds"], 1e-5)


def test_routing(lavin, expected):
    assert_close("routing weights", lavin.route(), expected["route"], 1e-6)


def test_logits_of_every_real_position(lavin, samples, expected):
    batch = lavin.batch(samples)
    real = torch.arange(max(batch.lengths)) < torch.tensor(batch.lengths)[:, None]
    theirs = torch.tensor(expected["logits_batch"])[:, 1:1 + real.shape[1]]      # the modality token is in front
    assert_close("logits", lavin.logits(batch)[real], theirs[real], 2e-5)


def test_loss_alone_and_in_a_batch(lavin, samples, expected):
    alone = torch.stack([lavin(lavin.batch([sample])) for sample in samples])
    assert_close("loss, one sample at a time", alone, expected["loss_each"], 1e-5)
    assert_close("loss of the batch", lavin(lavin.batch(samples)), expected["loss_batch"], 1e-5)


def test_every_gradient(lavin, samples, expected):
    lavin(lavin.batch(samples)).backward()
    ours = adapters.to_official(lavin, grad=True)
    theirs = {name.removeprefix("grad/"): torch.tensor(expected[name]) for name in expected.files if name.startswith("grad/")}
    assert {name: g.shape for name, g in ours.items()} == {name: g.shape for name, g in theirs.items()}
    relative = {name: difference(ours[name], theirs[name]) / theirs[name].abs().max().item() for name in theirs}
    assert_close(f"{len(theirs)} gradients, relative", max(relative.values()), 0, 2e-5)
    assert all(p.grad is None for p in lavin.parameters() if not p.requires_grad)


def test_five_steps_of_adamw(lavin, samples, expected):
    optimizer, scaler, batch = train.make_optimizer(lavin), torch.amp.GradScaler("cpu", enabled=False), lavin.batch(samples)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    gradients = train.gradient_buffer(lavin)
    losses = [train.train_step(lavin, optimizer, scaler, gradients, [batch])[0] for _ in range(5)]
    assert_close("losses of five AdamW steps", [*losses, lavin(batch).item()], expected["adamw_losses"], 1e-4)


def test_greedy_tokens(lavin, samples, expected):
    ids = dict(continued(lavin, [lavin.encode(s, prompt_only=True) for s in samples], len(samples), 12))
    assert_close("greedy tokens", [ids[i] for i in range(len(samples))], expected["greedy"], 0)
    assert lavin.generate(samples, 12) == [lavin.tokenizer.decode(ids[i]) for i in range(len(samples))]
