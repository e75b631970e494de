"""MME and captions on an invented miniature, with scores computed by hand."""

import json

import pytest
from PIL import Image

import benchmarks
import generate
from conftest import ADAPTER, LLAMA, VIT

FLAGS = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER, "--workers", 0)


@pytest.fixture
def mme(tmp_path):
    """`existence`, two pictures with their questions beside them, and `code_reasoning`, one with them apart."""
    for name in ("existence/a", "existence/b", "code_reasoning/images/c"):
        path = tmp_path / "mme" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
        text = path.with_suffix(".txt")
        if "images" in name:
            text = path.parent.parent / "questions_answers_YN" / "c.txt"
            text.parent.mkdir()
        text.write_text("Is it red? Answer yes or no.\tYes\nIs it blue? Answer yes or no.\tNo\n")
    return tmp_path / "mme"


def test_scores_are_those_computed_by_hand(mme):
    samples, truths = benchmarks.load_mme(mme)
    assert len(samples) == 6 and truths["existence/a/1"] and not truths["code_reasoning/c/2"]
    assert samples[0].prompt == "Instruction: Is it red? Answer yes or no.\nResponse:"
    outputs = {"existence/a/1": "Yes, it is.", "existence/a/2": "no", "existence/b/1": " YES", "existence/b/2": "Yes",
               "code_reasoning/c/1": "Perhaps yes", "code_reasoning/c/2": "No."}
    scores = benchmarks.mme_scores(outputs, truths)
    # Of existence 3 of 4 questions, both of one picture of two; of the other 1 of 2 questions and of no picture both.
    assert scores == {"existence": (75, 50, 125), "code_reasoning": (50, 0, 50), "perception": 125, "cognition": 50}
    assert "existence                    75.00      50.00    125.00" in benchmarks.mme_table(scores)


def test_mme_from_the_command_line(mme, tmp_path, call):
    code, stdout, stderr = call(generate, "--data", f"mme:{mme}", "--predictions", tmp_path / "p.json", *FLAGS)
    assert code == 0 and "perception" in stdout and "neither yes nor no" in stdout, stderr
    written = json.loads((tmp_path / "p.json").read_text())
    assert len(written["outputs"]) == 6 and written["scores"].keys() >= {"existence", "cognition"}


def test_captions_have_the_format_of_cocos_evaluation(tmp_path, call):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 7, "file_name": "x.png"}]}))
    code, _, stderr = call(generate, "--data", f"caption:{tmp_path / 'coco.json'}", "--prompt", "Describe it.", "--max-new-tokens", 3,
                           "--predictions", tmp_path / "p.json", *FLAGS)
    assert code == 0, stderr
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert row["image_id"] == 7 and isinstance(row["caption"], str)


def test_what_is_wrong_is_one_line(mme, tmp_path, call):
    questions = mme / "existence" / "a.txt"
    bad = tmp_path / "coco.json"
    for text in ("What?\tMaybe\n", "No tab", "\tYes"):
        questions.write_text(text)
        code, _, stderr = call(generate, "--data", f"mme:{mme}", *FLAGS)
        assert code == 2 and f"{questions} line 1" in stderr and len(stderr.splitlines()) == 1
    questions.unlink()
    assert "a.png: its questions" in call(generate, "--data", f"mme:{mme}", *FLAGS)[2]
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        assert call(generate, "--data", f"mme:{tmp_path / folder}", *FLAGS)[0] == 2
    for content in ([], {}, {"images": [3]}, {"images": [{"id": 1, "file_name": "no.png"}]}):
        bad.write_text(json.dumps(content))
        code, _, stderr = call(generate, "--data", f"caption:{bad}", "--prompt", "x", "--predictions", tmp_path / "p.json", *FLAGS)
        assert code == 2 and str(bad) in stderr and not (tmp_path / "p.json").exists()
    for flags in (["--data", "dogs"], ["--data", "mme:"], ["--data", f"caption:{bad}"], ["--data", f"mme:{mme}", "--prompt", "x"]):
        assert call(generate, *flags, *FLAGS)[0] == 2
