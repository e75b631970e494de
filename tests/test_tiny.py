"""The embedded default: a world in ScienceQA's layout, base models in the official formats, and the scripts on them."""

import json
import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import generate
import tiny
import train
from files import LavinError
from model import LaVIN

SIZES = (64, 12, 40)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A small world in the place of the embedded default's data, and a directory without anything else to be in."""
    root = tmp_path / "world"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tiny.PATHS, "data_root", root)
    monkeypatch.setattr(tiny, "SIZES", SIZES)
    return root


def test_the_world_is_scienceqa_in_its_real_layout_and_a_function_of_its_seed(tmp_path):
    for name in ("a", "b"):
        tiny.write_world(tmp_path / name, sizes=SIZES)
    for split, size in zip(("train", "val", "test"), SIZES):
        problems, samples = data.load_sqa(tmp_path / "a", split, use_captions=True)
        assert len(samples) == size and sum(s.image is not None for s in samples) == size // 2
        assert {s.id for s in samples if "Context: N/A" not in s.prompt} >= {p for p, q in problems.items() if q["image"]}
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) == 4 + sum(SIZES) // 2
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_nothing_can_be_guessed_from_the_text():
    """A picture question with given choices has every one of them as its answer, equally often, wherever it stands."""
    rng, answers, places = random.Random(0), defaultdict(Counter), defaultdict(Counter)
    for _ in range(60_000):
        item = tiny.seen(rng)
        p = tiny.problem(item, rng, "train")
        answers[p["question"], tuple(sorted(p["choices"]))][item.choices[0]] += 1
        places[len(p["choices"])][p["answer"]] += 1
    for (question, choices), right in answers.items():
        assert len(right) == len(choices) and max(right.values()) < 2 * min(right.values()), (question, choices, right)
    for n, counts in places.items():
        assert max(counts.values()) < 1.1 * min(counts.values()), (n, counts)


def test_every_skill_has_subjects_grades_and_reasons(tmp_path):
    tiny.write_world(tmp_path / "world", sizes=(600, 2, 400))
    problems = json.loads((tmp_path / "world/problems.json").read_text()).values()
    train_split = [p for p in problems if p["split"] == "train"]
    assert len({p["skill"] for p in train_split if p["image"]}) >= 10
    assert len({p["skill"] for p in train_split if not p["image"]}) >= 6
    assert {p["subject"] for p in train_split} == set(data.SUBJECTS)
    assert {int(p["grade"][5:]) <= 6 for p in train_split} == {True, False}
    assert {bool(p["hint"]) for p in train_split if p["image"]} == {True, False}
    assert all(p["lecture"] and p["solution"] and p["choices"][p["answer"]] in p["solution"] for p in problems)
    new = {p["split"] for p in problems if p["skill"].endswith("(new combinations)")}
    assert new == {"test"}


def test_kept_combinations_are_never_shown_before_the_test():
    rng = random.Random(0)

    def met(caption):
        shape, colour = ([word for word in caption.split(", ") if word in words] for words in (tiny.SHAPES, tiny.COLOURS))
        return bool(shape and colour) and tiny.is_new(shape[0], colour[0])

    assert sum(tiny.is_new(shape, colour) for shape in tiny.SHAPES for colour in tiny.COLOURS) == len(tiny.SHAPES)
    scenes = [tiny.seen(rng) for _ in range(5000)]
    assert not any(met(item.caption) or "(new" in item.skill for item in scenes)
    assert all(met(item.caption) and "(new" in item.skill for item in (tiny.things(rng, True) for _ in range(100)))
    asked = [tiny.described(rng) for _ in range(2000)]
    assert not any(met(item.hint.partition("shows ")[2].removesuffix(".")) for item in asked)
    *_, last_stage = tiny.CURRICULUM
    texts = [tiny.document(rng, *last_stage[1:]) for _ in range(2000)]
    assert any(met(words or "") for words, _ in texts)                      # LLaMA has read of them


def test_a_described_scene_stands_where_a_picture_would(lavin):
    sample = data.Sample("What is it?", " A star.", Image.new("RGB", (9, 9)))
    shown = data.encode(sample, lavin.tokenizer, 2, 512)
    tokens, labels, described = tiny.encode("one star", sample, lavin.tokenizer)
    assert tokens[described] == lavin.tokenizer.encode("one star")
    after = described.start + 2
    assert tokens[:described.start] + tokens[described.stop:] == [*shown.tokens[:described.start], *shown.tokens[after:]]
    assert labels[described.stop:] == shown.labels[after:].tolist()


def test_what_is_said_of_something_is_not_blurred():
    rng, words = random.Random(0), [item.caption for item in (tiny.seen(random.Random(i)) for i in range(200))]
    chosen = {text for text in words for _ in range(20) if tiny.blur(text, rng)}
    assert chosen == {text for text in words if not text.startswith(("a flag", "a bar chart"))}
    assert not tiny.blur(None, rng)


def test_pretraining_writes_models_that_lavin_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "TOKENIZER_DOCUMENTS", 2000)
    folder = tmp_path / "llama"
    tiny.make_folder(folder, lambda temporary: tiny.pretrain_llama(temporary, steps=3, batch_size=4, n_scored=1))
    tiny.pretrain_clip(tmp_path / "ViT.pt", steps=3, batch_size=12, n_pictures=200, n_scored=20)
    lavin = LaVIN.load(folder, tmp_path / "ViT.pt")
    picture = tiny.render(tiny.magnets(random.Random(0)), random.Random(0))
    loss = lavin(lavin.batch([data.Sample("Will they repel?", "Yes.", picture), data.Sample("A word.", "Another.")]))
    assert torch.isfinite(loss) and lavin.vit.conv1.weight.std() > 0
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    assert {t.dtype for t in state.values()} == {torch.float16} and not any("adapter" in name for name in state)


def test_what_is_committed_answers_questions_about_described_scenes():
    """The frozen LLaMA alone, on the CPU: the letters of new questions in words."""
    llama = LaVIN.load(tiny.PATHS["llama"], tiny.PATHS["vit"])
    scores = tiny.letter_scores(llama.llama, llama.tokenizer, n=3)
    assert sum(scores.values()) / len(scores) > 90, scores


def test_train_and_generate_with_no_paths_take_the_embedded_default(call, world):
    code, stdout, _ = call(train, "--data", "sqa", "--epochs", 1, "--workers", 0, "--eval-limit", 4)
    assert code == 0 and "LLaMA" in stdout and "ViT-tiny.pt" in stdout and "lr 0.006" in stdout
    assert (world / "world.json").exists() and Image.open("out/loss.png").size == (800, 440)
    (world / "world.json").touch()
    code, stdout, _ = call(generate, "--data", "sqa", "--by", "skill", "--workers", 0, "--predictions", "out/p.json")
    assert code == 0 and "drawing" not in stdout and "new combinations" in stdout
    predictions = json.loads(open("out/p.json").read())["results"]
    code, stdout, _ = call(generate, "--data", "sqa", "--blank-images", "--workers", 0, "--predictions", "out/blank.json")
    blanked = json.loads(open("out/blank.json").read())["results"]
    problems, _ = data.load_sqa(world, "test")
    assert all(blanked[pid] == index for pid, index in predictions.items() if not problems[pid]["image"])
    code, stdout, _ = call(generate, "--data", "sqa", "--adapter", "none", "--workers", 0)
    assert code == 0 and "adapter none" in stdout
    code, stdout, _ = call(generate, "--show-routing")
    assert code == 0 and Image.open("out/routing.png").size == (800, 440) and "text, untrained" in stdout
    tiny.sheet("out/p.json", "out/sheet.png", 4)
    assert Image.open("out/sheet.png").height == 2 * 170


def test_real_weights_come_first_and_missing_ones_are_listed(call, world):
    (world.parent / "weights").mkdir()
    (world.parent / "weights/ViT-L-14.pt").touch()
    code, _, stderr = call(train, "--data", "sqa")
    assert code == 2 and "weights/7B/params.json" in stderr and "data/scienceqa/problems.json" in stderr
    assert not world.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_half_made_world_is_never_left(world, monkeypatch, error):
    def fail(*args):
        raise error
    monkeypatch.setattr(tiny, "render", fail)
    with pytest.raises((LavinError, KeyboardInterrupt)):
        tiny.prepare(SimpleNamespace(data="sqa", llama=None, vit=None, data_root=None))
    assert not world.exists() and not list(world.parent.glob("*.tmp"))


def test_a_directory_that_cannot_be_written(call, world, monkeypatch):
    monkeypatch.setitem(tiny.PATHS, "data_root", world / "file" / "scienceqa")
    world.write_text("in the way")
    code, _, stderr = call(train, "--data", "sqa")
    assert code == 2 and "cannot be made" in stderr and len(stderr.splitlines()) == 1


def test_a_world_of_another_version_says_how_to_remake_it(call, world):
    tiny.make_folder(world, tiny.write_world)
    (world / "world.json").write_text('{"version": 0}')
    code, _, stderr = call(train, "--data", "sqa")
    assert code == 2 and "another version" in stderr and "python tiny.py" in stderr


@pytest.mark.parametrize("flags, trained", [
    (["--adapters", "none"], {"projector"}), (["--adapters", "llama"], {"projector", "llama", "modality_embedding"}),
    (["--no-routing"], {"projector", "llama", "vit"}), ([], {"projector", "llama", "vit", "modality_embedding"})],
    ids=["projector only", "llama only", "no routing", "all"])
def test_ablations_train_what_they_say(call, world, flags, trained):
    common = ("--data", "sqa", "--max-steps", 2, "--workers", 0, "--eval-limit", 0, "--lr", 0.1, "--dropout", 0)
    assert call(train, *common, *flags)[0] == 0
    after = LaVIN.load(tiny.PATHS["llama"], tiny.PATHS["vit"], "out/checkpoint.pth")
    torch.manual_seed(data.mixed_seed(0, 0))
    before = dict(LaVIN.load(tiny.PATHS["llama"], tiny.PATHS["vit"]).named_parameters())
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    if "--no-routing" in flags:
        assert torch.equal(after.route(), torch.full_like(after.route(), 0.5))
        changed = {name for name in changed if ".router." not in name}          # to zero
    assert {name.split(".")[0] for name in changed} == trained
    code, _, stderr = call(train, *common, "--resume", "--adapters", "llama" if "llama" not in flags else "all")
    assert code == 2 and "adapters" in stderr
