"""Our numbers equal those of the authors' code in fp32, which are in tests/golden/expected.npz.

    python -m pytest -q -s tests/test_reference.py      print the largest differences

The prompts of all 23 formats are compared in test_data.py.
"""

import torch

import checkpoints
import train
from bench import reference
from conftest import difference
from fast import engine
from fast.ranks import gradient_buffer


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
    """Theirs are padded to 128 tokens, and the modality token's logits come first."""
    batch = lavin.batch(samples)
    logits = lavin.logits(batch)
    for i, length in enumerate(batch.lengths.tolist()):
        ours = logits[i, :length]
        theirs = expected["logits_batch"][i, 1:1 + length]
        assert_close(f"logits of sample {i}", ours, theirs, 2e-5)


def test_loss_alone_and_in_a_batch(lavin, samples, expected):
    alone = torch.stack([lavin(lavin.batch([sample])) for sample in samples])
    assert_close("loss, one sample at a time", alone, expected["loss_each"], 1e-5)
    assert_close("loss of the batch", lavin(lavin.batch(samples)), expected["loss_batch"], 1e-5)


def test_every_gradient(lavin, samples, expected):
    lavin(lavin.batch(samples)).backward()
    ours = checkpoints.to_official(lavin, grad=True)
    theirs = {}
    for key in expected.files:
        if key.startswith("grad/"):
            theirs[key.removeprefix("grad/")] = torch.tensor(expected[key])
    assert ours.keys() == theirs.keys()
    relative = []
    for name, gradient in theirs.items():
        assert ours[name].shape == gradient.shape, name
        largest = gradient.abs().max().item()
        relative.append(difference(ours[name], gradient) / largest)
    assert_close(f"{len(theirs)} gradients, relative", relative, 0, 2e-5)
    for name, p in lavin.named_parameters():
        assert p.requires_grad or p.grad is None, name


def test_five_steps_of_adamw(lavin, samples, expected):
    """The loss before each step and after the last one."""
    batch = lavin.batch(samples)
    optimizer = train.make_optimizer(lavin, train.Settings())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients = gradient_buffer(lavin)
    losses = []
    for _ in range(5):
        loss, _ = train.train_step(lavin, optimizer, scaler, gradients, [batch])
        losses.append(loss)
    losses.append(lavin(batch).item())
    assert_close("losses of five AdamW steps", losses, expected["adamw_losses"], 1e-4)


def test_greedy_tokens(lavin, samples, expected):
    """Twelve new tokens of each sample, from the engine and from both forms of generate."""
    prompts = [lavin.encode(sample, prompt_only=True) for sample in samples]
    new_ids = dict(engine.continue_prompts(lavin, prompts, len(samples), 12))
    ours = [new_ids[i] for i in range(len(samples))]
    assert_close("greedy tokens", ours, expected["greedy"], 0)
    texts = [lavin.tokenizer.decode(ids) for ids in ours]
    assert engine.generate(lavin, samples, 12) == texts
    assert lavin.generate(samples, 12) == texts


def test_the_comparison_of_speed_needs_their_code(fails, tmp_path):
    fails(reference, tmp_path, says=[str(tmp_path), "luogen1996/LaVIN"])
