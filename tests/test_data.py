"""Prompts, tokens, pictures, and the batches made of them."""

import json
import os
import resource
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import data
from conftest import GOLDEN
from data import Sample
from extras import instructions, terminal
from extras.scienceqa import load_sqa
from files import LavinError
from helpers import EPS, outcome


# ScienceQA's prompts


PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())


@pytest.mark.parametrize("caption", ["", "+caption"])
@pytest.mark.parametrize("format", data.FORMATS)
def test_prompt_formats(format, caption):
    for pid, expected in PROMPTS["expected"][format + caption].items():
        text = PROMPTS["captions"].get(pid, "") if caption else ""
        assert data.sqa_prompt(PROMPTS["problems"][pid], format, text) == tuple(expected)


def test_there_are_23_formats():
    expected = {key.removesuffix("+caption") for key in PROMPTS["expected"]}
    assert set(data.FORMATS) == expected
    assert len(data.FORMATS) == 23


@pytest.mark.parametrize("text, index", [
    ("The answer is B.", 1),
    ("The answer is C. BECAUSE: so it is.", 2),
    ("The answer is A", 0),
    ("a solution. The answer is D.", 3),
    ("The answer is Anna.", -1),
    ("The answer is b.", -1),
    ("", -1),
    ("The answer is F.", -1),
    ("Some say The answer is A. The answer is E.", 4),
])
def test_sqa_answer(text, index):
    assert data.sqa_answer(text) == index


# Tokens


def test_a_token_that_the_tokenizer_lacks_is_no_text(lavin):
    """A model may have more rows in `output` than its tokenizer has tokens."""
    tokens = lavin.tokenizer.encode("a red bird")
    n_tokens = lavin.tokenizer.vocab_size()
    with pytest.raises(IndexError):
        lavin.tokenizer.decode([n_tokens])
    assert data.decode(lavin.tokenizer, [n_tokens + 3, *tokens, n_tokens]) == "a red bird"


def test_tokens_and_labels(lavin, samples, expected):
    """The authors' code pads with 0 and inserts the picture and its prefix only later."""
    prefix_of = {
        0: expected["prefix_nonimg"].tolist(),
        1: expected["prefix_img"].tolist() + [0, 0],        # the golden ViT has 2 features
    }
    for i, sample in enumerate(samples):
        tokens, labels = data.tokenize(sample, lavin.tokenizer)
        expected_labels = expected["labels"][i]
        assert tokens == [token for token in expected["examples"][i].tolist() if token != 0]
        theirs = [label if label != 0 else data.IGNORED for label in expected_labels.tolist()]
        assert labels == theirs[:len(labels)]
        assert set(theirs[len(labels):]) == {data.IGNORED}
        prefix = prefix_of[int(expected["indicators"][i])]
        encoded = data.encode(sample, lavin.tokenizer, 2, 128)
        assert encoded.tokens.tolist() == tokens[:1] + prefix + tokens[1:]
        assert encoded.labels.tolist() == labels[:1] + [data.IGNORED] * len(prefix) + labels[1:]
        n_features = 2 if sample.image else 0
        first = 1 + len(prefix) - n_features
        assert encoded.is_feature.nonzero()[0].tolist() == list(range(first, first + n_features))
        assert len(encoded.is_feature) == len(encoded.tokens)


class OtherTokens:
    """The tokenizer with reversed ids, so that EOS is token 0, as in SmolLM2."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text):
        return [self.other(token) for token in self.tokenizer.encode(text)]

    def bos_id(self):
        return self.other(self.tokenizer.bos_id())

    def eos_id(self):
        return self.other(self.tokenizer.eos_id())

    def other(self, token):
        """Reverses the order of the ids from 0 to EOS's."""
        eos = self.tokenizer.eos_id()
        return eos - token if token <= eos else token


@pytest.mark.parametrize("number", range(4))
def test_token_0_may_be_eos(lavin, samples, number):
    """With the embeddings reordered like the ids, the loss stays the same."""
    tokenizer = lavin.tokenizer
    expected = lavin(lavin.batch([samples[number]])).item()
    other = OtherTokens(tokenizer)
    assert other.eos_id() == 0
    rows = torch.tensor([other.other(token) for token in range(tokenizer.vocab_size())])
    with torch.no_grad():
        for matrix in (lavin.llama.tok_embeddings, lavin.llama.output):
            matrix.weight.copy_(matrix.weight[rows])
    lavin.tokenizer = other
    batch = lavin.batch([samples[number]])
    assert batch.labels[-1] == 0
    assert abs(lavin(batch).item() - expected) < 1e-6


def test_truncation(lavin, samples):
    """The whole sequence, prefix and features included, is cut to the context.

    One position is reserved for the modality token.
    """
    whole = data.encode(samples[0], lavin.tokenizer, 2, 128)
    cut = data.encode(samples[0], lavin.tokenizer, 2, 80)
    assert cut.tokens.tolist() == whole.tokens[:79].tolist()
    assert cut.labels.tolist() == whole.labels[:79].tolist()
    assert cut.is_feature.tolist() == whole.is_feature[:79].tolist()
    without_answer = data.encode(samples[0], lavin.tokenizer, 2, 40)
    assert (without_answer.labels == data.IGNORED).all()


def test_the_prompt_is_not_cut_silently(lavin):
    fits = data.encode(Sample("x" * 60), lavin.tokenizer, 2, 128, prompt_only=True)
    assert len(fits.tokens) <= 126
    with pytest.raises(LavinError, match="a context of 128 has room for 126"):
        data.encode(Sample("x" * 600), lavin.tokenizer, 2, 128, prompt_only=True)


def test_tokens_of_many_samples_are_kept_and_never_taken_for_others(
        lavin, samples, tmp_path, monkeypatch):
    def encode_all(samples, max_seq_len=128):
        rows = []
        for e in instructions.encode_all(samples, lavin.tokenizer, 2, max_seq_len, tmp_path):
            arrays = (e.tokens.tolist(), e.labels.tolist(), e.is_feature.tolist())
            rows.append((*arrays, e.image, e.id))
        return rows

    expected = encode_all(samples)
    assert not list(tmp_path.iterdir())                     # few samples: no file is written
    monkeypatch.setattr(instructions, "MANY", 4)
    assert encode_all(samples) == expected
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode", None)
        assert encode_all(samples) == expected              # not tokenized again
    assert encode_all(samples, 100) != expected
    others = [*samples[:3], Sample("New", "text")]
    assert encode_all(others)[3] != expected[3]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", [
    lambda content: content[:-4],
    lambda content: content[:200],
    lambda content: b"",
    # The header has 128 bytes and the four lengths have 16.
    lambda content: content[:144] + b"\xff\xff\xff\x7f" + content[148:],
    lambda content: content[:-4] + b"\xff\xff\xff\x7f",          # no mask
    lambda content: content.replace(b"<i4", b"|O8"),
], ids=["cut", "cut short", "empty", "no token", "no mask", "objects"])
def test_kept_tokens_that_are_damaged_are_made_again(
        lavin, samples, tmp_path, monkeypatch, damage):
    def encode_all():
        encoded = instructions.encode_all(samples, lavin.tokenizer, 2, 128, tmp_path)
        return [(e.tokens.tolist(), e.labels.tolist(), e.is_feature.tolist()) for e in encoded]

    monkeypatch.setattr(instructions, "MANY", 4)
    expected = encode_all()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert encode_all() == expected
    assert path.read_bytes() == content


# Pictures


GREY = np.linspace(0, 255, 48, dtype=np.uint8).reshape(6, 8)
GREY_AS_RGB = np.stack([GREY, GREY, GREY], axis=-1)
BLACK_OR_WHITE = np.where(GREY_AS_RGB > 100, 255, 0)
WHITE = np.full((6, 8, 3), 255)
RED = np.full((6, 8, 3), (255, 0, 0))
GREEN = np.full((6, 8, 3), (10, 200, 30))


def palette_picture():
    picture = Image.new("RGB", (8, 6), (10, 200, 30))
    return picture.convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize("picture, expected", [
    (Image.fromarray(GREY), GREY_AS_RGB),
    (Image.fromarray(GREY.astype(np.uint16) * 257), GREY_AS_RGB),
    (Image.fromarray(GREY.astype(np.int32) * 257), GREY_AS_RGB),
    (Image.fromarray(GREY.astype(np.float32)), GREY_AS_RGB),
    (Image.fromarray(GREY.astype(np.float32) / 255), GREY_AS_RGB),
    (Image.fromarray(GREY > 100), BLACK_OR_WHITE),
    (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), RED),
    (Image.new("RGBA", (8, 6), (255, 0, 0, 0)), WHITE),
    (Image.new("LA", (8, 6), (0, 0)), WHITE),
    (palette_picture(), GREEN),
], ids=[
    "grey", "16 bits", "32 bits", "floats to 255", "floats to 1", "1 bit", "CMYK", "alpha",
    "grey with alpha", "palette"])
def test_any_mode_becomes_rgb(picture, expected):
    rgb = np.asarray(data.to_rgb(picture)).astype(int)
    assert np.abs(rgb - expected).max() <= 1


def test_a_transparent_palette_becomes_white(tmp_path):
    picture = Image.new("P", (8, 6), 0)
    picture.putpalette([0, 0, 0] * 256)
    picture.save(tmp_path / "clear.png", transparency=0)
    clear = Image.open(tmp_path / "clear.png")
    assert np.asarray(data.to_rgb(clear)).min() == 255


def test_a_turned_picture_is_put_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                        # rotated by 90°
    Image.new("RGB", (8, 6), "white").save(tmp_path / "turned.jpg", exif=exif)
    assert data.to_rgb(Image.open(tmp_path / "turned.jpg")).size == (6, 8)


def test_pixels_are_normalised_by_imagenet():
    pixels = data.load_pixels(Image.new("RGB", (5, 9), "white"), 4)
    assert pixels.shape == (3, 4, 4)
    white = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert torch.allclose(pixels[:, 0, 0], white)


# What is a picture


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    """Pillow would run Ghostscript on an EPS file, whatever its name is."""
    marker = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)      # Pillow has not looked for it yet
    picture = tmp_path / "x.png"
    picture.write_bytes(EPS)
    with pytest.raises(LavinError, match="x.png: not a picture .*unknown format"):
        data.load_pixels(picture, 4)
    assert not marker.exists()


@pytest.mark.parametrize("format", [
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM",
    "QOI", "SGI", "SPIDER", "TGA", "TIFF", "WEBP"])
def test_raster_formats_are_read(tmp_path, format):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    mode = "F" if format == "SPIDER" else "RGB"
    path = tmp_path / "picture"
    Image.new(mode, (64, 64), 200 if mode == "F" else (200, 200, 200)).save(path, format=format)
    pixels = data.load_pixels(path, 4) * data.IMAGENET_STD + data.IMAGENET_MEAN
    assert (pixels * 255 - 200).abs().max() < 6
    with open(path, "rb") as file:
        assert data.open_picture(file).size == (64, 64)


def test_what_is_no_file_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, says in [
        (tmp_path / "pipe", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        (tmp_path, "a folder"),
        (tmp_path / "none.png", "none.png: no such picture"),
        (tmp_path / "loop", "no such picture"),
        ("x\0.png", "no such picture"),
        ("x" * 100_000, "no such picture"),
        ("caf\udce9.png", "no such picture"),
        ("\ud800.png", "no such picture"),
    ]:
        error = outcome(lambda: data.load_pixels(path, 4))
        assert isinstance(error, LavinError) and says in str(error)


def test_a_picture_in_a_file_whose_name_is_not_unicode(tmp_path):
    path = tmp_path / "caf\udce9.png"
    Image.new("RGB", (8, 8)).save(path)
    assert data.load_pixels(path, 4).shape == (3, 4, 4)


# Batches


def test_every_epoch_is_a_permutation_in_micro_batches():
    """45 samples in batches of 20 and micro-batches of at most 8: an epoch is 20 + 20 + 5."""
    lengths = [(7 * i) % 50 for i in range(45)]
    steps = [data.global_batch(step, lengths, 20, 8, seed=3) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        seen = Counter()
        for micro_batches in epoch:
            for indices in micro_batches:
                seen.update(indices)
        assert seen == Counter(range(45))
        sizes = [sorted(len(indices) for indices in micro_batches) for micro_batches in epoch]
        assert sizes == [[6, 7, 7], [6, 7, 7], [5]]
    assert steps[:3] != steps[3:]
    assert steps[0] != data.global_batch(0, lengths, 20, 8, seed=4)


def test_micro_batches_have_about_the_same_number_of_tokens():
    lengths = [(7 * i) % 50 for i in range(45)]
    micro_batches = data.global_batch(0, lengths, 40, 8, seed=3)
    tokens = [sum(lengths[i] for i in indices) for indices in micro_batches]
    assert [len(indices) for indices in micro_batches] == [8] * 5
    assert max(tokens) < 1.1 * min(tokens)


def test_a_left_over_sample_joins_the_shortest_micro_batch():
    assert data.global_batch(0, [100, 90, 80], 3, micro_batch=2, seed=0) == [[0], [1, 2]]


def test_batches_do_not_depend_on_the_number_of_workers(lavin, sqa):
    _, samples = load_sqa(sqa, "train")
    encoded = [data.encode(sample, lavin.tokenizer, 2, 128) for sample in samples]
    lengths = [len(e.tokens) for e in encoded]

    def plan(step):
        return data.global_batch(step, lengths, 7, 3, seed=0)

    batches = data.Batches(encoded, plan, 32)
    alone = list(data.prefetch(batches, range(2, 6), workers=0))
    helped = list(data.prefetch(batches, range(2, 6), workers=2))
    for micro_batches, others in zip(alone, helped, strict=True):
        for a, b in zip(micro_batches, others, strict=True):
            assert a.ids == b.ids
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.pixels, b.pixels)


def test_a_batch_is_its_samples_concatenated(lavin, samples):
    encoded = [lavin.encode(sample) for sample in samples]
    batch = lavin.batch(samples)
    sizes = batch.lengths.tolist()
    tokens = batch.tokens.split(sizes)
    labels = batch.labels.split(sizes)
    positions = batch.positions.split(sizes)
    modality = batch.modality.split(sizes)
    is_feature = torch.zeros(len(batch.tokens), dtype=torch.bool)
    is_feature[batch.feature_indices] = True
    features = is_feature.split(sizes)
    assert len(sizes) == len(samples)
    n_answer = 0
    for i, e in enumerate(encoded):
        assert tokens[i].tolist() == e.tokens.tolist()
        assert labels[i].tolist() == e.labels.tolist()
        assert positions[i].tolist() == list(range(len(e.tokens)))
        assert features[i].tolist() == e.is_feature.tolist()
        assert set(modality[i].tolist()) == {int(e.image is not None)}
        n_answer += (e.labels != data.IGNORED).sum()
    assert len(batch.pixels) == 2
    assert len(batch.feature_indices) == 2 * lavin.n_features
    assert batch.n_answer == len(batch.answer_indices) == n_answer
    assert (batch.labels[batch.answer_indices] != data.IGNORED).all()


# Worker processes


def many_batches(lavin, samples, n):
    """A data set whose items are n batches each."""
    encoded = [lavin.encode(samples[0])]
    return data.Batches(encoded, lambda item: [[0]] * n, lavin.resolution)


@pytest.fixture
def few_files():
    """few_files(n): allow this process to open only n more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def few_files(n):
        last = max(int(number) for number in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + n, hard))

    yield few_files
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_workers_need_no_open_file_for_each_tensor(lavin, samples, few_files):
    """A step of 60 micro-batches has 500 tensors. The limit of open files is often 1024, or 64."""
    batches = many_batches(lavin, samples, 60)
    few_files(40)
    items = outcome(lambda: list(data.prefetch(batches, range(2), workers=1)))
    assert [len(item) for item in items] == [60, 60]


def test_more_workers_than_open_files_allow_are_refused(lavin, samples, few_files):
    batches = many_batches(lavin, samples, 1)
    few_files(40)
    error = outcome(lambda: list(data.prefetch(batches, range(2), workers=200)))
    assert "--workers 200" in str(error) and "--workers 0" in str(error)
    assert len(list(data.prefetch(batches, range(2), workers=0))) == 2


class Killed(torch.utils.data.Dataset):
    """Its second item kills its worker, as the system does when memory runs out."""

    def __getitem__(self, i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return i


@pytest.mark.parametrize("seconds", [0, 0.5], ids=["waited for", "while the main process works"])
def test_a_killed_worker_is_one_line(capsys, seconds):
    def main():
        for _ in data.prefetch(Killed(), range(3), workers=1, each=1):
            time.sleep(seconds)

    with pytest.raises(SystemExit) as end:
        terminal.run(main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "process that decodes pictures" in line and "--workers 0" in line
