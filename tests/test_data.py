"""Prompts, tokens, pictures, batches and scores."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import GOLDEN
from data import Sample

PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())


@pytest.mark.parametrize("caption", ["", "+caption"])
@pytest.mark.parametrize("format", data.FORMATS)
def test_prompt_formats(format, caption):
    for pid, expected in PROMPTS["expected"][format + caption].items():
        text = PROMPTS["captions"].get(pid, "") if caption else ""
        assert data.sqa_prompt(PROMPTS["problems"][pid], format, text) == tuple(expected)


def test_there_are_23_formats():
    assert {key.removesuffix("+caption") for key in PROMPTS["expected"]} == set(data.FORMATS) and len(data.FORMATS) == 23


def test_tokens_and_labels(lavin, samples, expected):
    for sample, example, label, indicator in zip(samples, expected["examples"], expected["labels"], expected["indicators"]):
        tokens, labels = data.tokenize(sample, lavin.tokenizer, 128)
        assert tokens == [t for t in example.tolist() if t]
        assert labels == label[:len(labels)].tolist() and not label[len(labels):].any()
        prefix = (expected["prefix_img"].tolist() + [0, 0]) if indicator else expected["prefix_nonimg"].tolist()
        encoded = data.encode(sample, lavin.tokenizer, 2, 128)
        assert encoded.tokens.tolist() == tokens[:1] + prefix + tokens[1:]
        assert encoded.labels.tolist() == labels[:1] + [0] * len(prefix) + labels[1:]


def test_tokens_of_many_samples_are_kept_and_never_taken_for_others(lavin, samples, tmp_path, monkeypatch):
    def read(samples, length=128):
        return [(e.tokens.tolist(), e.labels.tolist(), e.image, e.id)
                for e in data.encode_all(samples, lavin.tokenizer, 2, length, tmp_path)]

    expected = read(samples)
    assert not list(tmp_path.iterdir())                                     # few: nothing is kept
    monkeypatch.setattr(data, "MANY", 4)
    assert read(samples) == expected
    monkeypatch.setattr(data, "encode", None)
    assert read(samples) == expected                                        # not tokenized again
    monkeypatch.undo()
    monkeypatch.setattr(data, "MANY", 4)
    assert read(samples, 100) != expected and read([*samples[:3], Sample("New", "text")])[3] != expected[3]
    assert len(list(tmp_path.iterdir())) == 3


def test_truncation(lavin, samples):
    """Cut to the context as one string, then again with prefix and features in it, one place kept for the modality token."""
    whole = data.encode(samples[0], lavin.tokenizer, 2, 128)
    cut = data.encode(samples[0], lavin.tokenizer, 2, 80)
    assert cut.tokens.tolist() == whole.tokens[:79].tolist() and cut.labels.tolist() == whole.labels[:79].tolist()
    assert not data.encode(samples[0], lavin.tokenizer, 2, 40).labels.any()         # nothing left of the answer


def test_the_prompt_is_not_cut_silently(lavin):
    fits, too_long = (Sample("x" * n) for n in (60, 600))
    assert len(data.encode(fits, lavin.tokenizer, 2, 128, prompt_only=True).tokens) <= 126
    with pytest.raises(data.LavinError, match="a context of 128 has room for 126"):
        data.encode(too_long, lavin.tokenizer, 2, 128, prompt_only=True)


# Pictures


GREY = np.linspace(0, 255, 48, dtype=np.uint8).reshape(6, 8)


@pytest.mark.parametrize("picture, expected", [
    (Image.fromarray(GREY), np.stack([GREY] * 3, -1)),
    (Image.fromarray(GREY.astype(np.uint16) * 257), np.stack([GREY] * 3, -1)),
    (Image.fromarray(GREY.astype(np.int32) * 257), np.stack([GREY] * 3, -1)),
    (Image.fromarray(GREY > 100), np.stack([(GREY > 100) * 255] * 3, -1)),
    (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), np.full((6, 8, 3), (255, 0, 0))),
    (Image.new("RGBA", (8, 6), (255, 0, 0, 0)), np.full((6, 8, 3), 255)),
    (Image.new("LA", (8, 6), (0, 0)), np.full((6, 8, 3), 255)),
    (Image.new("RGB", (8, 6), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE), np.full((6, 8, 3), (10, 200, 30))),
], ids=["grey", "16 bits", "32 bits", "1 bit", "CMYK", "alpha", "grey with alpha", "palette"])
def test_any_mode_becomes_rgb(picture, expected):
    assert np.abs(np.asarray(data.to_rgb(picture)).astype(int) - expected).max() <= 1


def test_transparent_palette_and_rotation(tmp_path):
    picture = Image.new("P", (8, 6), 0)
    picture.putpalette([0, 0, 0] * 256)
    picture.save(tmp_path / "clear.png", transparency=0)
    assert np.asarray(data.to_rgb(Image.open(tmp_path / "clear.png"))).min() == 255
    upright = Image.new("RGB", (8, 6), "white")
    exif = Image.Exif()
    exif[0x0112] = 6                                        # turned by a quarter
    upright.save(tmp_path / "turned.jpg", exif=exif)
    assert data.to_rgb(Image.open(tmp_path / "turned.jpg")).size == (6, 8)


def test_pixels_are_normalised_by_imagenet():
    pixels = data.load_pixels(Image.new("RGB", (5, 9), "white"), 4)
    assert pixels.shape == (3, 4, 4)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


# Batches


def test_every_epoch_is_a_permutation_in_micro_batches_of_about_as_many_tokens():
    lengths = [(7 * i) % 50 for i in range(45)]
    steps = [data.global_batch(step, lengths, 20, 8, seed=3) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert Counter(i for step in epoch for micro in step for i in micro) == Counter(range(45))
        assert [sorted(len(micro) for micro in step) for step in epoch] == [[6, 7, 7], [6, 7, 7], [5]]
    step = data.global_batch(0, lengths, 40, 8, seed=3)
    tokens = [sum(lengths[i] for i in micro) for micro in step]
    assert [len(micro) for micro in step] == [8] * 5 and max(tokens) < 1.1 * min(tokens)
    assert steps[:3] != steps[3:] and steps[0] != data.global_batch(0, lengths, 20, 8, seed=4)


def test_batches_do_not_depend_on_the_number_of_workers(lavin, sqa):
    _, problems = data.load_sqa(sqa, "train")
    encoded = [data.encode(s, lavin.tokenizer, 2, 128) for s in problems]
    dataset = data.Collated(encoded, lambda step: data.global_batch(step, [len(e.tokens) for e in encoded], 7, 3, 0), 32)
    alone, helped = (list(data.ahead(dataset, range(2, 6), workers)) for workers in (0, 2))
    for micros, others in zip(alone, helped, strict=True):
        for a, b in zip(micros, others, strict=True):
            assert a.ids == b.ids and torch.equal(a.tokens, b.tokens) and torch.equal(a.pixels, b.pixels)


def test_a_batch_holds_its_samples_one_behind_the_other(lavin, samples):
    encoded, batch = [lavin.encode(s) for s in samples], lavin.batch(samples)
    assert batch.tokens.tolist() == [token for e in encoded for token in e.tokens]
    assert batch.labels.tolist() == [label for e in encoded for label in e.labels]
    for e, tokens, positions, modality in zip(encoded, *(t.split(batch.lengths) for t in (batch.tokens, batch.positions, batch.modality))):
        assert positions.tolist() == list(range(len(e.tokens))) and set(modality.tolist()) == {int(e.image is not None)}
    assert len(batch.pixels) == 2 and (batch.tokens[batch.pictured] == lavin.tokenizer.bos_id()).all()
    assert batch.n_answer == len(batch.answers) == sum((e.labels != 0).sum() for e in encoded)


# ScienceQA


def test_load_sqa(sqa):
    problems, samples = data.load_sqa(sqa, "train", "QCM-A", use_captions=True)
    assert len(samples) == len(problems) == 24 and sum(s.image is not None for s in samples) == 12
    assert "Context: a disc on white\n" in samples[0].prompt and samples[0].image == sqa / "images" / "train" / "0" / "image.png"


@pytest.mark.parametrize("text, index", [
    ("The answer is B.", 1), ("The answer is C. BECAUSE: so it is.", 2), ("The answer is A", 0), ("a solution. The answer is D.", 3),
    ("The answer is Anna.", -1), ("The answer is b.", -1), ("", -1), ("The answer is F.", -1),
    ("Some say The answer is A. The answer is E.", 4)])
def test_sqa_answer(text, index):
    assert data.sqa_answer(text) == index


def test_the_table_by_a_field_counts_every_value():
    problems = {str(i): {"skill": "count" if i < 3 else "map", "answer": 1} for i in range(5)}
    table = data.sqa_table_by("skill", problems, {"0": 1, "1": 0, "2": 1, "3": -1})
    assert [row.split() for row in table.split("\n")] == [["count", "66.67", "2/3"], ["map", "0.00", "0/1"]]


def test_scores():
    def problem(subject, grade, hint, image, answer):
        return {"subject": f"{subject} science", "grade": f"grade{grade}", "hint": hint, "image": image, "answer": answer}

    problems = {"1": problem("natural", 1, "h", "image.png", 0), "2": problem("natural", 6, "", None, 1),
                "3": problem("social", 7, "", "image.png", 2), "4": problem("language", 12, "h", None, 0),
                "5": problem("language", 12, "h", None, 0)}
    scores = data.sqa_scores(problems, {"1": 0, "2": 0, "3": 2, "4": -1})
    assert np.isclose(scores.pop("AVG"), 50)
    assert scores == {"NAT": 50, "SOC": 100, "LAN": 0, "TXT": 50, "IMG": 100, "NO": 0, "G1-6": 50, "G7-12": 50}
    empty = data.sqa_scores(problems, {"1": 0})
    assert np.isnan(empty["SOC"]) and empty["AVG"] == 100
    table = data.sqa_table(problems, {"1": 0, "2": 0})
    assert table.split("\n")[0].split() == list(data.COLUMNS)
    assert table.split("\n")[2].split() == ["1/2", "0/0", "0/0", "1/1", "1/1", "0/1", "1/2", "0/0", "1/2"]
