"""The tour runs, every stop shows what it promises, and each fits on one screen."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
import torch

import checkpoints
from conftest import ROOT
from examples import tour
from files import fingerprint
from tiny import world


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    """The whole tour with fresh adapters, as {stop: its screen}."""
    with (pytest.MonkeyPatch.context() as monkeypatch,
          contextlib.redirect_stdout(io.StringIO()) as printed):
        monkeypatch.chdir(tmp_path_factory.mktemp("no_checkpoint"))
        monkeypatch.setattr(sys, "argv", ["tour.py"])
        tour.main()
    beginning, *parts = re.split(r"^(\w+)\.py: ", printed.getvalue(), flags=re.MULTILINE)
    assert "The adapters are fresh" in beginning
    return dict(zip(parts[::2], parts[1::2]))


def test_every_stop_has_a_screen(screens):
    assert list(screens) == ["router", "adapters", "vit", "data", "model", "train"]
    for screen in screens.values():
        lines = screen.splitlines()
        assert "Next: " in screen
        assert len(lines) <= 32
        assert max(len(line) for line in lines) <= 95


def differences(out):
    return [float(number) for number in re.findall(r"largest difference (\S+)", out)]


def numbers(out, first):
    """The numbers after `first` in the line that begins with it."""
    for line in out.splitlines():
        if line.startswith(first):
            return [float(number) for number in line.removeprefix(first).split()]
    raise AssertionError(f"no line begins with {first!r}")


def test_router(screens):
    out = screens["router"]
    for name in ("layer 1", "layer 5", "τ = 1 ", "τ = 100"):
        text_0, text_1, text_sum, picture_0, picture_1, picture_sum = numbers(out, name)
        assert text_sum == picture_sum == 1
        assert text_0 + text_1 == pytest.approx(1, abs=2e-3)
        assert picture_0 + picture_1 == pytest.approx(1, abs=2e-3)
    assert numbers(out, "τ = 10 ") == numbers(out, "layer 3")
    assert len(differences(out)) == 2 and max(differences(out)) < 1e-5


def test_adapters(screens):
    out = screens["adapters"]
    fresh, fused = differences(out)
    assert fresh == 0
    assert fused < 1e-5
    assert "3,781,296" in out


def test_vit(screens):
    out = screens["vit"]
    assert "3 features" in out and "(1, 6, 1024)" in out
    for feature, block in ((1, 4), (2, 8), (3, 12)):
        assert f"feature {feature} is the class token after block {block}\n" in out
    assert max(differences(out)) < 1e-5


def test_data(screens):
    out = screens["data"]
    assert out.count(" <feature>") == 3 + 1         # one is in the introduction
    n_tokens = int(re.search(r"tokens +\((\d+),\)", out)[1])
    first, second = map(int, re.search(r"tokens of each sample: \[(\d+), (\d+)\]", out).groups())
    assert first + second == n_tokens
    features = [int(number) for number in re.search(r"features go: \[(.+)\]", out)[1].split(", ")]
    assert features == list(range(features[0], features[0] + 3)) and features[0] > first
    assert f"the last is token {n_tokens - 1}" in out


def test_model(screens):
    out = screens["model"]
    loss, by_hand = re.search(r"is (\d\.\d+)\. F.cross_entropy gives (\d\.\d+)\.", out).groups()
    assert float(loss) == pytest.approx(float(by_hand), abs=2e-6)
    probabilities = [float(p) for p in re.findall(r"^    \S+ +(0\.\d+)$", out, re.MULTILINE)]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert max(differences(out)) < 1e-5


def test_train(screens):
    out = screens["train"]
    for part in ("llama", "vit"):
        _, step_1, step_2, moved = numbers(out, part)
        assert step_1 == step_2 == moved == 0
    for part in ("down", "up ", "up_bias", "router", "projector", "modality_embedding"):
        tensors, _, step_2, moved = numbers(out, part)
        assert tensors == step_2 == moved
    assert numbers(out, "down")[1] == 0 and numbers(out, "up ")[1] == 17
    first, second = map(float, re.findall(r"loss (\d\.\d+)", out))
    assert second < first
    assert max(differences(out)) < 1e-6


def test_a_checkpoint_is_taken_if_it_belongs_to_the_small_world(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lavin = checkpoints.load(world.PATHS["llama"], world.PATHS["vit"])
    checkpoint = checkpoints.official_checkpoint(lavin, "QCM-ALE")
    (tmp_path / "out").mkdir()
    ours = {"llama": str(world.PATHS["llama"]), "vit_hash": fingerprint(world.PATHS["vit"])}
    another_llama = ours | {"llama": "weights/7B"}
    another_vit = ours | {"vit_hash": "another"}
    for config, word in ((ours, "trained"), (another_llama, "fresh"), (another_vit, "fresh")):
        checkpoint["config"] = config
        torch.save(checkpoint, "out/checkpoint.pth")
        code, out, _ = call(tour, "router")
        assert code == 0 and f"The adapters are {word}" in out


def test_an_unknown_stop_is_an_error(call):
    code, _, err = call(tour, "brain")
    assert code == 2
    assert "error: argument stop: invalid choice: 'brain'" in err.splitlines()[-1]


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "examples.tour", "router"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "router.py: route" in done.stdout
