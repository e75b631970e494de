"""ScienceQA's files: what is read, and what is wrong with damaged ones."""

import functools
from pathlib import Path

import pytest

import generate
import train
from extras.scienceqa import load_sqa
from test_errors import ask, edit
from test_train import flags


@pytest.fixture
def fails_to_train(fails, sqa, tmp_path):
    """fails_to_train("--flag", value, …, says=[…]): `fails` of train.py on `sqa`."""
    def fails_to_train(*more, says):
        fails(train, *flags(sqa, tmp_path / "out", *more), says=says)
    return fails_to_train


def test_load_sqa(sqa):
    problems, samples = load_sqa(sqa, "train", "QCM-A", use_captions=True)
    assert len(samples) == len(problems) == 24
    with_picture = [sample for sample in samples if sample.image is not None]
    assert len(with_picture) == 12
    assert "Context: a disc on white\n" in samples[0].prompt
    assert samples[0].image == sqa / "images" / "train" / "0" / "image.png"


@pytest.mark.parametrize("field, value, says", [
    ("answer", 4, "has the answer 4, outside its 4 choices"),
    ("answer", -1, "has the answer -1"),
    ("answer", "0", "has the answer '0'"),
    ("choices", [], "does not have 1 to 5 texts as choices"),
    ("choices", "ab", "does not have 1 to 5 texts as choices"),
    ("subject", "cooking", "subject 'cooking'"),
    ("grade", "first", "grade 'first'"),
    ("question", None, "'question' that is not text"),
    ("image", 3, "has the image 3"),
])
def test_a_field_that_is_wrong(fails_to_train, sqa, field, value, says):
    def change(problems):
        problems["6"][field] = value

    edit(sqa / "problems.json", change)
    fails_to_train(says=["problems.json", "problem 6", says])


@pytest.mark.parametrize("field", [
    "question", "choices", "answer", "hint", "image", "lecture", "solution", "split", "subject",
    "grade"])
def test_a_field_that_is_missing(fails_to_train, sqa, field):
    def change(problems):
        del problems["6"][field]

    edit(sqa / "problems.json", change)
    fails_to_train(says=["problems.json", "problem 6", f"lacks the field '{field}'"])


@pytest.mark.parametrize("content, says", [
    (b"{not json", "not JSON"),
    (b"\xff\xfe\xff", "not JSON"),
    (b"[]", "not an object, as ScienceQA's is"),
    (b'{"0": 3}', "problem 0 is not an object"),
])
def test_problems_that_cannot_be_read(fails_to_train, sqa, content, says):
    (sqa / "problems.json").write_bytes(content)
    fails_to_train(says=["problems.json", says])


@pytest.mark.parametrize("content, says", [
    ('{"train": ["0", "77"]}', "split 'train' names problem 77"),
    ("[]", "not an object, as ScienceQA's is"),
    ("", "not JSON"),
    ('{"test": ["0"]}', "no split 'train'; it has test"),
    ('{"train": []}', "split 'train' is empty"),
    ('{"train": 3}', "split 'train' is not a list of ids"),
])
def test_splits_that_cannot_be_read(fails_to_train, sqa, content, says):
    (sqa / "pid_splits.json").write_text(content)
    fails_to_train(says=["pid_splits.json", says])


def test_a_caption_file_that_is_none(fails_to_train, sqa):
    for content in ("[]", "{}", '{"captions": 3}', "{"):
        (sqa / "captions.json").write_text(content)
        fails_to_train("--captions", says=["captions.json"])
    (sqa / "captions.json").unlink()
    fails_to_train("--captions", says=["captions.json", "cannot be read"])


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [
    Path.unlink,
    functools.partial(Path.write_bytes, data=b""),
    functools.partial(Path.write_bytes, data=b"no picture"),
    cut_in_half,
], ids=["missing", "empty", "text", "truncated"])
def test_pictures(fails_to_train, fails, sqa, damage, workers):
    path = sqa / "images" / "train" / "10" / "image.png"
    damage(path)
    fails_to_train("--workers", workers, says=["problem 10", path])
    fails(generate, *ask("--image", path), says=[path])
