"""Answer a whole data set, and score ScienceQA's problems in the paper's nine columns.

    answer_all      generates an answer to every sample
    choose_all      picks the likeliest letter instead, in one pass and without generating
    score           answers ScienceQA's problems by one of the two and prints the table

A column of the table averages the problems of one kind:
    NAT, SOC, LAN     by subject: natural, social and language science
    TXT, IMG, NO      with a hint; with an image; with neither. A problem may count in TXT and IMG
    G1-6, G7-12       by grade
    AVG               all of them
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from data import Encoded, Sample
from extras import plot
from extras.scienceqa import SUBJECTS
from fast.engine import Engine, continue_prompts
from fast.fold import fold
from files import LavinError
from model import LaVIN

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG")


# Scores


def columns_of(problem):
    """The columns of the table in which a problem counts."""
    columns = [SUBJECTS[problem["subject"]], "AVG"]
    if problem["hint"]:
        columns.append("TXT")
    if problem["image"]:
        columns.append("IMG")
    if not problem["hint"] and not problem["image"]:
        columns.append("NO")
    grade = int(problem["grade"].removeprefix("grade"))
    columns.append("G1-6" if grade <= 6 else "G7-12")
    return columns


def sqa_counts(problems: dict, predictions: dict) -> dict:
    """{id: problem}, {id: index of the choice} -> {column: (answered correctly, problems)}.

    Only the problems predicted are counted.
    """
    correct = dict.fromkeys(COLUMNS, 0)
    total = dict.fromkeys(COLUMNS, 0)
    for pid, index in predictions.items():
        for column in columns_of(problems[pid]):
            correct[column] += index == problems[pid]["answer"]
            total[column] += 1
    return {column: (correct[column], total[column]) for column in COLUMNS}


def sqa_scores(problems: dict, predictions: dict) -> dict[str, float]:
    """{column: percent answered correctly}, nan where a column has no problem."""
    scores = {}
    for column, (correct, total) in sqa_counts(problems, predictions).items():
        scores[column] = 100 * correct / total if total else float("nan")
    return scores


def sqa_table(problems: dict, predictions: dict) -> str:
    """The nine-column table: percent, and below it how many of how many."""
    scores = sqa_scores(problems, predictions)
    header = ""
    percents = ""
    fractions = ""
    for column, (correct, total) in sqa_counts(problems, predictions).items():
        percent = f"{scores[column]:.2f}" if total else "-"
        fraction = f"{correct}/{total}"
        header += f"{column:>11}"
        percents += f"{percent:>11}"
        fractions += f"{fraction:>11}"
    return "\n".join([header, percents, fractions])


def sqa_table_by(field: str, problems: dict, predictions: dict) -> str:
    """A row for each value of a field (skill, topic, …): percent, and how many of how many."""
    correct = {}
    for pid, index in predictions.items():
        value = str(problems[pid].get(field))
        correct.setdefault(value, []).append(index == problems[pid]["answer"])
    rows = []
    for value, answers in sorted(correct.items()):
        percent = 100 * sum(answers) / len(answers)
        fraction = f"{sum(answers)}/{len(answers)}"
        rows.append(f"{value:40}{percent:>8.2f}{fraction:>11}")
    return "\n".join(rows)


# Answers


def by_modality(encoded: list[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """-> (those without a picture, those with one), the longest first.

    Prompts of about the same length then run together, and too little memory shows at the start.
    """
    groups = ([], [])
    for prompt in encoded:
        groups[prompt.image is not None].append(prompt)
    for group in groups:
        group.sort(key=lambda prompt: -len(prompt.tokens))
    return groups


def encode_prompts(lavin, samples, encode):
    """-> ([encode(sample)], {id: ""} of the samples whose prompt does not fit the context)."""
    encoded = []
    outputs = {}
    for sample in samples:
        try:
            encoded.append(encode(sample))
        except LavinError:
            outputs[sample.id] = ""
    if outputs:
        print(f"{len(outputs)} prompts do not fit the context of {lavin.max_seq_len} tokens "
              "and count as wrong; --max-seq-len widens it")
    return encoded, outputs


def answer_all(lavin: LaVIN, samples: list[Sample], format: str, max_new_tokens: int | None = None,
               temperature: float = 0.0, top_p: float = 1.0, batch_size: int = 32,
               workers: int = 0, compiled: bool = False) -> dict[str, str]:
    """Answer every sample -> {its id: text}, "" for a prompt that does not fit the context.

    format: that of ScienceQA's prompts, or "-" for samples of another kind. If the answer comes
    first, an output ends as soon as its letter is out, since the lecture and the solution behind it
    do not count for the score. max_new_tokens: by default 64 for such a format, else 256.
    """
    answer_first = format.split("-")[1].startswith("A")
    if max_new_tokens is None:
        max_new_tokens = 64 if answer_first else 256

    def letter_is_out(ids):
        return data.sqa_answer(lavin.tokenizer.decode(ids)) >= 0

    def encode(sample):
        return lavin.encode(sample, prompt_only=True)

    encoded, outputs = encode_prompts(lavin, samples, encode)
    with tqdm(total=len(encoded), desc="answering", unit=" problems", file=sys.stdout) as bar:
        for modality, group in enumerate(by_modality(encoded)):
            if not group:
                continue
            rows = min(batch_size, len(group))
            pictures = data.Pictures(group, lavin.resolution)
            n_workers = workers if modality == 1 else 0         # they only load pictures
            prompts = data.prefetch(pictures, range(len(group)), n_workers, each=rows)
            # Only the generator holds the folded LLaMA. It is freed before the next one is made.
            answers = continue_prompts(
                fold(lavin, modality), prompts, rows, max_new_tokens, temperature, top_p,
                done=letter_is_out if answer_first else None, compiled=compiled,
                longest=len(group[0].tokens))
            for number, ids in answers:
                outputs[group[number].id] = lavin.tokenizer.decode(ids)
                bar.update()
    return outputs


def letter_prompt(lavin, sample, n_choices):
    """The prompt up to "The answer is" -> (Encoded, the token of each choice's letter).

    The letter may change how the text before it is cut into tokens. So every variant is tokenized
    as a whole, and the first position at which the variants differ is the letter's.
    """
    variants = []
    for letter in data.LETTERS[:max(2, n_choices)]:         # with one alone there is no difference
        prompt = f"{sample.prompt}The answer is {letter}."
        variants.append(lavin.encode(replace(sample, prompt=prompt), prompt_only=True))
    shortest = min(len(variant.tokens) for variant in variants)
    tokens = np.stack([variant.tokens[:shortest] for variant in variants])      # (choices, T)
    differs = (tokens != tokens[0]).any(axis=0)             # (T,)
    position = int(differs.argmax())
    start = replace(variants[0], tokens=tokens[0, :position],
                    labels=variants[0].labels[:position])
    return start, tokens[:n_choices, position].tolist()


def choose_group(lavin, group, letters, modality, batch_size, workers):
    """Yield (ids of a batch's samples, index of the likeliest choice of each)."""
    engine = Engine(fold(lavin, modality), batch_size, len(group[0].tokens))
    plan = data.in_order(len(group), batch_size)
    batches = data.Batches(group, plan.__getitem__, lavin.resolution)
    n_workers = workers if modality == 1 else 0
    for (batch,) in data.prefetch(batches, range(len(plan)), n_workers):
        best = []
        for identity, logits in zip(batch.ids, engine.prefill(batch)):
            best.append(int(logits[letters[identity]].argmax()))
        engine.lengths.clear()                              # the rows are free for the next batch
        yield batch.ids, best


def choose_all(lavin: LaVIN, samples: list[Sample], problems: dict, batch_size: int = 32,
               workers: int = 0) -> dict[str, str]:
    """The likeliest letter behind "The answer is", for each of ScienceQA's samples -> {id: text}.

    One pass over each prompt; nothing is generated. "" for a prompt that does not fit the context.
    """
    letters = {}

    def encode(sample):
        n_choices = len(problems[sample.id]["choices"])
        start, letters[sample.id] = letter_prompt(lavin, sample, n_choices)
        return start

    encoded, outputs = encode_prompts(lavin, samples, encode)
    with tqdm(total=len(encoded), desc="choosing", unit=" problems", file=sys.stdout) as bar:
        for modality, group in enumerate(by_modality(encoded)):
            if not group:
                continue
            for ids, best in choose_group(lavin, group, letters, modality, batch_size, workers):
                for identity, index in zip(ids, best):
                    outputs[identity] = f"The answer is {data.LETTERS[index]}."
                bar.update(len(ids))
    return outputs


def score(lavin: LaVIN, problems: dict, samples: list[Sample], format: str, by: str | None = None,
          letters: bool = False, **how) -> tuple[dict[str, int], dict[str, str]]:
    """Answer ScienceQA's samples and print the table -> ({id: index of the choice}, {id: text}).

    The index is -1 if the text names no choice of the problem. That counts as wrong; the authors'
    code takes a random choice instead. by: a field of the problems, for a second table with a row
    for each of its values. letters: choose the likeliest letter, generate nothing. how: the further
    arguments of answer_all.
    """
    if letters:
        outputs = choose_all(lavin, samples, problems, how["batch_size"], how["workers"])
    else:
        outputs = answer_all(lavin, samples, format, **how)
    predictions = {}
    for sample in samples:
        index = data.sqa_answer(outputs[sample.id])
        n_choices = len(problems[sample.id]["choices"])
        predictions[sample.id] = index if index < n_choices else -1
    if by:
        print(sqa_table_by(by, problems, predictions))
    print(sqa_table(problems, predictions))
    unparsed = list(predictions.values()).count(-1)
    print(f"{unparsed} of {len(predictions)} outputs name no valid choice; they count as wrong")
    return predictions, outputs


# Routing


def show_routing(lavin: LaVIN, path: str | Path) -> None:
    """Print and draw how each layer mixes its two experts, beside the routing before training.

    `lavin` is left with untrained adapters. Raises LavinError if `path` cannot be written.
    """
    trained = lavin.route()                                 # (layers, 2 modalities, 2 experts)
    lavin.init_trained()
    untrained = lavin.route()
    columns = {
        "text, trained": trained[:, 0].tolist(),
        "picture, trained": trained[:, 1].tolist(),
        "text, untrained": untrained[:, 0].tolist(),
        "picture, untrained": untrained[:, 1].tolist(),
    }
    print("layer" + "".join(f"{name:>22}" for name in columns))
    for i, row in enumerate(zip(*columns.values()), 1):
        line = f"{i:5}"
        for first, second in row:
            cell = f"{first:.3f} {second:.3f}"
            line += f"{cell:>22}"
        print(line)
    series = {}
    for name, column in columns.items():
        series[name] = [first for first, second in column]
    title = "Weight of the first of the two experts"
    plot.lines(path, title, "layer", range(1, len(trained) + 1), series)
    print(f"written: {path}")
