"""Instruction data: every kind of file, mixtures, conversations, and faulty rows."""

import json
import os
import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import train
from conftest import LLAMA, VIT
from data import Sample
from examples import easy_vqa
from extras import instructions, rows
from extras.instructions import instruction_prompt, read_instructions
from files import LavinError
from helpers import EPS

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
    """A folder with one file of each kind and three pictures."""
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
    """call_train("--flag", value, …): train the golden model for two epochs, into tmp_path/out."""
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
    ("A  b Response: c  d", "", "A  b Response: c  d"),
    ("A  b Response: c", "2", "Instruction: A b Response: c 2\nResponse:"),
], ids=["empty input", "input", "double space", "three spaces", "spaces at the seams",
        "newline", "whole prompt", "whole prompt as it is", "instruction with Response:"])
def test_the_prompt_is_the_references_to_the_letter(instruction, more, expected):
    """The authors' code makes this prompt from an Alpaca row, which has no picture."""
    assert instruction_prompt(instruction, more) == expected


@pytest.mark.parametrize("instruction, more, expected", [
    ("What is it?", "", "Instruction: What is it?\nResponse:"),
    ("What  is it?", "", "Instruction: What is it?\nResponse:"),
    ("Add.", "2 and 3", "Instruction: Add. 2 and 3\nResponse:"),
], ids=["question", "double space", "input"])
def test_with_a_picture_no_space_is_left(instruction, more, expected):
    """The authors' code makes this prompt from LLaVA's conversations, which all have a picture."""
    assert instruction_prompt(instruction, more, has_picture=True) == expected


# Files


def read_rows(folder, kind, name):
    """(prompt, answer, picture) of every sample. The picture's path is relative to the folder."""
    samples, bad_rows = read_instructions(f"{kind}:{folder / name}")
    assert not bad_rows
    rows = []
    for sample in samples:
        picture = sample.image and str(sample.image).removeprefix(f"{folder}/")
        rows.append((sample.prompt, sample.answer, picture))
    return rows


@pytest.mark.parametrize("kind, text", [
    ("jsonl", '{"prompt": "Say hello.", "answer": "", "output": "Hello."}'),
    ("alpaca", '[{"instruction": " ", "prompt": "Say hello.", "output": "Hello."}]'),
])
def test_a_byte_order_mark_and_an_empty_field_are_passed_over(tmp_path, kind, text):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8-sig")
    assert read_rows(tmp_path, kind, "rows.json") == [
        ("Instruction: Say hello. \nResponse:", "Hello.", None)]


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
    """One sequence with loss on every answer equals the sum over one sequence per answer.

    In the latter, earlier answers carry no loss.
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
        n_answer = int((alone.labels != data.IGNORED).sum())
        encoded.labels[:-n_answer] = data.IGNORED
        batch = data.collate([encoded], lavin.resolution)
        parts += lavin(batch).item() * batch.n_answer
    assert abs(total - parts) < 1e-4
    is_end = whole.tokens == lavin.tokenizer.eos_id()
    has_loss = whole.labels != data.IGNORED
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
    assert len(seen) > 55                       # later epochs use what one epoch leaves out


def test_training_on_a_mixture_writes_held_out_losses_and_resumes(
        folder, sqa, tmp_path, call, call_train):
    mine = f"jsonl:{folder / 'mine.jsonl'}"
    alpaca = f"alpaca:{folder / 'alpaca.json'}"         # none of its 2 samples is held out
    mixed = ["--data", "sqa", mine, alpaca, "--weights", 2, 1, 1, "--data-root", sqa,
             "--val-fraction", 0.25, "--eval-limit", 2]
    whole_run = tmp_path / "whole"
    in_parts = tmp_path / "parts"
    code, stdout, _ = call_train(*mixed, out=whole_run)
    assert code == 0 and "/2 right" in stdout
    assert f"{mine}: loss " in stdout
    held_out = []
    exact_match = []
    for line in (whole_run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "held_out" in metrics:
            held_out.append(metrics["held_out"])
            exact_match.append(metrics["exact_match"])
    assert len(held_out) == 2
    assert held_out[0].keys() == {"sqa", mine}
    assert held_out[1]["sqa"] < held_out[0]["sqa"] < 20
    assert exact_match[0].keys() == {"sqa", mine}
    assert call_train(*mixed, "--max-steps", 4, out=in_parts)[0] == 0
    assert call(train, "--resume", "--out", in_parts)[0] == 0
    whole = torch.load(whole_run / "checkpoint.pth", weights_only=False)["model"]
    parts = torch.load(in_parts / "checkpoint.pth", weights_only=False)["model"]
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name


def test_instructions_alone_train_by_their_own_schedule(folder, tmp_path, call):
    """ScienceQA is neither required nor scored."""
    out = tmp_path / "out"
    code, stdout, stderr = call(
        train, "--data", f"llava:{folder / 'llava.json'}", "--multi-turn", "--out", out,
        "--llama", LLAMA, "--vit", VIT, "--workers", 0)
    assert code == 0, stderr
    assert "15 = 15 epochs × 1" in stdout and "scoring" not in stdout
    config = torch.load(out / "checkpoint.pth", weights_only=False)["config"]
    assert config["warmup"] == 0.2 and config["multi_turn"]


# Scores of your own rows


KINDS_OF_ROWS = [
    {"prompt": "Say hello.", "answer": "Hello.", "kind": "greeting", "id": "a"},
    {"prompt": "What is it?", "answer": "Red", "image": "a.png", "kind": "colour"},
    {"prompt": "And this?", "answer": "Blue.", "image": "a.png", "kind": "colour"},
    {"prompt": "Say nothing.", "kind": "greeting"},
    {"prompt": "Why?", "answer": "So.", "kind": 3},
    {"image": "b.jpg", "conversations": TALK},
]


@pytest.fixture
def write_rows(folder):
    """write_rows([row, …]) -> a source of --data."""
    def write_rows(written):
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
        return f"jsonl:{path}"

    return write_rows


@pytest.mark.parametrize("output, right", [
    ("Red", True), (" red.\n", True), ("RED .", True), ("Red..", False), ("Re d", False),
    ("", False), ("Red and blue", False)])
def test_exact_match_leaves_case_space_and_one_full_stop_aside(output, right):
    assert rows.is_right(output, "Red.") == right
    assert rows.is_right(output, "red") == right


def test_rows_are_counted_in_all_and_by_a_field(write_rows):
    found, samples = rows.read_rows(write_rows(KINDS_OF_ROWS), by="kind")
    assert [sample.answer for sample in samples] == ["Hello.", "Red", "Blue.", "", "So.", "A star."]
    said = ["hello", "red.", "Red", "anything", "So", "a star"]
    outputs = {sample.id: text for sample, text in zip(samples, said)}
    table = rows.score_table(found, outputs, by="kind")
    assert [line.split() for line in table.splitlines()[:5]] == [
        ["(none)", "100.00", "1/1"],
        ["3", "100.00", "1/1"],
        ["colour", "50.00", "1/2"],
        ["greeting", "100.00", "1/1"],
        ["exact", "match", "80.00", "4/5"],
    ]
    assert table.splitlines()[5] == "1 rows have no answer and do not count"
    written = rows.predictions(found, outputs, {samples[4].id: "no picture"})
    assert written[0] == {"id": "a", "output": "hello", "answer": "Hello.", "right": True}
    assert written[2] == {"id": 3, "output": "Red", "answer": "Blue.", "right": False}
    assert written[3] == {"id": 4, "output": "anything", "answer": None, "right": None}
    assert written[4]["missing"] == "no picture"


def test_every_kind_of_file_can_be_scored(folder):
    """In a conversation, the first question is asked."""
    for source, answers in (
            (f"alpaca:{folder / 'alpaca.json'}", ["5", "Iron."]),
            (f"llava:{folder / 'llava.json'}", ["A star."]),
            (f"all_data:{folder / 'all_data.json'}", ["Yes.", "No.", "Maybe."]),
            (f"{folder / 'mine.jsonl'}", ["Hello.", "Red.", "A star."])):
        _, samples = rows.read_rows(source)
        assert [sample.answer for sample in samples] == answers


def test_choices_are_a_rows_own_or_the_files_answers(write_rows):
    written = [*KINDS_OF_ROWS[:4], {"prompt": "x", "choices": [" left", "right"]}]
    found, _ = rows.read_rows(write_rows(written), with_choices=True)
    of_file = ["Hello.", "Red", "Blue."]
    assert [row.choices for row in found.values()] == [of_file] * 4 + [["left", "right"]]


@pytest.mark.parametrize("written, by, reason", [
    ([], None, "rows.jsonl: holds no row"),
    ([{"prompt": "x", "answer": "y"}], "kind", "--by kind: no row of"),
    ([{"prompt": "x"}], None, 'line 1: has no "choices", and no row'),
    ([{"prompt": "x", "answer": f"{i}"} for i in range(301)], None, "but there are 301"),
    ([{"prompt": "x", "choices": []}], None, "line 1: 'choices' is not a list of texts"),
    ([{"prompt": "x", "choices": ["a", " "]}], None, "line 1: 'choices' is not a list of texts"),
    ([{"prompt": "x", "choices": ["a", 3]}], None, "line 1: 'choices' is not a list of texts"),
    ([{"answer": "x"}], None, "line 1: 'instruction' or 'prompt' is missing"),
    ([3], None, "line 1: is not an object"),
])
def test_rows_that_cannot_be_scored_are_one_error(write_rows, written, by, reason):
    with pytest.raises(LavinError) as caught:
        rows.read_rows(write_rows(written), by, with_choices=True)
    assert reason in str(caught.value)


def test_the_question_of_a_sample_to_train_on_is_its_last_turn(folder, lavin):
    samples, _ = read_instructions(f"llava:{folder / 'llava.json'}", multi_turn=True)
    prompt, answer = rows.question_of(lavin.encode(samples[0]), lavin.tokenizer)
    assert answer == "Red, I think."
    asked = lavin.encode(samples[0], prompt_only=True)
    assert prompt.tokens.tolist() == asked.tokens.tolist()
    assert (prompt.labels == data.IGNORED).all() and prompt.image == samples[0].image


def test_an_epoch_is_saved_before_its_held_out_rows_are_scored(sqa, tmp_path, call_train,
                                                                monkeypatch):
    def fail(*args):
        raise LavinError("a picture is damaged")

    monkeypatch.setattr(rows, "score_held_out", fail)
    code, _, stderr = call_train(
        "--data", "sqa", "--data-root", sqa, "--val-fraction", 0.25, out=tmp_path)
    assert code == 2 and "a picture is damaged" in stderr
    assert (tmp_path / "checkpoint.pth").exists()


def test_held_out_rows_are_answered_rightly_or_not(lavin, samples, monkeypatch):
    """For ScienceQA, only the letter counts. --eval-limit is the number of rows that are asked."""
    said = ["red", "The answer is B", "perhaps"]

    def say(lavin, prompts, n_rows, max_new_tokens, done):
        for number in range(len(prompts)):
            yield number, lavin.tokenizer.encode(said[number])

    monkeypatch.setattr(rows, "continue_prompts", say)
    held_out = {"sqa": [], "mine": []}
    for sample, told in zip(samples, ["Red.", "The answer is B. BECAUSE: so.", "Never."]):
        encoded = lavin.encode(Sample(sample.prompt, told, sample.image))
        held_out["sqa"].append(encoded)
        held_out["mine"].append(encoded)
    settings = train.Settings()
    assert rows.held_out_right(lavin, held_out, settings) == {"sqa": (1, 3), "mine": (1, 3)}
    settings.eval_limit = 1
    assert rows.held_out_right(lavin, held_out, settings) == {"sqa": (0, 1), "mine": (1, 1)}
    settings.eval_limit = 0
    assert rows.held_out_right(lavin, held_out, settings) == {}


def fake_easy_vqa(picture):
    """Replaces the package easy_vqa, as far as examples/easy_vqa.py needs it."""
    questions = (["what color is the shape?", "is it a circle?", "what shape is it?"],
                 ["red", "yes", "circle"], [4, 4, 4])
    return SimpleNamespace(
        get_train_questions=lambda: questions, get_train_image_paths=lambda: {4: picture},
        get_test_questions=lambda: questions, get_test_image_paths=lambda: {4: picture})


def test_easy_vqa_becomes_rows(folder, tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", fake_easy_vqa(folder / "a.png"))
    code, stdout, stderr = call(easy_vqa, tmp_path / "easy")
    assert (code, stderr) == (0, "") and "3 questions about 1 pictures" in stdout
    for split in ("train", "test"):
        samples, bad_rows = read_instructions(f"jsonl:{tmp_path}/easy/{split}.jsonl", look=True)
        assert len(samples) == 3 and not bad_rows
    found, _ = rows.read_rows(f"jsonl:{tmp_path}/easy/test.jsonl", by="kind")
    assert [row.group for row in found.values()] == ["colour", "yes/no", "shape"]


def test_without_the_package_one_line_says_what_to_install(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    fails(easy_vqa, tmp_path / "easy", says=["pip install easy-vqa"])


# Faulty data


BAD = [
    ('{"instruction": "x"}', "'answer' or 'output' is missing"),
    ('{"answer": "x"}', "'instruction' or 'prompt' is missing"),
    ('{"instruction": 3, "answer": "x"}', "'instruction' is not Unicode text"),
    ('{"prompt": 3, "answer": "x"}', "'prompt' is not Unicode text"),
    ('{"prompt": "x", "output": 3}', "'output' is not Unicode text"),
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
     "turn 1 is empty"),
]


GOOD = '{"prompt": "x", "answer": "y"}'


def write_lines(path, lines):
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("line, reason", BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_named_and_refused(folder, call_train, line, reason):
    path = folder / "bad.jsonl"
    write_lines(path, [GOOD, line])
    samples, (bad_row,) = read_instructions(f"jsonl:{path}")
    assert len(samples) == 1
    assert bad_row.place == f"{path} line 2" and reason in bad_row.reason
    code, _, stderr = call_train("--data", f"jsonl:{path}")
    assert code == 2 and len(stderr.splitlines()) == 1
    assert f"{path} line 2: " in stderr and "--skip-bad" in stderr


def test_bad_rows_are_skipped_if_asked(folder, call_train):
    path = folder / "bad.jsonl"
    write_lines(path, [GOOD, *(line for line, _ in BAD)])
    code, stdout, _ = call_train("--data", f"jsonl:{path}", "--skip-bad", "--max-steps", 1)
    assert code == 0
    assert f"skipped  {len(BAD)} bad rows" in stdout and "data     1 samples" in stdout


def test_a_link_to_a_picture_elsewhere_is_followed(folder, tmp_path_factory):
    """The link was made by the folder's owner. A name in a row may come from anybody."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "a.png").rename(elsewhere / "a.png")
    (folder / "a.png").symlink_to(elsewhere / "a.png")
    samples, bad_rows = read_instructions(f"jsonl:{folder / 'mine.jsonl'}", look=True)
    assert samples[1].image == str(folder / "a.png") and not bad_rows


def not_a_picture(path):
    path.write_bytes(b"no picture")


def a_program(path):
    path.write_bytes(EPS)


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [not_a_picture, a_program, a_pipe])
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
    """The content with 1, 3 or 20 bytes changed at random."""
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
    """Of thousands of damaged rows and files, each is read, or gives a BadRow or a LavinError."""
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


def test_check_names_a_conversation_with_a_bad_picture_once(folder, call_train):
    path = folder / "talk.json"
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."},
             {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It purrs."}]
    path.write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    (folder / "a.png").write_bytes(b"no picture")
    code, stdout, _ = call_train("--data", f"llava:{path}", "--check")
    assert code == 1
    assert "talk.json: 2 samples, 2 with a picture; 1 bad rows" in stdout
    assert stdout.count("not a picture that Pillow can read") == 1


def test_check_says_that_nothing_can_be_learned(folder, call_train):
    empty = folder / "empty.jsonl"
    empty.write_text("")
    code, stdout, _ = call_train("--data", f"jsonl:{empty}", "--check")
    assert code == 1 and "empty.jsonl: it holds no samples" in stdout
    source = f"jsonl:{folder / 'mine.jsonl'}"
    code, stdout, _ = call_train("--data", source, "--check", "--max-seq-len", 16)
    assert code == 1 and "--max-seq-len 16 cuts off the answer of every sample" in stdout


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
    assert shown.count("[picture]") == 1            # one mark for both features
    assert shown.count("»") == shown.count("«") == 2
    assert "»A star.</s>«" in shown and "»Red, I think.</s>«" in shown


def test_a_histogram_counts_every_value_once():
    lines = instructions.histogram([1, 1, 2, 30], "tokens", n=3)
    assert [line.rstrip(" █") for line in lines] == [
        "       1 – 10     tokens       3",
        "      11 – 20     tokens       0",
        "      21 – 30     tokens       1",
    ]
