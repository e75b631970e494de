"""The small world: its data, its two base models, and the scripts that use it by default."""

import hashlib
import json
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor

import checkpoints
import data
import generate
import train
from bench import ablations
from extras.scienceqa import SUBJECTS, load_sqa
from files import LavinError
from tiny import album, corpus, drawing, pretrain, world

SIZES = (64, 12, 40)


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """The folder into which the scripts will write their data: a smaller world, not yet there."""
    root = tmp_path / "world"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(world.PATHS, "data_root", root)
    monkeypatch.setattr(world, "SIZES", SIZES)
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """800, 100 and 400 problems of the splits -> (problems, captions), by id."""
    root = tmp_path_factory.mktemp("drawn")
    world.write_world(root, sizes=(800, 100, 400))
    problems = json.loads((root / "problems.json").read_text())
    captions = json.loads((root / "captions.json").read_text())["captions"]
    return problems, captions


def read_results(path):
    return json.loads(Path(path).read_text())["results"]


# The data


def test_the_world_has_scienceqas_layout(tmp_path):
    world.write_world(tmp_path, sizes=SIZES)
    for split, size in zip(world.SPLITS, SIZES):
        problems, samples = load_sqa(tmp_path, split, use_captions=True)
        with_picture = [s for s in samples if s.image is not None]
        assert len(samples) == size
        assert len(with_picture) == size // 2
        for sample in with_picture:
            assert problems[sample.id]["image"]
            assert "Context: N/A" not in sample.prompt          # the context is the caption
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4 + sum(SIZES) // 2


def test_the_world_is_a_function_of_its_seed(tmp_path):
    for name in ("a", "b"):
        world.write_world(tmp_path / name, sizes=SIZES)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            other = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == other.read_bytes(), path


def test_a_version_of_the_world_never_changes(tmp_path):
    """The tables in docs/small-world.md were measured on version 6.

    Pictures and questions use the same random generator, so a change to either is found, except for
    one that draws as often from the generator.
    """
    world.write_world(tmp_path, sizes=SIZES)
    digest = hashlib.sha256((tmp_path / "problems.json").read_bytes()).hexdigest()
    assert world.VERSION == 6
    assert digest == "bfffdcd2616dae3279002dece1c2e96332da22c069b1af828e524ade9a24bf19"


def test_nothing_can_be_guessed_from_the_text():
    """In picture questions, each choice and each position is the right one about equally often."""
    rng = Random(0)
    answers = defaultdict(Counter)      # {(question, choices): {right choice: count}}
    positions = defaultdict(Counter)    # {number of choices: {right position: count}}
    for _ in range(60_000):
        item = world.picture_item(rng)
        problem = world.problem(item, rng, "train")
        choices = tuple(sorted(problem["choices"]))
        answers[problem["question"], choices][item.choices[0]] += 1
        positions[len(choices)][problem["answer"]] += 1
    for (question, choices), counts in answers.items():
        assert len(counts) == len(choices), (question, choices, counts)
        assert max(counts.values()) < 2 * min(counts.values()), (question, choices, counts)
    for n, counts in positions.items():
        assert max(counts.values()) < 1.1 * min(counts.values()), (n, counts)


def test_every_skill_has_subjects_grades_and_reasons(drawn):
    problems = drawn[0].values()
    shown = [p for p in problems if p["split"] == "train" and p["image"]]
    told = [p for p in problems if p["split"] == "train" and not p["image"]]
    assert len({p["skill"] for p in shown}) >= 10
    assert len({p["skill"] for p in told}) >= 6
    assert {p["subject"] for p in shown + told} == set(SUBJECTS)
    assert {int(p["grade"].removeprefix("grade")) <= 6 for p in shown + told} == {True, False}
    hints = {p["hint"].partition("'s picture shows")[1] for p in shown}
    assert hints == {"", "'s picture shows"}
    for p in problems:
        assert p["lecture"]
        assert p["choices"][p["answer"]] in p["solution"]


def test_the_same_hint_is_the_truth_in_words_and_misleads_beside_a_picture(drawn):
    problems, captions = drawn
    n_hints = Counter()
    for pid, problem in problems.items():
        _, shows, scene = problem["hint"].partition("'s picture shows ")
        if not shows:
            continue
        n_hints[problem["image"]] += 1
        if problem["image"]:
            assert scene != captions[pid] + ".", problem
        else:
            assert problem["skill"] == "described scenes"
    assert 260 < n_hints["image.png"] < 390            # half of those with pictures
    assert 165 < n_hints[None] < 290                   # a third of those without


def shows_new_pair(caption):
    """Does a caption name a pair (shape, colour) that is kept for the test split?"""
    parts = caption.split(", ")
    shapes = [word for word in parts if word in world.SHAPES]
    colours = [word for word in parts if word in world.COLOURS]
    return bool(shapes and colours) and world.is_new(shapes[0], colours[0])


def names_a_colour(text):
    return not {*world.COLOURS, *world.OTHER_COLOURS}.isdisjoint(text.replace(",", "").split())


def test_things_also_have_colours_that_no_text_names(drawn):
    """So do half of the things whose number, shape or place is asked for."""
    problems, captions = drawn
    counts = Counter()              # {(asks for the colour, names it): number of problems}
    for pid, problem in problems.items():
        skill = problem["skill"]
        if problem["image"] and skill in ("count", "colour", "shape", "place"):
            is_named = names_a_colour(captions[pid])
            assert names_a_colour(problem["solution"]) == is_named
            counts[skill == "colour", is_named] += 1
    assert counts[True, False] == 0
    assert 0.5 < counts[False, True] / counts[False, False] < 2


def test_there_is_a_new_pair_for_every_shape():
    assert len(world.shape_colour_pairs(new=True)) == len(world.SHAPES)
    n_pairs = len(world.SHAPES) * len(world.COLOURS)
    assert len(world.shape_colour_pairs(new=False)) == n_pairs - len(world.SHAPES)


def test_new_pairs_are_shown_in_the_test_split_alone(drawn):
    problems, captions = drawn
    splits = set()
    for pid, problem in problems.items():
        is_new = problem["skill"].endswith("(new combinations)")
        assert is_new == shows_new_pair(captions.get(pid, "")), problem
        if is_new:
            splits.add(problem["split"])
    assert splits == {"test"}


def test_new_pairs_are_not_described_in_training_but_read_about_in_pretraining():
    rng = Random(0)
    for _ in range(2000):
        hint = world.described(rng, skills=world.TOLD_SKILLS).hint
        scene = hint.removeprefix("The picture shows ").removesuffix(".")
        assert not shows_new_pair(scene), hint
    last_stage = corpus.CURRICULUM[-1]
    texts = [corpus.document(rng, last_stage) for _ in range(2000)]
    assert any(shows_new_pair(words or "") for words, _ in texts)


# Drawing


def test_the_pencil_keeps_the_ground_and_hatches_the_things():
    flat = Image.new("RGB", (drawing.SIDE, drawing.SIDE), (240, 240, 240))
    flat.paste((220, 40, 40), (40, 40, 90, 90))
    pencilled = drawing.pencil(flat, Random(0))
    inside = [pencilled.getpixel((x, 65)) for x in range(45, 85)]
    n_red = sum(pixel == (220, 40, 40) for pixel in inside)
    assert 8 < n_red < 32                               # strokes with paper between them
    edge = [pencilled.getpixel((x, 65)) for x in range(37, 43)]
    assert min(max(pixel) for pixel in edge) < 150      # the outline is dark
    outside = [pencilled.getpixel((x, 20)) for x in range(128)]
    assert (220, 40, 40) not in outside


def test_a_group_of_the_album_is_hard_to_tell_apart():
    """Within a group, most words of the captions are the same."""
    rng = Random(0)
    for _ in range(30):
        captions = [caption for _, caption in album.group(16, rng)]
        words = [word for caption in captions for word in caption.replace(",", "").split()]
        assert len(set(words)) < 50, captions


def test_the_album_shows_no_pair_that_is_kept_for_the_test_split():
    rng = Random(0)
    for _ in range(300):
        for picture, caption in album.group(4, rng):
            assert picture.size == (drawing.SIDE, drawing.SIDE)
            words = caption.replace(",", "").split()
            for colour, shape in zip(words, words[1:]):
                assert not world.is_new(shape, colour), caption
            for shape in album.UNSEEN_SHAPES:
                assert shape not in words


# Pre-training


def test_a_described_scene_stands_where_a_picture_would(lavin):
    sample = data.Sample("What is it?", " A star.", Image.new("RGB", (9, 9)))
    shown = data.encode(sample, lavin.tokenizer, n_features=2, max_seq_len=512)
    row = pretrain.encode_document("one star", sample, lavin.tokenizer)
    start = row.description.start
    end = row.description.stop
    assert row.tokens[start:end] == lavin.tokenizer.encode("one star")
    # Around the description, everything is the same as around two features.
    assert row.tokens[:start] == shown.tokens[:start].tolist()
    assert row.tokens[end:] == shown.tokens[start + 2:].tolist()
    assert row.labels[end:] == shown.labels[start + 2:].tolist()


def test_captions_in_which_order_matters_are_not_blurred():
    rng = Random(0)
    captions = [world.picture_item(Random(i)).caption for i in range(200)]
    for caption in captions:
        is_blurred = any(pretrain.blur(caption, rng) for _ in range(20))
        assert is_blurred != caption.startswith(("a flag", "a bar chart")), caption
    assert not pretrain.blur(None, rng)


def test_pretraining_writes_models_that_lavin_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TOKENIZER_DOCUMENTS", 2000)
    folder = tmp_path / "llama"
    vit = tmp_path / "ViT.pt"
    pretrain.pretrain_llama(folder, steps=3, batch_size=4, n_scored=1)
    pretrain.pretrain_clip(vit, steps=3, batch_size=15, n_scored=3)
    lavin = checkpoints.load(folder, vit)
    picture = world.render(world.magnets(Random(0)), Random(0))
    batch = lavin.batch([
        data.Sample("Will they repel?", "Yes.", picture),
        data.Sample("A word.", "Another."),
    ])
    assert torch.isfinite(lavin(batch))
    assert lavin.vit.conv1.weight.std() > 0
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for name, tensor in state.items():
        assert tensor.dtype == torch.float16
        assert "adapter" not in name


def test_the_smaller_clip_has_fewer_features(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TOKENIZER_DOCUMENTS", 2000)
    path = tmp_path / "ViT.pt"
    pretrain.pretrain_clip(path, 2, pretrain.SMALL_CLIP_CONFIG, batch_size=15, n_scored=3)
    small = checkpoints.load(world.PATHS["llama"], path)
    large = checkpoints.load(world.PATHS["llama"], world.PATHS["vit"])
    assert (small.n_features, large.n_features) == (2, 3)


def test_the_committed_tokenizer_is_what_pretraining_makes():
    """So the corpus is still the one on which the committed LLaMA was trained."""
    committed = data.load_sentencepiece(world.PATHS["llama"])
    made = SentencePieceProcessor(model_proto=corpus.train_tokenizer(seed=0))
    ids = list(range(1024))
    assert made.id_to_piece(ids) == committed.id_to_piece(ids)


def test_the_committed_llama_answers_questions_about_described_scenes():
    """This is the frozen LLaMA, without LaVIN's training."""
    lavin = checkpoints.load(world.PATHS["llama"], world.PATHS["vit"])
    scores = pretrain.letter_scores(lavin.llama, lavin.tokenizer, n=3)
    assert sum(scores.values()) / len(scores) > 90, scores


def test_pretraining_knows_two_models(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "vicuna"])
    with pytest.raises(LavinError, match="vicuna: the models are llama, clip"):
        pretrain.main()


# The default of train.py and generate.py


def test_train_and_generate_take_the_small_world_by_default(call, small_world):
    code, stdout, _ = call(
        train, "--data", "sqa", "--epochs", 1, "--workers", 0, "--eval-limit", 4)
    assert code == 0
    assert "using the small world" in stdout and "ViT-tiny.pt" in stdout and "lr 0.008" in stdout
    assert (small_world / "world.json").exists()
    assert Image.open("out/loss.png").size == (1600, 900)

    code, stdout, _ = call(
        generate, "--data", "sqa", "--by", "skill", "--workers", 0,
        "--predictions", "out/predictions.json")
    assert code == 0
    assert "described scenes" in stdout
    assert "drawing" not in stdout                              # the world already existed
    predictions = read_results("out/predictions.json")

    code, _, _ = call(
        generate, "--data", "sqa", "--blank-images", "--workers", 0,
        "--predictions", "out/blank.json")
    assert code == 0
    blanked = read_results("out/blank.json")
    problems, _ = load_sqa(small_world, "test")
    for pid, index in predictions.items():
        if not problems[pid]["image"]:
            assert blanked[pid] == index

    code, stdout, _ = call(generate, "--data", "sqa", "--adapter", "none", "--workers", 0)
    assert code == 0 and "adapter none" in stdout
    code, stdout, _ = call(generate, "--show-routing")
    assert code == 0 and "text, untrained" in stdout
    assert Image.open("out/routing.png").size == (1600, 900)
    world.sheet("out/predictions.json", "out/sheet.png", n=4)
    assert Image.open("out/sheet.png").height == 2 * 170


@pytest.mark.parametrize("content", [
    {"outputs": {}}, {"outputs": {"MME-7": "yes"}}, {"results": {}}, [{"output": "red"}]])
def test_a_sheet_of_other_predictions(content, small_world, fails, tmp_path):
    small_world.mkdir()
    (small_world / "problems.json").write_text("{}")
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    fails(world, "--sheet", file, tmp_path / "sheet.png",
          says=["other.json", "no answers to picture problems"])


def test_real_weights_come_first_and_missing_ones_are_listed(call, small_world):
    weights = small_world.parent / "weights"
    weights.mkdir()
    (weights / "ViT-L-14.pt").touch()
    code, _, stderr = call(train, "--data", "sqa")
    assert code == 2
    assert "weights/7B/params.json" in stderr
    assert "data/scienceqa/problems.json" in stderr
    assert not small_world.exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "Ctrl-C"])
def test_a_half_made_world_is_never_left(small_world, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(world, "render", fail)
    args = SimpleNamespace(data="sqa", llama=None, vit=None, data_root=None)
    with pytest.raises((LavinError, KeyboardInterrupt)):
        world.prepare(args)
    assert not small_world.exists()
    assert not list(small_world.parent.glob("*.tmp"))


def test_two_calls_at_once_make_one_world(tmp_path):
    """The second call waits for the first and uses its world.

    What a killed process left behind is removed.
    """
    folder = tmp_path / "world"
    left_over = tmp_path / "world.77.tmp"
    left_over.mkdir()
    n_made = []

    def write(temporary):
        n_made.append(1)
        time.sleep(0.3)

    def make():
        world.make_folder(folder, write, anew=False)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(n_made) == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_a_directory_that_cannot_be_written(call, small_world, monkeypatch):
    monkeypatch.setitem(world.PATHS, "data_root", small_world / "file" / "scienceqa")
    small_world.write_text("in the way")
    code, _, stderr = call(train, "--data", "sqa")
    assert code == 2
    assert "cannot be made" in stderr
    assert len(stderr.splitlines()) == 1


def test_a_world_of_another_version_says_how_to_make_it_anew(call, small_world):
    world.make_folder(small_world, world.write_world)
    (small_world / "world.json").write_text('{"version": 0}')
    code, _, stderr = call(train, "--data", "sqa")
    assert code == 2
    assert "another version" in stderr
    assert "`python -m tiny.world` makes it anew" in stderr


def test_a_llama_of_another_version_says_how_to_make_it_anew(small_world, monkeypatch):
    llama = small_world.parent / "llama"
    llama.mkdir()
    (llama / "params.json").write_text('{"version": 0}')
    monkeypatch.setitem(world.PATHS, "llama", llama)
    args = SimpleNamespace(data=None, llama=None, vit=None, data_root=None)
    with pytest.raises(LavinError, match="`python -m tiny.pretrain` makes it anew"):
        world.prepare(args)


@pytest.mark.parametrize("remembered", [
    {"vit": str(world.PATHS["vit"]), "vit_hash": "0123456789abcdef"},
    {"vit": str(world.PATHS["vit"])},           # from before hashes were stored
], ids=["another hash", "no hash"])
def test_adapters_of_another_version_say_how_to_train_new_ones(remembered):
    args = SimpleNamespace(data=None, llama=None, vit=None, data_root=None)
    with pytest.raises(LavinError, match="trained with another CLIP .* trains new ones"):
        world.prepare(args, remembered)


# The flags of train.py with which bench/ablations.py trains ablations on the small world

TRAINED = {
    "projector only": (["--adapters", "none"], {"projector"}),
    "adapters in LLaMA only": (
        ["--adapters", "llama"], {"projector", "llama", "modality_embedding"}),
    "without routing": (["--no-routing"], {"projector", "llama", "vit"}),
    "MMA": ([], {"projector", "llama", "vit", "modality_embedding"}),
}


@pytest.mark.parametrize("flags, trained", TRAINED.values(), ids=TRAINED)
def test_ablations_train_what_they_say(call, small_world, flags, trained):
    common = ("--data", "sqa", "--max-steps", 2, "--workers", 0, "--eval-limit", 0, "--lr", 0.1,
              "--dropout", 0)
    code, _, stderr = call(train, *common, *flags)
    assert code == 0, stderr
    llama = world.PATHS["llama"]
    vit = world.PATHS["vit"]
    after = checkpoints.load(llama, vit, "out/checkpoint.pth")
    torch.manual_seed(data.mixed_seed(0, 0))                    # the seed that train.py starts with
    before = dict(checkpoints.load(llama, vit).named_parameters())
    changed = set()
    for name, p in after.named_parameters():
        if not torch.equal(p, before[name]):
            changed.add(name)
    if "--no-routing" in flags:
        half = torch.full_like(after.route(), 0.5)
        assert torch.equal(after.route(), half)
        changed = {name for name in changed if ".router." not in name}      # set to zero
    assert {name.split(".")[0] for name in changed} == trained

    other = "all" if "llama" in flags else "llama"
    code, _, stderr = call(train, *common, "--resume", "--adapters", other)
    assert code == 2
    assert "adapters" in stderr


def test_ablations_choose_the_rate_on_the_same_training_problems(small_world, tmp_path):
    world.write_world(small_world)
    folder = ablations.draw_more_val(tmp_path / "ablations")
    expected, samples = load_sqa(small_world, "train")
    problems, again = load_sqa(folder, "train")
    assert [sample.id for sample in again] == [sample.id for sample in samples]
    for sample in samples:
        assert problems[sample.id] == expected[sample.id]
    assert len(load_sqa(folder, "val")[1]) == ablations.N_VAL


def test_ablations_need_the_smaller_clip(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ablations.py", str(tmp_path / "out")])
    monkeypatch.setattr(world, "SMALL_VIT", tmp_path / "none.pt")
    with pytest.raises(LavinError, match="tiny.pretrain small-clip"):
        ablations.main()
    assert not list(tmp_path.iterdir())
