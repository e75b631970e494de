"""ScienceQA's files: what is read from them, and the errors for damaged ones."""

import functools
import json
import os
from pathlib import Path

import pytest

import generate
import train
from conftest import flags
from extras.scienceqa import load_sqa
from files import LavinError
from helpers import ask, edit, outcome


@pytest.fixture
def fails_to_train(fails, sqa, tmp_path):
    """fails_to_train("--flag", value, …, says=[…]): `fails` for train.py with `sqa`."""
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
    ("answer", True, "has the answer True"),
    ("answer", 10**400, "has the answer 1000"),
    ("question", None, "'question' that is not Unicode text"),
    ("hint", "\ud800", "'hint' that is not Unicode text"),
    ("choices", ["x", "\ud800"], "does not have 1 to 5 texts as choices"),
    ("grade", "grade\u0663", "which is not one of ScienceQA's"),
    ("image", 3, "has the image 3"),
    ("image", [[[]]], "has the image [[[]]]"),
    ("image", "../../../../problems.json", "leads out of"),
    ("image", "/usr/share/x.png", "no such file"),
    ("image", "x\0.png", "leads out of"),
    ("image", "x" * 100_000, "File name too long"),
    ("split", "../..", "leads out of"),
    ("split", "/usr", "leads out of"),
    ("split", "exam", "no such file"),
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
    (b"[]", "must be an object, as in ScienceQA"),
    (b'{"0": 3}', "problem 0 is not an object"),
])
def test_problems_that_cannot_be_read(fails_to_train, sqa, content, says):
    (sqa / "problems.json").write_bytes(content)
    fails_to_train(says=["problems.json", says])


@pytest.mark.parametrize("content, says", [
    ('{"train": ["0", "77"]}', "split 'train' names problem 77"),
    ("[]", "must be an object, as in ScienceQA"),
    ("", "not JSON"),
    ('{"test": ["0"]}', "no split 'train'; it has test"),
    ('{"train": []}', "split 'train' is empty"),
    ('{"train": 3}', "split 'train' is not a list of ids"),
])
def test_splits_that_cannot_be_read(fails_to_train, sqa, content, says):
    (sqa / "pid_splits.json").write_text(content)
    fails_to_train(says=["pid_splits.json", says])


@pytest.mark.parametrize("pid, says", [
    ({}, "holds {}, which is not an id"),
    (None, "holds None"),
    (1.5, "holds 1.5"),
    (True, "holds True"),
    ("1", "names problem 1 twice"),
    (1, "names problem 1 twice"),
    (10**400, "names problem 1000"),
    ("\x1b[2J", "which problems.json lacks"),
])
def test_an_id_that_names_no_problem_or_one_twice(fails_to_train, sqa, pid, says):
    edit(sqa / "pid_splits.json", lambda splits: splits["val"].extend(["1", pid]))
    fails_to_train(says=["pid_splits.json", "split 'val'", says])


def test_ids_may_be_numbers(sqa):
    edit(sqa / "pid_splits.json", lambda splits: splits.update(few=[3, "5"]))
    problems, _ = load_sqa(sqa, "few")
    assert list(problems) == ["3", "5"]


@pytest.mark.parametrize("pid", ["../../../../../etc", "/etc", "..", "x\0", "\ud800", "x" * 99_999])
def test_an_id_that_is_no_folder_of_the_data_set(sqa, pid):
    """A picture is in a folder that is named after its problem."""
    edit(sqa / "problems.json", lambda problems: problems.update({pid: problems["0"]}))
    edit(sqa / "pid_splits.json", lambda splits: splits["train"].append(pid))
    with pytest.raises(LavinError, match="problems.json: problem .*(leads out|no such|cannot)"):
        load_sqa(sqa, "train")


def test_links_to_pictures_elsewhere_are_followed(sqa, tmp_path):
    (sqa / "images").rename(tmp_path / "elsewhere")
    (sqa / "images").symlink_to(tmp_path / "elsewhere")
    _, samples = load_sqa(sqa, "train")
    assert samples[0].image.is_file()


def test_an_empty_choice_is_a_choice(sqa):
    def change(problems):
        problems["6"]["choices"][1] = ""

    edit(sqa / "problems.json", change)
    load_sqa(sqa, "train")


@pytest.mark.parametrize("name", [
    "problems.json", "pid_splits.json", "captions.json", "images/train/10/image.png"])
def test_a_pipe_is_not_waited_for(sqa, name):
    (sqa / name).unlink()
    os.mkfifo(sqa / name)
    error = outcome(lambda: load_sqa(sqa, "train", use_captions=True))
    assert "a pipe or a device, where a file is needed" in str(error)


@pytest.mark.parametrize("caption", [3, None, ["x"], "\ud800"])
def test_a_caption_that_is_no_text(fails_to_train, sqa, caption):
    edit(sqa / "captions.json", lambda content: content["captions"].update({"6": caption}))
    fails_to_train("--captions", says=["captions.json", "problem 6 is not Unicode text"])


@pytest.mark.parametrize("depth", [900, 100_000])
def test_json_that_is_too_deep(fails_to_train, sqa, depth):
    """At depth 900 it can still be read, but perhaps not printed."""
    deep = "[" * depth + "]" * depth
    problems = json.loads((sqa / "problems.json").read_text())
    problems["6"]["image"] = "DEEP"
    (sqa / "problems.json").write_text(json.dumps(problems).replace('"DEEP"', deep))
    fails_to_train(says=["problems.json"])


def test_a_file_that_does_not_hold_captions(fails_to_train, sqa):
    for content in ("[]", "{}", '{"captions": 3}', "{"):
        (sqa / "captions.json").write_text(content)
        fails_to_train("--captions", says=["captions.json"])
    (sqa / "captions.json").unlink()
    fails_to_train("--captions", says=["captions.json", "no such file"])


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
