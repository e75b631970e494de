"""MME and captions on an invented miniature, with scores computed by hand."""

import json

import pytest
from PIL import Image

import generate
from conftest import ADAPTER, LLAMA, VIT
from extras import benchmarks

QUESTIONS = "Is it red? Answer yes or no.\tYes\nIs it blue? Answer yes or no.\tNo\n"


@pytest.fixture
def mme(tmp_path):
    """Two subtasks: existence has two pictures with their questions beside them, code_reasoning has
    one with them in a folder of their own."""
    folder = tmp_path / "mme"
    for name in ("existence/a", "existence/b", "code_reasoning/images/c"):
        picture = folder / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(picture)
    (folder / "existence" / "a.txt").write_text(QUESTIONS)
    (folder / "existence" / "b.txt").write_text(QUESTIONS)
    apart = folder / "code_reasoning" / "questions_answers_YN"
    apart.mkdir()
    (apart / "c.txt").write_text(QUESTIONS)
    return folder


@pytest.fixture
def ask(call):
    """ask("--flag", value, …): generate.py on the golden model."""
    def ask(*flags):
        model = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)
        return call(generate, *flags, *model, "--workers", 0)
    return ask


def test_scores_are_those_computed_by_hand(mme):
    samples, truths = benchmarks.load_mme(mme)
    assert len(samples) == 6
    assert truths["existence/a/1"] and not truths["code_reasoning/c/2"]
    questions = {sample.id: sample.prompt for sample in samples}
    expected = "Instruction: Is it red? Answer yes or no.\nResponse:"
    assert questions["existence/a/1"] == expected
    outputs = {
        "existence/a/1": "Yes, it is.",
        "existence/a/2": "no",
        "existence/b/1": " YES",
        "existence/b/2": "Yes",
        "code_reasoning/c/1": "Perhaps yes",
        "code_reasoning/c/2": "No.",
    }
    scores = benchmarks.mme_scores(outputs, truths)
    assert scores == {
        "existence": (75, 50, 125),         # 3 of 4 questions; both of one of the two pictures
        "code_reasoning": (50, 0, 50),      # 1 of 2 questions; both of none
        "perception": 125,
        "cognition": 50,
    }
    row = "existence                    75.00      50.00    125.00"
    assert row in benchmarks.mme_table(scores)


def test_mme_from_the_command_line(mme, tmp_path, ask):
    predictions = tmp_path / "predictions.json"
    code, stdout, stderr = ask("--data", f"mme:{mme}", "--predictions", predictions)
    assert code == 0, stderr
    assert "perception" in stdout and "neither yes nor no" in stdout
    written = json.loads(predictions.read_text())
    assert len(written["outputs"]) == 6
    assert written["scores"].keys() >= {"existence", "cognition"}


def test_captions_have_the_form_of_cocos_evaluation(tmp_path, ask):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")
    annotations = tmp_path / "coco.json"
    annotations.write_text(json.dumps({"images": [{"id": 7, "file_name": "x.png"}]}))
    predictions = tmp_path / "predictions.json"
    code, _, stderr = ask("--data", f"caption:{annotations}", "--prompt", "Describe it.",
                          "--max-new-tokens", 3, "--predictions", predictions)
    assert code == 0, stderr
    (row,) = json.loads(predictions.read_text())
    assert row["image_id"] == 7 and isinstance(row["caption"], str)


def test_bad_questions_are_named_in_one_line(mme, ask):
    questions = mme / "existence" / "a.txt"
    for text in ("What?\tMaybe\n", "No tab", "\tYes"):
        questions.write_text(text)
        code, _, stderr = ask("--data", f"mme:{mme}")
        assert code == 2 and len(stderr.splitlines()) == 1
        assert f"{questions} line 1" in stderr
    questions.unlink()
    code, _, stderr = ask("--data", f"mme:{mme}")
    assert code == 2 and "a.png: its questions" in stderr


def test_folders_without_pictures_are_refused(tmp_path, ask):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        assert ask("--data", f"mme:{tmp_path / name}")[0] == 2


def test_bad_annotations_are_named(tmp_path, ask):
    annotations = tmp_path / "coco.json"
    predictions = tmp_path / "predictions.json"
    no_picture = {"images": [{"id": 1, "file_name": "no.png"}]}
    no_id = {"images": [{"file_name": "coco.json"}]}
    for content in ([], {}, {"images": [3]}, no_picture, no_id):
        annotations.write_text(json.dumps(content))
        code, _, stderr = ask("--data", f"caption:{annotations}", "--prompt", "x",
                              "--predictions", predictions)
        assert code == 2 and str(annotations) in stderr
        assert not predictions.exists()


def test_flags_that_do_not_go_together(mme, tmp_path, ask):
    annotations = tmp_path / "coco.json"
    for flags in (
            ["--data", "dogs"],
            ["--data", "mme:"],
            ["--data", f"caption:{annotations}"],
            ["--data", f"mme:{mme}", "--prompt", "x"]):
        assert ask(*flags)[0] == 2
