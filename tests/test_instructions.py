"""Instruction data: every kind of file, mixtures, conversations, and rows that are wrong."""

import json
import random
from collections import Counter

import pytest
import torch
from PIL import Image

import data
import instructions
import train
from conftest import LLAMA, ROOT, VIT, difference
from data import Sample
from files import LavinError

TALK = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A star."},
        {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red, I think."}]


@pytest.fixture
def folder(tmp_path):
    """One file of each kind, and two pictures."""
    for name in ("a.png", "COCO_train2014_b.jpg", "train/7/image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    write = {
        "alpaca.json": [{"instruction": "Add.", "input": "2 and 3", "output": "5"},
                        {"instruction": "Name a  metal.", "input": "", "output": "Iron."}],
        "llava.json": [{"id": "1", "image": "b.jpg", "conversations": TALK}],
        "all_data.json": {"all": [
            {"instruction": "Look.", "answer": "Yes.", "image": "image.png", "image_source": "sqa", "qid": "7"},
            {"instruction": "See.", "answer": "No.", "image": "b.jpg", "image_source": "coco", "qid": "8"},
            {"instruction": "Think.", "answer": "Maybe.", "image": None, "image_source": None, "qid": "9"}]}}
    for name, content in write.items():
        (tmp_path / name).write_text(json.dumps(content))
    lines = [{"prompt": "Say hello.", "answer": "Hello."}, {"instruction": "What is it?", "output": "Red.", "image": "a.png"},
             {"image": "b.jpg", "conversations": TALK}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def flags(out, *more):
    return ["--llama", LLAMA, "--vit", VIT, "--out", out, "--batch-size", 4, "--workers", 0, "--epochs", 2, "--dropout", 0, *more]


def test_every_kind_of_file(folder):
    def read(kind, name):
        samples, bad = instructions.read(f"{kind}:{folder / name}")
        assert not bad
        return [(s.prompt, s.answer, s.image and str(s.image).removeprefix(f"{folder}/")) for s in samples]

    assert read("alpaca", "alpaca.json") == [("Instruction: Add. 2 and 3\nResponse:", "5", None),
                                   ("Instruction: Name a metal.\nResponse:", "Iron.", None)]
    talk = [("Instruction: What is it?\nResponse:", "A star.", "COCO_train2014_b.jpg"),
            ("Instruction: Which colour?\nResponse:", "Red, I think.", "COCO_train2014_b.jpg")]
    assert read("llava", "llava.json") == talk
    assert [row[2] for row in read("all_data", "all_data.json")] == ["train/7/image.png", "COCO_train2014_b.jpg", None]
    assert read("jsonl", "mine.jsonl") == [
        ("Instruction: Say hello.\nResponse:", "Hello.", None), ("Instruction: What is it?\nResponse:", "Red.", "a.png"), *talk]


def test_loss_of_a_conversation_is_that_of_its_turns_with_their_history(folder, lavin):
    """One sequence with loss on every answer against one for each answer, where what came before carries none."""
    ((sample,), _) = instructions.read(f"llava:{folder / 'llava.json'}", multi_turn=True)
    assert len(sample.history) == 1
    whole = lavin.batch([sample])
    total = lavin(whole).item() * whole.n_answer
    parts = 0.0
    for n in range(2):
        turns = [*sample.history, (sample.prompt, sample.answer)][:n + 1]
        encoded = lavin.encode(Sample(*turns[-1], sample.image, history=tuple(turns[:-1])))
        n_answer = int((lavin.encode(Sample(*turns[-1])).labels != 0).sum())
        encoded.labels[:len(encoded.labels) - n_answer] = 0
        batch = data.collate([encoded], lavin.resolution)
        parts += lavin(batch).item() * batch.n_answer
    assert abs(total - parts) < 1e-4
    ends = (whole.tokens == lavin.tokenizer.eos_id()).sum()
    assert ends == 2 == ((whole.labels == lavin.tokenizer.eos_id()) & (whole.tokens == lavin.tokenizer.eos_id())).sum()


def test_mixture_has_the_weights_shares_and_is_drawn_from_seed_and_epoch_alone():
    sizes, weights = [60, 30, 10], [1, 1, 2]
    lengths = [1] * 100

    def epoch(n):
        return [i for step in range(n * 10, n * 10 + 10)
                for micro in data.global_batch(step, lengths, 10, 3, 5, sizes, weights) for i in micro]

    counts = Counter(0 if i < 60 else 1 if i < 90 else 2 for i in epoch(0))
    assert counts == {0: 25, 1: 25, 2: 50} and set(Counter(epoch(0)[i] for i in range(100) if epoch(0)[i] >= 90).values()) == {5}
    assert epoch(0) == epoch(0) != epoch(1)
    assert len({i for n in range(12) for i in epoch(n) if i < 60}) > 55             # what is left out comes in later epochs


def test_training_on_a_mixture_writes_held_out_losses_and_resumes(folder, sqa, tmp_path, call):
    sources = ["--data", "sqa", f"jsonl:{folder / 'mine.jsonl'}", f"alpaca:{folder / 'alpaca.json'}", "--data-root", sqa]
    mixed = [*sources, "--weights", 2, 1, 1, "--val-fraction", 0.25, "--eval-limit", 2]
    assert call(train, *flags(tmp_path / "whole", *mixed))[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    held = [line["held_out"] for line in lines if "held_out" in line]
    assert len(held) == 2 and held[0].keys() == {"sqa", sources[2]} and held[1]["sqa"] < held[0]["sqa"] < 20   # of 2 none is held
    assert call(train, *flags(tmp_path / "parts", *mixed, "--max-steps", 4))[0] == 0
    assert call(train, "--resume", "--out", tmp_path / "parts")[0] == 0
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=False)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


def test_instructions_alone_train_by_their_own_schedule(folder, tmp_path, call):
    """On the embedded LLaMA and CLIP; no ScienceQA is asked for, nor scored."""
    code, stdout, stderr = call(train, "--data", f"llava:{folder / 'llava.json'}", "--multi-turn", "--out", tmp_path / "out",
                                "--llama", LLAMA, "--vit", VIT, "--workers", 0)
    assert code == 0, stderr
    assert "15 = 15 epochs × 1" in stdout and "scoring" not in stdout
    config = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=False)["config"]
    assert config["warmup"] == 0.2 and config["multi_turn"]


BAD = [
    ('{"instruction": "x"}', "'answer' or 'output' is missing"), ('{"answer": "x"}', "'instruction' or 'prompt' is missing"),
    ('{"instruction": 3, "answer": "x"}', "not text"), ("[1]", "not an object"), ("{", "not JSON"), ("\ud800", "not JSON"),
    ('{"instruction": "x", "answer": "\\ud800"}', "not Unicode"), ('{"prompt": "x", "answer": "y", "image": "no.png"}', "no picture"),
    ('{"conversations": []}', "conversations"), ('{"conversations": [1, 2]}', "turn 1"), ("[" * 100_000, "not JSON"),
    ('{"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}', "turn 1 is not from human"),
    ('{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "y"}]}', "turn 1 says nothing")]


@pytest.mark.parametrize("line, reason", BAD, ids=[reason for _, reason in BAD])
def test_bad_rows_are_named_refused_or_skipped(folder, tmp_path, call, line, reason):
    path = folder / "bad.jsonl"
    path.write_bytes(b'{"prompt": "x", "answer": "y"}\n' + line.encode("utf-8", "surrogatepass") + b"\n")
    samples, (bad,) = instructions.read(f"jsonl:{path}")
    assert len(samples) == 1 and bad.place == f"{path} line 2" and reason in bad.reason
    code, _, stderr = call(train, *flags(tmp_path / "out", "--data", f"jsonl:{path}"))
    assert code == 2 and f"{path} line 2: " in stderr and len(stderr.splitlines()) == 1 and "--skip-bad" in stderr
    code, stdout, _ = call(train, *flags(tmp_path / "out", "--data", f"jsonl:{path}", "--skip-bad", "--max-steps", 1))
    assert code == 0 and "skipped  1 bad rows" in stdout


def test_a_row_whose_picture_is_none_stops_the_run_or_is_skipped(folder, tmp_path, call):
    (folder / "a.png").write_bytes(b"no picture")
    source = f"jsonl:{folder / 'mine.jsonl'}"
    code, _, stderr = call(train, *flags(tmp_path / "out", "--data", source))
    assert code == 2 and "mine.jsonl line 2" in stderr and "a.png" in stderr and len(stderr.splitlines()) == 1
    code, stdout, _ = call(train, *flags(tmp_path / "out", "--data", source, "--skip-bad"))
    assert code == 0 and "skipped  1 bad rows" in stdout and "data     3 samples" in stdout


def test_bad_sources_are_one_line(folder, tmp_path, call):
    (folder / "x.json").write_text("3")
    for source, says in (("alpaca", "give sqa, or one of"), ("alpaca:no.json", "no file no.json"), ("dogs:x", "give sqa"),
                         (f"llava:{folder / 'llava.json'}:nowhere", "no f"), (f"alpaca:{folder / 'x.json'}", "list of rows")):
        code, _, stderr = call(train, *flags(tmp_path / "out", "--data", source))
        assert code == 2 and says in stderr and len(stderr.splitlines()) == 1, stderr
    for more in (["--weights", 1, 2], ["--weights", 0], ["--val-fraction", 1]):
        assert call(train, *flags(tmp_path / "out", "--data", f"alpaca:{folder / 'alpaca.json'}", *more))[0] == 2


def test_mutated_files_end_in_clean_errors_only(folder):
    """Thousands of damaged rows and files: each is read, or a BadRow, or a LavinError."""
    rng = random.Random(0)
    originals = {name: (folder / name).read_bytes() for name in ("alpaca.json", "llava.json", "all_data.json", "mine.jsonl")}
    values = [None, 3, "", [], {}, "\ud800", True, [[]], {"from": 1}, "x" * 9, 1e999]

    def mutate(value):
        if rng.random() < 0.15:
            return rng.choice(values)
        if isinstance(value, dict):
            return {(rng.choice(["image", "answer", "zz"]) if rng.random() < 0.05 else k): mutate(v) for k, v in value.items()}
        return [mutate(v) for v in value] if isinstance(value, list) else value

    outcomes = Counter()
    for i in range(3000):
        name = rng.choice(list(originals))
        if i % 2 or name == "mine.jsonl":
            content = bytearray(originals[name])
            for _ in range(rng.choice((1, 3, 20))):
                content[rng.randrange(len(content))] = rng.randrange(256)
        else:
            content = json.dumps(mutate(json.loads(originals[name]))).encode()
        (folder / name).write_bytes(content)
        try:
            samples, bad = instructions.read(f"{name.partition('.')[0] if name != 'mine.jsonl' else 'jsonl'}:{folder / name}")
            outcomes["samples"] += len(samples)
            outcomes["bad rows"] += len(bad)
        except LavinError:
            outcomes["refused"] += 1
        (folder / name).write_bytes(originals[name])
    assert min(outcomes[kind] for kind in ("samples", "bad rows", "refused")) > 300, outcomes


def test_check_says_what_is_in_a_file(folder, call):
    tokenizer = data.load_tokenizer(LLAMA)
    assert instructions.check(str(folder / "alpaca.json"), tokenizer, 2, 512, False) == 0
    (folder / "a.png").write_bytes(b"no picture")
    code, stdout, _ = call(instructions, "check", folder / "mine.jsonl", folder / "alpaca.json", "--llama", LLAMA)
    assert code == 1
    for says in ("mine.jsonl line 2", "not a picture that Pillow can read", "4 samples, 3 with a picture; 1 bad rows",
                 "2 samples, 0 with a picture; 0 bad rows", "»Hello.", "on average"):
        assert says in stdout, stdout
