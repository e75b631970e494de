"""Instruction data: every kind of file, mixtures, conversations, and rows that are wrong."""

import json
import os
import random
from collections import Counter

import pytest
import torch
from PIL import Image

import data
import train
from conftest import LLAMA, VIT
from data import Sample
from extras import instructions
from extras.instructions import instruction_prompt, read_instructions
from files import LavinError
from test_data import EPS

TALK = [
    {"from": "human", "value": "What is it?\n<image>"},
    {"from": "gpt", "value": "A star."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "Red, I think."},
]
ALPACA = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "Name a  metal.", "input": "", "output": "Iron."},
]
LLAVA = [{"id": "1", "image": "b.jpg", "conversations": TALK}]
ALL_DATA = {"all": [
    {"instruction": "Look.", "answer": "Yes.", "image": "image.png", "image_source": "sqa",
     "qid": "7"},
    {"instruction": "See.", "answer": "No.", "image": "b.jpg", "image_source": "coco", "qid": "8"},
    {"instruction": "Think.", "answer": "Maybe.", "image": None, "image_source": None, "qid": "9"},
]}
MINE = [
    {"prompt": "Say hello.", "answer": "Hello."},
    {"instruction": "What is it?", "output": "Red.", "image": "a.png"},
    {"image": "b.jpg", "conversations": TALK},
]


@pytest.fixture
def folder(tmp_path):
    """One file of each kind, and three pictures."""
    for name in ("a.png", "COCO_train2014_b.jpg", "train/7/image.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(path)
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))
    (tmp_path / "llava.json").write_text(json.dumps(LLAVA))
    (tmp_path / "all_data.json").write_text(json.dumps(ALL_DATA))
    lines = [json.dumps(row) for row in MINE]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


@pytest.fixture
def call_train(tmp_path, call):
    """call_train("--flag", value, …): two epochs of the golden model, into tmp_path/out."""
    def call_train(*flags, out=tmp_path / "out"):
        model = ("--llama", LLAMA, "--vit", VIT)
        run = ("--out", out, "--batch-size", 4, "--workers", 0, "--epochs", 2, "--dropout", 0)
        return call(train, *model, *run, *flags)
    return call_train


# Prompts


@pytest.mark.parametrize("instruction, more, expected", [
    ("Name a metal.", "", "Instruction: Name a metal. \nResponse:"),
    ("Add.", "2 and 3", "Instruction: Add. 2 and 3\nResponse:"),
    ("Name a  metal.", "", "Instruction: Name a metal. \nResponse:"),
    ("Name a   metal.", "", "Instruction: Name a  metal. \nResponse:"),
    (" Add. ", " 2 ", "Instruction: Add.  2 \nResponse:"),
    ("Add.\n", "", "Instruction: Add.\n \nResponse:"),
    (" Question: x\nResponse: ", "", "Question: x\nResponse:"),
    ("A  b Response: c  d", "2", "A  b Response: c  d"),
], ids=["empty input", "input", "double space", "three spaces", "spaces at the seams",
        "newline", "whole prompt", "whole prompt as it is"])
def test_the_prompt_is_the_references_to_the_letter(instruction, more, expected):
    """As the authors make it of an Alpaca row, which has no picture."""
    assert instruction_prompt(instruction, more) == expected


@pytest.mark.parametrize("instruction, more, expected", [
    ("What is it?", "", "Instruction: What is it?\nResponse:"),
    ("What  is it?", "", "Instruction: What is it?\nResponse:"),
    ("Add.", "2 and 3", "Instruction: Add. 2 and 3\nResponse:"),
], ids=["question", "double space", "input"])
def test_with_a_picture_no_space_is_left(instruction, more, expected):
    """As the authors make it of LLaVA's conversations, which all have a picture."""
    assert instruction_prompt(instruction, more, has_picture=True) == expected


# Files


def read_rows(folder, kind, name):
    """(prompt, answer, picture) of every sample, the picture relative to the folder."""
    samples, bad_rows = read_instructions(f"{kind}:{folder / name}")
    assert not bad_rows
    rows = []
    for sample in samples:
        picture = sample.image and str(sample.image).removeprefix(f"{folder}/")
        rows.append((sample.prompt, sample.answer, picture))
    return rows


def test_every_kind_of_file(folder):
    talk = [
        ("Instruction: What is it?\nResponse:", "A star.", "COCO_train2014_b.jpg"),
        ("Instruction: Which colour?\nResponse:", "Red, I think.", "COCO_train2014_b.jpg"),
    ]
    assert read_rows(folder, "alpaca", "alpaca.json") == [
        ("Instruction: Add. 2 and 3\nResponse:", "5", None),
        ("Instruction: Name a metal. \nResponse:", "Iron.", None),
    ]
    assert read_rows(folder, "llava", "llava.json") == talk
    assert read_rows(folder, "all_data", "all_data.json") == [
        ("Instruction: Look.\nResponse:", "Yes.", "train/7/image.png"),
        ("Instruction: See.\nResponse:", "No.", "COCO_train2014_b.jpg"),
        ("Instruction: Think. \nResponse:", "Maybe.", None),
    ]
    assert read_rows(folder, "jsonl", "mine.jsonl") == [
        ("Instruction: Say hello. \nResponse:", "Hello.", None),
        ("Instruction: What is it?\nResponse:", "Red.", "a.png"),
        *talk,
    ]


def test_loss_of_a_conversation_is_that_of_its_turns_with_their_history(folder, lavin):
    """One sequence with loss on every answer, against a sequence for each answer.

    In the latter, the answers before it carry no loss.
    """
    samples, _ = read_instructions(f"llava:{folder / 'llava.json'}", multi_turn=True)
    (sample,) = samples
    assert len(sample.history) == 1
    whole = lavin.batch([sample])
    total = lavin(whole).item() * whole.n_answer
    turns = [*sample.history, (sample.prompt, sample.answer)]
    parts = 0.0
    for n, (prompt, answer) in enumerate(turns):
        history = tuple(turns[:n])
        encoded = lavin.encode(Sample(prompt, answer, sample.image, history=history))
        alone = lavin.encode(Sample(prompt, answer))
        n_answer = int((alone.labels != 0).sum())
        encoded.labels[:-n_answer] = 0
        batch = data.collate([encoded], lavin.resolution)
        parts += lavin(batch).item() * batch.n_answer
    assert abs(total - parts) < 1e-4
    is_end = whole.tokens == lavin.tokenizer.eos_id()
    has_loss = whole.labels != 0
    assert is_end.sum() == 2 and has_loss[is_end].all()


# Training


def test_a_mixture_has_its_weights_shares_and_is_drawn_from_seed_and_epoch_alone():
    sizes = [60, 30, 10]
    weights = [1, 1, 2]

    def epoch(n):
        indices = []
        for step in range(10 * n, 10 * n + 10):
            for micro_batch in data.global_batch(step, [1] * 100, 10, 3, 5, sizes, weights):
                indices += micro_batch
        return indices

    first = epoch(0)
    large = [i for i in first if i < 60]
    middle = [i for i in first if 60 <= i < 90]
    small = [i for i in first if i >= 90]
    assert (len(large), len(middle), len(small)) == (25, 25, 50)
    assert set(Counter(small).values()) == {5}
    assert epoch(0) == first != epoch(1)
    seen = set()
    for n in range(12):
        seen.update(i for i in epoch(n) if i < 60)
    assert len(seen) > 55                       # what one epoch leaves out comes in a later one


def test_training_on_a_mixture_writes_held_out_losses_and_resumes(
        folder, sqa, tmp_path, call, call_train):
    mine = f"jsonl:{folder / 'mine.jsonl'}"
    alpaca = f"alpaca:{folder / 'alpaca.json'}"         # of its 2 samples, none is held out
    mixed = ["--data", "sqa", mine, alpaca, "--weights", 2, 1, 1, "--data-root", sqa,
             "--val-fraction", 0.25, "--eval-limit", 2]
    whole_run = tmp_path / "whole"
    in_parts = tmp_path / "parts"
    assert call_train(*mixed, out=whole_run)[0] == 0
    held_out = []
    for line in (whole_run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "held_out" in metrics:
            held_out.append(metrics["held_out"])
    assert len(held_out) == 2
    assert held_out[0].keys() == {"sqa", mine}
    assert held_out[1]["sqa"] < held_out[0]["sqa"] < 20
    assert call_train(*mixed, "--max-steps", 4, out=in_parts)[0] == 0
    assert call(train, "--resume", "--out", in_parts)[0] == 0
    whole = torch.load(whole_run / "checkpoint.pth", weights_only=False)["model"]
    parts = torch.load(in_parts / "checkpoint.pth", weights_only=False)["model"]
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name


def test_instructions_alone_train_by_their_own_schedule(folder, tmp_path, call):
    """No ScienceQA is asked for, nor scored."""
    out = tmp_path / "out"
    code, stdout, stderr = call(
        train, "--data", f"llava:{folder / 'llava.json'}", "--multi-turn", "--out", out,
        "--llama", LLAMA, "--vit", VIT, "--workers", 0)
    assert code == 0, stderr
    assert "15 = 15 epochs × 1" in stdout and "scoring" not in stdout
    config = torch.load(out / "checkpoint.pth", weights_only=False)["config"]
    assert config["warmup"] == 0.2 and config["multi_turn"]


# What is wrong


BAD = [
    ('{"instruction": "x"}', "'answer' or 'output' is missing"),
    ('{"answer": "x"}', "'instruction' or 'prompt' is missing"),
    ('{"instruction": 3, "answer": "x"}', "not Unicode text"),
    ('{"instruction": NaN, "answer": "x"}', "not Unicode text"),
    ('{"instruction": "x", "answer": "y", "image": 1' + "0" * 400 + "}", "not Unicode text"),
    ('{"instruction": "x", "answer": "y", "id": 1' + "0" * 5000 + "}", "not JSON"),
    ('{"instruction": "x", "answer": "y", "image": "../a.png"}', "'../a.png' leads out of"),
    ('{"instruction": "x", "answer": "y", "image": "train/../../a.png"}', "leads out of"),
    ('{"instruction": "x", "answer": "y", "image": "/usr/a.png"}', "'/usr/a.png' leads out of"),
    ('{"instruction": "x", "answer": "y", "image": "a\\u0000.png"}', "leads out of"),
    ('{"instruction": "x", "answer": "y", "image": "a.png", "image_source": "sqa", '
     '"qid": "../.."}', "leads out of"),
    ('{"instruction": "x", "answer": "y", "image": "' + "a" * 100_000 + '"}', "no picture"),
    ("[1]", "not an object"),
    ("{", "not JSON"),
    ("\ud800", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"instruction": "x", "answer": "\\ud800"}', "not Unicode"),
    ('{"prompt": "x", "answer": "y", "image": "no.png"}', "no picture"),
    ('{"conversations": []}', "conversations"),
    ('{"conversations": [1, 2]}', "turn 1"),
    ('{"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}',
     "turn 1 is not from human"),
    ('{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "y"}]}',
     "turn 1 says nothing"),
]


@pytest.mark.parametrize("line, reason", BAD, ids=[reason for _, reason in BAD])
def test_bad_rows_are_named_refused_or_skipped(folder, call_train, line, reason):
    path = folder / "bad.jsonl"
    good = b'{"prompt": "x", "answer": "y"}\n'
    path.write_bytes(good + line.encode("utf-8", "surrogatepass") + b"\n")
    source = f"jsonl:{path}"
    samples, (bad_row,) = read_instructions(source)
    assert len(samples) == 1
    assert bad_row.place == f"{path} line 2" and reason in bad_row.reason
    code, _, stderr = call_train("--data", source)
    assert code == 2 and len(stderr.splitlines()) == 1
    assert f"{path} line 2: " in stderr and "--skip-bad" in stderr
    code, stdout, _ = call_train("--data", source, "--skip-bad", "--max-steps", 1)
    assert code == 0 and "skipped  1 bad rows" in stdout


def test_a_link_to_a_picture_elsewhere_is_followed(folder, tmp_path_factory):
    """Whoever made the folder made the link, where a name in a row may be anybody's."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "a.png").rename(elsewhere / "a.png")
    (folder / "a.png").symlink_to(elsewhere / "a.png")
    samples, bad_rows = read_instructions(f"jsonl:{folder / 'mine.jsonl'}", look=True)
    assert samples[1].image == str(folder / "a.png") and not bad_rows


def no_text(path):
    path.write_bytes(b"no picture")


def a_program(path):
    path.write_bytes(EPS)


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [no_text, a_program, a_pipe])
def test_a_row_whose_picture_is_none_stops_the_run_or_is_skipped(folder, call_train, damage):
    damage(folder / "a.png")
    source = f"jsonl:{folder / 'mine.jsonl'}"
    code, _, stderr = call_train("--data", source)
    assert code == 2 and len(stderr.splitlines()) == 1
    assert "mine.jsonl line 2" in stderr and "a.png" in stderr
    code, stdout, _ = call_train("--data", source, "--skip-bad")
    assert code == 0
    assert "skipped  1 bad rows" in stdout and "data     3 samples" in stdout


def test_bad_sources_are_one_line(folder, call_train):
    (folder / "x.json").write_text("3")
    (folder / "deep.json").write_text("[" * 100_000)
    os.mkfifo(folder / "pipe.jsonl")
    for source, reason in (
            ("alpaca", "give sqa, or one of"),
            ("alpaca:no.json", "no.json: no such file"),
            ("no.jsonl", "no such file"),
            (f"{folder}", "a folder, where a file is needed"),
            (f"jsonl:{folder}", "a folder, where a file is needed"),
            (f"{folder / 'pipe.jsonl'}", "a pipe or a device"),
            (f"alpaca:{folder / 'pipe.jsonl'}", "a pipe or a device"),
            ("jsonl:/dev/zero", "a pipe or a device"),
            ("dogs:x", "give sqa"),
            (f"llava:{folder / 'llava.json'}:nowhere", "no folder nowhere"),
            (f"alpaca:{folder / 'deep.json'}", "not JSON"),
            (f"alpaca:{folder / 'x.json'}", "list of rows")):
        code, _, stderr = call_train("--data", source)
        assert code == 2 and reason in stderr and len(stderr.splitlines()) == 1, stderr
    alpaca = f"alpaca:{folder / 'alpaca.json'}"
    for flags in (["--weights", 1, 2], ["--weights", 0], ["--val-fraction", 1]):
        assert call_train("--data", alpaca, *flags)[0] == 2


def damage_bytes(content, rng):
    """A few bytes, or some more, changed at random."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 3, 20))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def damage_values(value, rng):
    """The same JSON with some of its values and keys replaced."""
    if rng.random() < 0.15:
        return rng.choice([None, 3, "", [], {}, "\ud800", True, [[]], {"from": 1}, "x" * 9, 1e999])
    if isinstance(value, dict):
        damaged = {}
        for key, item in value.items():
            if rng.random() < 0.05:
                key = rng.choice(["image", "answer", "zz"])
            damaged[key] = damage_values(item, rng)
        return damaged
    if isinstance(value, list):
        return [damage_values(item, rng) for item in value]
    return value


def test_damaged_files_end_in_clean_errors_only(folder):
    """Thousands of damaged rows and files: each is read, or a BadRow, or a LavinError."""
    rng = random.Random(0)
    names = {"alpaca": "alpaca.json", "llava": "llava.json", "all_data": "all_data.json",
             "jsonl": "mine.jsonl"}
    originals = {kind: (folder / name).read_bytes() for kind, name in names.items()}
    outcomes = Counter()
    for i in range(1500):
        kind = rng.choice(list(names))
        if i % 2 or kind == "jsonl":
            content = damage_bytes(originals[kind], rng)
        else:
            content = json.dumps(damage_values(json.loads(originals[kind]), rng)).encode()
        path = folder / names[kind]
        path.write_bytes(content)
        try:
            samples, bad_rows = read_instructions(f"{kind}:{path}")
            outcomes["samples"] += len(samples)
            outcomes["bad rows"] += len(bad_rows)
        except LavinError:
            outcomes["refused"] += 1
        path.write_bytes(originals[kind])
    assert min(outcomes["samples"], outcomes["bad rows"], outcomes["refused"]) > 150, outcomes


# train.py --check


def test_check_says_what_is_in_a_file_and_what_is_wrong(folder, tmp_path, call_train):
    (folder / "a.png").write_bytes(b"no picture")
    sources = [f"jsonl:{folder / 'mine.jsonl'}", f"alpaca:{folder / 'alpaca.json'}"]
    code, stdout, _ = call_train("--data", *sources, "--check")
    assert code == 1
    for text in ("mine.jsonl line 2", "not a picture that Pillow can read",
                 "mine.jsonl: 4 samples, 3 with a picture; 1 bad rows",
                 "alpaca.json: 2 samples, 0 with a picture; 0 bad rows",
                 "»Hello.", "on average"):
        assert text in stdout, stdout
    assert not (tmp_path / "out").exists()


def test_check_ends_with_0_where_nothing_is_wrong(folder, call_train):
    code, stdout, stderr = call_train("--data", f"alpaca:{folder / 'alpaca.json'}", "--check")
    assert code == 0, stderr
    assert "2 samples, 0 with a picture; 0 bad rows" in stdout


def test_check_looks_at_scienceqa_too(sqa, call_train):
    code, stdout, stderr = call_train("--data", "sqa", "--data-root", sqa, "--check")
    assert code == 0, stderr
    assert "»The answer is" in stdout and "0 bad rows" in stdout
    picture = next(sqa.glob("images/train/*/image.png"))
    picture.write_bytes(b"no picture")
    code, stdout, _ = call_train("--data", "sqa", "--data-root", sqa, "--check")
    assert code == 1
    assert str(picture) in stdout and "1 bad rows" in stdout


def test_what_carries_loss_is_shown_between_marks(folder, lavin):
    samples, _ = read_instructions(f"llava:{folder / 'llava.json'}", multi_turn=True)
    shown = instructions.show(samples[0], lavin.encode(samples[0]), lavin.tokenizer)
    assert shown.count("[picture]") == 1            # for both features
    assert shown.count("»") == shown.count("«") == 2
    assert "»A star.</s>«" in shown and "»Red, I think.</s>«" in shown


def test_a_histogram_counts_every_value_once():
    lines = instructions.histogram([1, 1, 2, 30], "tokens", n=3)
    assert [line.rstrip(" █") for line in lines] == [
        "       1 – 10     tokens       3",
        "      11 – 20     tokens       0",
        "      21 – 30     tokens       1",
    ]
