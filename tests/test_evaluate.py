"""Scores, tables, and the point at which an answer is complete."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoints
import data
from conftest import ADAPTER, LLAMA, VIT, difference
from extras import choices, evaluate
from extras.scienceqa import load_sqa
from fast import engine
from fast.engine import Engine
from fast.fold import fold
from files import LavinError

# Scores


def problem(subject, grade, hint, image, answer):
    return {
        "subject": f"{subject} science",
        "grade": f"grade{grade}",
        "hint": hint,
        "image": image,
        "answer": answer,
    }


@pytest.fixture
def problems():
    return {
        "1": problem("natural", 1, "h", "image.png", 0),
        "2": problem("natural", 6, "", None, 1),
        "3": problem("social", 7, "", "image.png", 2),
        "4": problem("language", 12, "h", None, 0),
        "5": problem("language", 12, "h", None, 0),
    }


def test_scores(problems):
    """Only problems with a prediction count. The fifth has none."""
    scores = evaluate.sqa_scores(problems, {"1": 0, "2": 0, "3": 2, "4": -1})
    assert np.isclose(scores.pop("AVG"), 50)
    assert scores == {
        "NAT": 50, "SOC": 100, "LAN": 0,
        "TXT": 50, "IMG": 100, "NO": 0,
        "G1-6": 50, "G7-12": 50,
    }


def test_a_column_without_problems_has_no_score(problems):
    scores = evaluate.sqa_scores(problems, {"1": 0})
    assert np.isnan(scores["SOC"])
    assert scores["AVG"] == 100


def test_the_table_says_how_many_of_how_many(problems):
    table = evaluate.sqa_table(problems, {"1": 0, "2": 0})
    header, _, fractions = table.split("\n")
    assert header.split() == list(evaluate.COLUMNS)
    assert fractions.split() == ["1/2", "0/0", "0/0", "1/1", "1/1", "0/1", "1/2", "0/0", "1/2"]


def test_the_table_by_a_field_counts_every_value():
    problems = {
        "0": {"skill": "count", "answer": 1},
        "1": {"skill": "count", "answer": 1},
        "2": {"skill": "count", "answer": 1},
        "3": {"skill": "map", "answer": 1},
        "4": {"skill": "map", "answer": 1},
    }
    table = evaluate.sqa_table_by("skill", problems, {"0": 1, "1": 0, "2": 1, "3": -1})
    rows = [row.split() for row in table.split("\n")]
    assert rows == [["count", "66.67", "2/3"], ["map", "0.00", "0/1"]]


# Answers


class ScriptedEngine:
    """Replaces fast.engine.Engine. It answers every prompt with SAID."""

    SAID = "The answer is B. BECAUSE: it is so."

    def __init__(self, lavin, rows, max_tokens, compiled=False):
        self.script = [*lavin.tokenizer.encode(self.SAID), lavin.tokenizer.eos_id()]
        self.vocab_size = lavin.llama.config.vocab_size
        self.n_said = []                    # tokens generated so far by each row

    def logits(self):
        tokens = [self.script[n] for n in self.n_said]
        return F.one_hot(torch.tensor(tokens), self.vocab_size).float()

    def prefill(self, batch):
        n_new = len(batch.lengths)
        self.n_said += [0] * n_new
        return self.logits()[-n_new:]

    def step(self, ids):
        self.n_said = [n + 1 for n in self.n_said]
        return self.logits()

    def retire(self, row):
        self.n_said[row] = self.n_said[-1]
        self.n_said.pop()


def test_a_sample_ends_as_soon_as_its_letter_is_out(sqa, monkeypatch):
    """It ends early if the format puts the answer first. If not, all of it is generated."""
    monkeypatch.setattr(engine, "Engine", ScriptedEngine)
    lavin = checkpoints.load(LLAMA, VIT, max_seq_len=300)
    problems, samples = load_sqa(sqa, "test")
    samples = [sample for sample in samples if sample.image is None]
    answers = evaluate.Answers(samples)
    evaluate.answer_all(lavin, samples, answers, "QCM-ALE")
    assert set(answers.outputs().values()) == {"The answer is B"}
    evaluate.answer_all(lavin, samples, answers, "QCM-LEA")
    assert set(answers.outputs().values()) == {ScriptedEngine.SAID}
    assert answers.missing() == {}
    predictions, _ = evaluate.score(lavin, problems, samples, "QCM-ALE")
    assert set(predictions.values()) == {1}


def test_a_letter_that_is_no_choice_is_not_an_answer(sqa, monkeypatch, capsys):
    """No problem of the miniature has five choices, so E is never an answer."""
    lavin = checkpoints.load(LLAMA, VIT, max_seq_len=300)
    problems, samples = load_sqa(sqa, "test")

    def answer_e(lavin, samples, answers, format, **how):
        for sample in samples:
            answers.add(sample.id, "The answer is E.")

    monkeypatch.setattr(evaluate, "answer_all", answer_e)
    predictions, _ = evaluate.score(lavin, problems, samples, "QCM-ALE")
    assert set(predictions.values()) == {-1}
    assert "12 of 12" in capsys.readouterr().out


def test_a_table_by_a_field_of_any_type():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    problems = {"0": {"skill": deep, "answer": 1}, "1": {"answer": 1}}
    table = evaluate.sqa_table_by("skill", problems, {"0": 1, "1": 0})
    rows = table.split("\n")
    assert len(rows) == 2 and max(len(row) for row in rows) < 100


# Pictures that cannot be decoded, and runs that end early


BAD = ("34", "40")


@pytest.fixture
def damaged_split(sqa):
    """(problems, samples) of the test split. Two of its six pictures were damaged since."""
    problems, samples = load_sqa(sqa, "test")
    vanished, overwritten = BAD
    (sqa / "images" / "test" / vanished / "image.png").unlink()
    (sqa / "images" / "test" / overwritten / "image.png").write_bytes(b"no picture")
    return problems, samples


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("letters", [False, True], ids=["generated", "letters"])
def test_a_bad_picture_costs_its_own_answer_alone(
        sqa, damaged_split, capsys, workers, letters):
    lavin = checkpoints.load(LLAMA, VIT, max_seq_len=300)
    problems, samples = damaged_split
    how = {"letters": letters, "batch_size": 4, "workers": workers}
    if not letters:
        how["max_new_tokens"] = 3
    predictions, answers = evaluate.score(lavin, problems, samples, "QCM-ALE", **how)
    assert set(answers.missing()) == set(BAD)
    assert "2 of 12 have a picture that cannot be decoded" in capsys.readouterr().out
    outputs = answers.outputs()
    with pytest.raises(LavinError, match="problem (34|40): .*picture .*2 of 12 have no"):
        answers.check()
    for pid in BAD:
        assert outputs[pid] == "" and predictions[pid] == -1
    # The answers to the others do not depend on the bad ones.
    others = [sample for sample in samples if sample.id not in BAD]
    _, alone = evaluate.score(lavin, problems, others, "QCM-ALE", **how)
    alone.check()
    assert alone.outputs() == {sample.id: outputs[sample.id] for sample in others}


def test_answers_outlast_what_ends_the_run(damaged_split, monkeypatch):
    """Answers given before an interruption are kept, and the others are missing."""
    lavin = checkpoints.load(LLAMA, VIT, max_seq_len=300)
    _, samples = damaged_split
    prefill = Engine.prefill
    calls = []

    def interrupted(engine, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prefill(engine, batch)

    monkeypatch.setattr(Engine, "prefill", interrupted)
    answers = evaluate.Answers(samples)
    with pytest.raises(KeyboardInterrupt):
        evaluate.answer_all(lavin, samples, answers, "QCM-ALE", 3, batch_size=3)
    assert 0 < len(answers.given) < 12
    assert answers.missing().keys() | answers.given.keys() == {sample.id for sample in samples}
    assert "the run ended before this answer" in answers.missing().values()


def test_the_engine_has_no_rows_that_nobody_needs(damaged_split, monkeypatch):
    """--batch-size 100000 asks for that many rows of cache, even if there are few samples."""
    lavin = checkpoints.load(LLAMA, VIT, max_seq_len=300)
    problems, samples = damaged_split
    rows = []
    make = Engine.__init__

    def counted(engine, lavin, n_rows, *more):
        rows.append(n_rows)
        make(engine, lavin, n_rows, *more)

    monkeypatch.setattr(Engine, "__init__", counted)
    evaluate.choose_letters(lavin, samples, evaluate.Answers(samples), problems, batch_size=100_000)
    answers = evaluate.Answers(samples)
    evaluate.answer_all(lavin, samples, answers, "QCM-ALE", 1, batch_size=100_000)
    assert rows == [6, 6, 6, 6]


# Routing


def test_the_routing_is_printed_with_how_far_apart_the_modalities_are(capsys, tmp_path):
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER)
    trained = lavin.route()                             # (layers, 2 modalities, 2 experts)
    first = trained[:, :, 0]
    apart = (first[:, 0] - first[:, 1]).abs()
    evaluate.show_routing(lavin, tmp_path / "routing.png")
    header, *rows, distances, written = capsys.readouterr().out.splitlines()
    assert "text, trained" in header and "picture, untrained" in header
    untrained = lavin.route()                           # show_routing has drawn new routers
    assert difference(trained, untrained) > 0.01
    weights = torch.cat([trained, untrained], dim=1).flatten(1)     # (layers, 8)
    for number, (row, expected) in enumerate(zip(rows, weights.tolist(), strict=True), 1):
        assert row.split() == [str(number), *(f"{weight:.3f}" for weight in expected)]
    shown = " ".join(f"{distance:.3f}" for distance in apart)
    assert distances == (f"distance between text and picture: {shown} · mean {apart.mean():.3f} · "
                         f"largest {apart.max():.3f}, layer {int(apart.argmax()) + 1}")
    assert written == f"written: {tmp_path / 'routing.png'}"


# The most likely of the given choices


CHOICES = ["Iron.", "yes", "The answer is A.", "yes, of course", "yes"]


def brute_force(lavin, sample, choice):
    """log P(choice, EOS | prompt), from the logits of the whole sequence."""
    batch = lavin.batch([replace(sample, answer=choice)])
    log_p = lavin.logits(batch)[0].log_softmax(-1)
    total = 0.0
    for position in batch.answer_indices.tolist():
        total += log_p[position - 1, batch.tokens[position]].item()
    return total


@torch.no_grad()
def score_in_branches(lavin, samples, choices_of):
    """The scores of all choices of all samples, in order, from one engine."""
    engine = Engine(lavin, len(samples), 128)
    starts = []
    waiting = []
    for row, (sample, given) in enumerate(zip(samples, choices_of)):
        start, branches = choices.split_sequences(lavin, sample, given)
        starts.append(start)
        waiting += [(row, branch) for branch in branches]
    engine.prefill(data.collate(starts, lavin.resolution))
    return choices.branch_scores(engine, waiting)


@torch.no_grad()
@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("most_tokens", [3, 1024], ids=["in parts", "at once"])
def test_scores_in_branches_are_those_of_whole_sequences(
        lavin, samples, monkeypatch, modality, folded, most_tokens):
    """Each row has its own choices. Two equal choices must get equal scores."""
    monkeypatch.setattr(choices, "MOST_TOKENS", most_tokens)
    samples = [sample for sample in samples if (sample.image is not None) == modality]
    choices_of = [CHOICES, CHOICES[:1]]
    expected = []
    for sample, given in zip(samples, choices_of, strict=True):
        expected += [brute_force(lavin, sample, choice) for choice in given]
    model = fold(lavin, modality) if folded else lavin
    assert difference(score_in_branches(model, samples, choices_of), expected) < 1e-4


def test_the_likeliest_choice_is_taken(lavin, samples):
    """Each sample has its own choices. One list has pictures and text, in batches of 1 and of all.

    The training loss prefers the same choice.
    """
    numbered = [replace(sample, id=str(i)) for i, sample in enumerate(samples)]
    choices_of = {"0": CHOICES, "1": CHOICES[1:], "2": CHOICES[:3], "3": CHOICES}
    expected = {}
    for sample in numbered:
        sums = {}
        for choice in choices_of[sample.id]:
            batch = lavin.batch([replace(sample, answer=choice)])
            sums[choice] = lavin(batch).item() * batch.n_answer
        expected[sample.id] = min(sums, key=sums.get)
    for batch_size in (1, 32):
        answers = evaluate.Answers(numbered)
        choices.choose_all(lavin, numbered, answers, choices_of, batch_size)
        assert answers.given == expected


def test_a_choice_that_does_not_fit_the_context_is_counted(lavin, samples, capsys):
    numbered = [replace(sample, id=str(i)) for i, sample in enumerate(samples[:2])]
    answers = evaluate.Answers(numbered)
    choices.choose_all(lavin, numbered, answers, {"0": ["yes"], "1": ["yes", "no " * 200]})
    assert answers.given == {"0": "yes", "1": ""}
    assert "1 prompts do not fit the context" in capsys.readouterr().out
