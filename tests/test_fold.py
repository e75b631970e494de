"""Folding: LLaMA with merged adapters equals LLaMA with adapters, in memory and as files."""

import json

import pytest
import torch

import checkpoints
import train
from adapters import Adapter
from conftest import ADAPTER, LLAMA, VIT, difference, relative_error
from fast.fold import fold

MODEL = ("--llama", LLAMA, "--vit", VIT)


def of_modality(samples, modality):
    """The samples of a modality: without (0) or with (1) a picture."""
    return [sample for sample in samples if (sample.image is not None) == modality]


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("modality", [0, 1])
def test_folded_is_unfolded(samples, modality, dtype, allowed):
    """The logits of a folded LaVIN are compared with the unfolded one's and with exact ones."""
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER, dtype=dtype)
    batch = lavin.batch(of_modality(samples, modality))
    unfolded_logits = lavin.logits(batch).detach()
    folded = fold(lavin, modality)
    logits = folded.logits(batch).detach()
    assert not any(isinstance(module, Adapter) for module in folded.llama.modules())
    assert relative_error(logits, unfolded_logits) < allowed

    # Rounding the merged matrices costs about as much accuracy as rounding the original ones.
    exact = checkpoints.load(LLAMA, VIT, ADAPTER).logits(batch).detach()
    usual_error = relative_error(unfolded_logits, exact)
    assert relative_error(logits, exact) < 1.2 * usual_error + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modality", [0, 1])
def test_what_was_folded_stays_as_it_was_and_shares_what_was_not_changed(samples, modality, dtype):
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER, dtype=dtype)
    batch = lavin.batch(of_modality(samples, modality))
    before = lavin.logits(batch).detach()
    folded = fold(lavin, modality)
    assert difference(lavin.logits(batch), before) == 0
    originals = {p.data_ptr() for p in lavin.parameters()}
    copied = set()
    for name, p in folded.named_parameters():
        if p.data_ptr() not in originals:
            copied.add(name)
    expected = set()
    for i in range(4):
        for name in ("wq", "wk", "wv"):
            expected.add(f"llama.layers.{i}.attention.{name}.weight")
            expected.add(f"llama.layers.{i}.attention.{name}.bias")
    assert copied == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_folded_quantized_is_unfolded_quantized(samples, bits):
    """If the matrices are quantized, folding replaces the adapters by ConstantAdapters."""
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER, bits=bits)
    batch = lavin.batch(samples[:1])
    assert difference(fold(lavin, 1).logits(batch), lavin.logits(batch)) < 1e-4


def test_a_batch_of_the_other_modality_is_refused(lavin, samples):
    with pytest.raises(ValueError, match="folded for modality 0"):
        fold(lavin, 0).logits(lavin.batch(samples))
    with pytest.raises(ValueError, match="folded for modality 1"):
        fold(lavin, 1).logits(lavin.batch(samples))


def test_what_cannot_be_folded(lavin):
    with pytest.raises(ValueError, match="already folded"):
        fold(fold(lavin, 0), 0)
    for modality in (2, -1):
        with pytest.raises(ValueError, match="the modalities are 0 and 1"):
            fold(lavin, modality)


# As files


def test_a_folded_llama_can_be_saved_and_loaded(lavin, samples, call, tmp_path):
    """It is written, loaded, folded again and quantized. Each time it equals the adapted model."""
    directory = tmp_path / "folded"
    code, stdout, stderr = call(checkpoints, ADAPTER, *MODEL, "--fold", directory)
    assert (code, stderr) == (0, "")
    assert f"written: {directory};" in stdout
    assert json.loads((directory / "params.json").read_text())["attention_bias"] is True

    batch = lavin.batch(of_modality(samples, 0))
    adapted_logits = lavin.logits(batch).detach()
    alone = checkpoints.load(directory, VIT, max_seq_len=lavin.max_seq_len)
    logits = alone.logits(batch).detach()       # its fresh adapters are the identity
    assert relative_error(logits, adapted_logits) < 5e-3            # the files are in fp16
    # generate.py folds whatever it loads.
    assert relative_error(fold(alone, 0).logits(batch).detach(), logits) < 1e-5
    quantized = checkpoints.load(directory, VIT, bits=8)
    assert relative_error(quantized.logits(batch).detach(), adapted_logits) < 5e-2


def test_a_folded_llama_that_nobody_could_use_is_refused(lavin, call, sqa, tmp_path):
    """Folded for pictures, folded a second time, written over another model, or trained."""
    directory = tmp_path / "folded"
    with pytest.raises(ValueError, match="no place for the ViT"):
        checkpoints.save_folded(fold(lavin, 1), directory)
    checkpoints.save_folded(fold(lavin, 0), directory)
    folded_model = ("--llama", directory, "--vit", VIT)

    code, _, stderr = call(checkpoints, ADAPTER, *folded_model, "--fold", directory)
    assert code == 2
    assert "folded into it already" in stderr
    code, _, stderr = call(checkpoints, ADAPTER, *MODEL, "--fold", directory)
    assert code == 2
    assert "holds a model already" in stderr
    data_flags = ("--data", "sqa", "--data-root", sqa)
    code, _, stderr = call(train, *data_flags, *folded_model, "--out", tmp_path / "out")
    assert code == 2
    assert "folded into it" in stderr
