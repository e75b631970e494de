"""MME and captions on an invented miniature, with scores computed by hand."""

import json
import os

import pytest
from PIL import Image

import generate
from conftest import ADAPTER, LLAMA, VIT
from extras import benchmarks
from files import LavinError
from helpers import outcome


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
        "existence": (75, 50, 125),         # 3 of 4 questions; both questions of 1 of 2 pictures
        "code_reasoning": (50, 0, 50),      # 1 of 2 questions; both questions of no picture
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


def test_a_bad_picture_costs_its_own_answers_alone(mme, tmp_path, ask):
    (mme / "existence" / "a.png").write_bytes(b"no picture")
    predictions = tmp_path / "predictions.json"
    code, stdout, stderr = ask("--data", f"mme:{mme}", "--predictions", predictions)
    assert code == 2
    (line,) = stderr.splitlines()
    assert "a.png: not a picture" in line and "2 of 6 have no answer" in line
    assert "perception" in stdout
    assert "2 of 6 have a picture that cannot be decoded; they count as wrong" in stdout
    written = json.loads(predictions.read_text())
    assert set(written["missing"]) == {"existence/a/1", "existence/a/2"}
    assert "a.png: not a picture" in written["missing"]["existence/a/1"]
    for identity, text in written["outputs"].items():
        assert (text == "") == (identity in written["missing"])


def test_a_bad_picture_has_an_empty_caption(tmp_path, ask):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")
    (tmp_path / "y.png").write_bytes(b"no picture")
    images = [{"id": 0, "file_name": "y.png"}, {"id": 7, "file_name": "x.png"}]
    annotations = tmp_path / "coco.json"
    annotations.write_text(json.dumps({"images": images}))
    predictions = tmp_path / "predictions.json"
    code, _, stderr = ask("--data", f"caption:{annotations}", "--prompt", "Describe it.",
                          "--max-new-tokens", 3, "--predictions", predictions)
    assert code == 2 and "y.png: not a picture" in stderr and len(stderr.splitlines()) == 1
    bad, good = json.loads(predictions.read_text())
    assert bad["image_id"] == 0 and bad["caption"] == "" and "not a picture" in bad["missing"]
    assert good["image_id"] == 7 and good["caption"] and "missing" not in good


def test_names_that_are_not_unicode_are_written(mme, tmp_path, ask):
    """Python reads such names as surrogates, which UTF-8 cannot encode."""
    for suffix in (".png", ".txt"):
        (mme / "existence" / f"a{suffix}").rename(mme / "existence" / f"caf\udce9{suffix}")
    predictions = tmp_path / "predictions.json"
    code, _, stderr = ask("--data", f"mme:{mme}", "--predictions", predictions)
    assert code == 0, stderr
    assert "existence/caf\udce9/1" in json.loads(predictions.read_text())["outputs"]


def test_a_pipe_among_mmes_files_is_not_waited_for(mme):
    questions = mme / "existence" / "a.txt"
    questions.unlink()
    os.mkfifo(questions)
    error = outcome(lambda: benchmarks.load_mme(mme))
    assert "a.png: its questions file, a.txt, cannot be read" in str(error)


def test_pictures_of_the_same_name_are_refused(mme):
    """Their questions would have the same ids."""
    Image.new("RGB", (8, 8)).save(mme / "existence" / "a.jpg")
    with pytest.raises(LavinError, match="a.png: existence has another picture of the same name"):
        benchmarks.load_mme(mme)


def test_bad_questions_are_named_in_one_line(mme, ask):
    questions = mme / "existence" / "a.txt"
    for text in ("What?\tMaybe\n", "No tab", "\tYes"):
        questions.write_text(text)
        code, _, stderr = ask("--data", f"mme:{mme}")
        assert code == 2 and len(stderr.splitlines()) == 1
        assert f"{questions} line 1" in stderr
    for text in ("", "What?\tYes\n", "What?\tYes\nWho?\tNo\nWhere?\tNo\n"):
        questions.write_text(text)
        code, _, stderr = ask("--data", f"mme:{mme}")
        assert code == 2 and f"{questions}: MME asks two questions" in stderr
    questions.unlink()
    code, _, stderr = ask("--data", f"mme:{mme}")
    assert code == 2 and "a.png: its questions" in stderr


def test_folders_without_pictures_are_refused(tmp_path, ask):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, says in (
            ("nowhere", "no such folder"),
            ("file", "no such folder"),
            ("x" * 3000, "no such folder"),
            ("empty", "holds no folder of pictures")):
        code, _, stderr = ask("--data", f"mme:{tmp_path / name}")
        assert code == 2 and says in stderr and len(stderr.splitlines()) == 1


def test_bad_annotations_are_named(tmp_path, ask):
    annotations = tmp_path / "coco.json"
    predictions = tmp_path / "predictions.json"
    os.mkfifo(tmp_path / "pipe")
    images = [{"file_name": "coco.json"}]
    for identity in (None, 1.5, True, float("nan"), [1], {}):
        images.append({"id": identity, "file_name": "coco.json"})
    for name in ("no.png", "pipe", ".", "", None, 3, "../x.png", "/usr/x.png", "x\0", "x" * 9999,
                 "\ud800"):
        images.append({"id": 1, "file_name": name})
    contents = [[], {}, {"images": {}}, {"images": [3]}, {"images": [[]]}]
    contents += [{"images": [image]} for image in images]
    twice = {"id": 1, "file_name": "coco.json"}
    contents.append({"images": [twice, twice]})
    for content in contents:
        annotations.write_text(json.dumps(content))
        code, _, stderr = ask("--data", f"caption:{annotations}", "--prompt", "x",
                              "--predictions", predictions)
        assert code == 2 and str(annotations) in stderr and len(stderr.splitlines()) == 1, content
        assert not predictions.exists()


def test_captions_need_a_folder_of_pictures(tmp_path, ask):
    annotations = tmp_path / "coco.json"
    annotations.write_text("{}")
    rest = ("--prompt", "x", "--predictions", tmp_path / "predictions.json")
    code, _, stderr = ask("--data", f"caption:{annotations}:nowhere", *rest)
    assert code == 2 and "there is no folder nowhere" in stderr
    code, _, stderr = ask("--data", f"caption:{tmp_path / 'none.json'}", *rest)
    assert code == 2 and "none.json: no such file" in stderr


def test_a_caption_may_have_any_number_as_its_id(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "y.png").symlink_to(tmp_path / "x.png")
    images = [{"id": 10**400, "file_name": "x.png"}, {"id": "7", "file_name": "y.png"}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images}))
    samples = benchmarks.load_captions(str(tmp_path / "coco.json"), "Describe it.")
    assert [sample.id for sample in samples] == [10**400, "7"]


def test_flags_that_do_not_go_together(mme, tmp_path, ask):
    annotations = tmp_path / "coco.json"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    annotations.write_text(json.dumps({"images": [{"id": 1, "file_name": "x.png"}]}))
    captions = ("--data", f"caption:{annotations}")
    for flags, says in (
            (["--data", "dogs"], "--data dogs: no such file"),
            (["--data", "mme:"], "--data mme:: no such file"),
            (captions, "caption:… needs --prompt and --predictions"),
            ([*captions, "--prompt", "x"], "caption:… needs --prompt and --predictions"),
            (["--data", f"mme:{mme}", "--prompt", "x"], "give one of --prompt, --chat, --serve")):
        code, _, stderr = ask(*flags)
        assert code == 2 and says in stderr and len(stderr.splitlines()) == 1, flags
