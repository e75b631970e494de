"""Answer a whole data set, and score ScienceQA's problems in the paper's nine columns.

    answer_all      generates an answer to every sample
    choose_letters  picks the likeliest letter instead, in one pass and without generating
    score           answers ScienceQA's problems in one of these two ways and prints the table

Under torchrun, every rank answers its share and then gets the answers of all other ranks.

A column of the table averages the problems of one kind:
    NAT, SOC, LAN     by subject: natural, social and language science
    TXT, IMG, NO      with a hint; with an image; with neither. A problem can be in TXT and IMG
    G1-6, G7-12       by grade
    AVG               all problems
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from data import Encoded, Sample
from extras import plot
from extras.scienceqa import SUBJECTS
from extras.values import short
from fast import ranks
from fast.engine import Engine, continue_prompts
from fast.fold import fold
from files import LavinError
from model import LaVIN, check_logits

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

    Problems without a prediction do not count.
    """
    correct = dict.fromkeys(COLUMNS, 0)
    total = dict.fromkeys(COLUMNS, 0)
    for pid, index in predictions.items():
        for column in columns_of(problems[pid]):
            correct[column] += index == problems[pid]["answer"]
            total[column] += 1
    return {column: (correct[column], total[column]) for column in COLUMNS}


def sqa_scores(problems: dict, predictions: dict) -> dict[str, float]:
    """{column: percent answered correctly}; nan for a column without problems."""
    scores = {}
    for column, (correct, total) in sqa_counts(problems, predictions).items():
        scores[column] = 100 * correct / total if total else float("nan")
    return scores


def sqa_table(problems: dict, predictions: dict) -> str:
    """The nine-column table: percent correct, and below it correct/total."""
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
    """A row for each value of a field (skill, topic, …): percent correct, and correct/total."""
    correct = {}
    for pid, index in predictions.items():
        value = problems[pid].get(field)
        if not isinstance(value, str):
            value = short(value)
        correct.setdefault(value, []).append(index == problems[pid]["answer"])
    rows = [percent_row(value, answers) for value, answers in sorted(correct.items())]
    return "\n".join(rows)


def percent_row(title: str, right: list[bool]) -> str:
    """A row of a table: the percentage of right answers, and right/total."""
    percent = 100 * sum(right) / len(right)
    fraction = f"{sum(right)}/{len(right)}"
    return f"{title:40}{percent:>8.2f}{fraction:>11}"


# Answers


class Answers:
    """Collects the answers to a data set's samples. After an error, it holds those so far."""

    def __init__(self, samples: list[Sample]):
        self.ids = [sample.id for sample in samples]
        self.given = {}         # {id: text}
        self.unread = {}        # {id: why its picture cannot be decoded}

    def add(self, identity: object, text: str) -> None:
        """Keep an answer, unless its picture could not be decoded."""
        if identity not in self.unread:
            self.given[identity] = text

    def gather(self) -> None:
        """Exchange the answers between ranks, so that every rank has all of them."""
        for given, unread in ranks.all_gather((self.given, self.unread)):
            self.given |= given
            self.unread |= unread

    def outputs(self) -> dict:
        """{id: text} for all samples; the text is "" if there is no answer."""
        return {identity: self.given.get(identity, "") for identity in self.ids}

    def missing(self) -> dict:
        """{id: why there is no answer}."""
        reasons = {}
        for identity in self.ids:
            if identity not in self.given:
                reasons[identity] = self.unread.get(identity, "the run ended before this answer")
        return reasons

    def first_unread(self) -> str:
        """The reason for the first picture that could not be decoded."""
        return next(self.unread[identity] for identity in self.ids if identity in self.unread)

    def print_unread(self) -> None:
        """Say how many pictures could not be decoded, if any."""
        if self.unread:
            first = self.first_unread()
            print(f"{len(self.unread)} of {len(self.ids)} have a picture that cannot be decoded; "
                  f"they count as wrong. The first one: {first}")

    def check(self) -> None:
        """Raises LavinError if any picture could not be decoded."""
        if self.unread:
            first = self.first_unread()
            raise LavinError(f"{first} ({len(self.unread)} of {len(self.ids)} have no answer "
                             "because their picture cannot be decoded; all others were answered)")


def by_modality(encoded: list[Encoded],
                deal: bool = True) -> tuple[list[Encoded], list[Encoded]]:
    """Return (prompts without a picture, prompts with one), the longest first.

    Prompts of similar length then run together, and a lack of memory shows at the start.
    deal: keep only this rank's share of each.
    """
    groups = ([], [])
    for prompt in encoded:
        groups[prompt.image is not None].append(prompt)
    for group in groups:
        group.sort(key=lambda prompt: -len(prompt.tokens))
    if not deal:
        return groups
    without, with_picture = groups
    return ranks.share(without), ranks.share(with_picture)


def progress_bar(groups: tuple[list[Encoded], list[Encoded]], doing: str) -> tqdm:
    """A bar that counts the answers to all prompts of these groups."""
    n_prompts = sum(len(group) for group in groups)
    return tqdm(total=n_prompts, desc=doing, unit=" problems", file=sys.stdout)


def encode_prompts(lavin, samples, answers, encode):
    """Return [encode(sample)]. A prompt that does not fit the context is answered with ""."""
    encoded = []
    n_too_long = 0
    for sample in samples:
        data.check_unicode(sample)
        try:
            encoded.append(encode(sample))
        except LavinError:
            answers.add(sample.id, "")
            n_too_long += 1
    if n_too_long:
        print(f"{n_too_long} prompts do not fit the context of {lavin.max_seq_len} tokens "
              "and count as wrong; raise --max-seq-len")
    return encoded


def decode_pictures(lavin: LaVIN, prompts: list[Encoded], answers: Answers, workers: int,
                    each: int) -> Iterator[Encoded]:
    """Yield the prompts with their pictures decoded. workers and each: as in data.prefetch.

    A picture that cannot be decoded costs only its own answer. A blank picture replaces it, so that
    the prompts keep their numbers, and `answers` ignores what the model says about it.
    """
    if prompts[0].image is None:
        workers = 0                                         # workers only decode pictures
    pictures = data.Pictures(prompts, lavin.resolution)
    for prompt, fault in data.prefetch(pictures, range(len(prompts)), workers, each):
        if fault:
            answers.unread[prompt.id] = fault
        yield prompt


def letter_is_out(lavin: LaVIN, format: str | None) -> Callable[[list[int]], bool] | None:
    """Return a function: do these tokens name a letter yet?

    None if reasons come before the letter, or if there is no ScienceQA format.
    """
    if format is None or not format.split("-")[1].startswith("A"):
        return None

    def is_out(tokens):
        return data.sqa_answer(data.decode(lavin.tokenizer, tokens)) >= 0

    return is_out


def answering_model(lavin: LaVIN, modality: int) -> LaVIN:
    """`lavin` folded for a modality. A model sharded by --fsdp is returned unchanged."""
    return lavin if lavin.is_sharded else fold(lavin, modality)


def answer_all(lavin: LaVIN, samples: list[Sample], answers: Answers, format: str | None,
               max_new_tokens: int | None = None, temperature: float = 0.0, top_p: float = 1.0,
               batch_size: int = 32, workers: int = 0, compiled: bool = False) -> None:
    """Answer every sample and add the texts to `answers`: "" if a prompt exceeds the context.

    format: the format of ScienceQA's prompts, or None for other samples. If its answer comes first,
    an output ends as soon as it names a letter: the lecture and the solution that follow do not
    affect the score. max_new_tokens: by default 64 for such a format, else 256.

    A model sharded by --fsdp needs all ranks for every pass, so they answer all samples together.
    """
    done = letter_is_out(lavin, format)
    if max_new_tokens is None:
        max_new_tokens = 64 if done else 256

    def encode(sample):
        return lavin.encode(sample, prompt_only=True)

    encoded = encode_prompts(lavin, samples, answers, encode)
    groups = by_modality(encoded, deal=not lavin.is_sharded)
    with progress_bar(groups, "answering") as bar:
        for modality, group in enumerate(groups):
            if not group:
                continue
            n_rows = min(batch_size, len(group))
            prompts = decode_pictures(lavin, group, answers, workers, each=n_rows)
            # Only the generator holds the folded LLaMA, so it is freed before the next is made.
            generator = continue_prompts(
                answering_model(lavin, modality), prompts, n_rows, max_new_tokens, temperature,
                top_p, done=done, compiled=compiled, longest=len(group[0].tokens))
            for number, tokens in generator:
                answers.add(group[number].id, data.decode(lavin.tokenizer, tokens))
                bar.update()
    answers.gather()


def letter_prompt(lavin, sample, n_choices):
    """Return (the prompt up to "The answer is" as Encoded, the token of each choice's letter).

    The letter may change how the text before it is tokenized. So every variant is tokenized as a
    whole. The letter is at the first position where the variants differ.
    """
    variants = []
    for letter in data.LETTERS[:max(2, n_choices)]:         # a single variant differs from none
        prompt = f"{sample.prompt}The answer is {letter}."
        variants.append(lavin.encode(replace(sample, prompt=prompt), prompt_only=True))
    shortest = min(len(variant.tokens) for variant in variants)
    tokens = np.stack([variant.tokens[:shortest] for variant in variants])      # (choices, T)
    differs = (tokens != tokens[0]).any(axis=0)             # (T,)
    position = int(differs.argmax())
    return data.cut(variants[0], position), tokens[:n_choices, position].tolist()


def choose_letters_of_group(lavin, group, letter_tokens, answers, modality, batch_size, workers):
    """Yield (id of a sample, index of its likeliest choice)."""
    if not group:
        return
    n_rows = min(batch_size, len(group))
    engine = Engine(fold(lavin, modality), n_rows, len(group[0].tokens))
    prompts = decode_pictures(lavin, group, answers, workers, each=n_rows)
    while batch := list(itertools.islice(prompts, n_rows)):
        logits = engine.prefill(data.collate(batch, lavin.resolution))
        check_logits(logits)
        engine.lengths.clear()                              # the rows are free for the next batch
        for prompt, row in zip(batch, logits):
            yield prompt.id, int(row[letter_tokens[prompt.id]].argmax())


def choose_letters(lavin: LaVIN, samples: list[Sample], answers: Answers, problems: dict,
                   batch_size: int = 32, workers: int = 0) -> None:
    """For each of ScienceQA's samples, add the likeliest letter after "The answer is".

    This takes one pass and generates nothing. A prompt that does not fit the context gets "".
    """
    letter_tokens = {}                  # {a sample's id: the token of each choice's letter}

    def encode(sample):
        n_choices = len(problems[sample.id]["choices"])
        start, letter_tokens[sample.id] = letter_prompt(lavin, sample, n_choices)
        return start

    groups = by_modality(encode_prompts(lavin, samples, answers, encode))
    with progress_bar(groups, "choosing") as bar:
        for modality, group in enumerate(groups):
            chosen = choose_letters_of_group(
                lavin, group, letter_tokens, answers, modality, batch_size, workers)
            for identity, index in chosen:
                answers.add(identity, f"The answer is {data.LETTERS[index]}.")
                bar.update()
    answers.gather()


def sqa_predictions(problems: dict, outputs: dict[str, str]) -> dict[str, int]:
    """{id: text} -> {id: index of the choice}, -1 if the text names no choice of the problem."""
    predictions = {}
    for pid, text in outputs.items():
        index = data.sqa_answer(text)
        n_choices = len(problems[pid]["choices"])
        predictions[pid] = index if index < n_choices else -1
    return predictions


def score(lavin: LaVIN, problems: dict, samples: list[Sample], format: str, by: str | None = None,
          letters: bool = False, answers: Answers | None = None, batch_size: int = 32,
          workers: int = 0, **options) -> tuple[dict[str, int], Answers]:
    """Answer ScienceQA's samples and print the table -> ({id: index of the choice}, the answers).

    An output that names no choice counts as wrong; the authors' code takes a random choice instead.
    by: also print a table with a row for each value of this field. letters: choose the likeliest
    letter instead of generating. answers: the caller's empty Answers, which this fills.
    options: other arguments of answer_all; with letters, they do not count.
    """
    answers = answers or Answers(samples)
    if letters:
        choose_letters(lavin, samples, answers, problems, batch_size, workers)
    else:
        answer_all(lavin, samples, answers, format, batch_size=batch_size, workers=workers,
                   **options)
    predictions = sqa_predictions(problems, answers.outputs())
    if by:
        print(sqa_table_by(by, problems, predictions))
    print(sqa_table(problems, predictions))
    unparsed = list(predictions.values()).count(-1)
    print(f"{unparsed} of {len(predictions)} outputs name no valid choice; they count as wrong")
    answers.print_unread()
    return predictions, answers


# Routing


def show_routing(lavin: LaVIN, path: str | Path) -> None:
    """Print and draw how each layer mixes its two experts, next to untrained routers.

    This resets the trained parameters of `lavin`. Raises LavinError if `path` cannot be written.
    """
    if lavin.adapter_config.experts == 1:
        raise LavinError("--show-routing: these adapters have a single expert, "
                         "so nothing is routed")
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
    firsts = {}
    for name, column in columns.items():
        firsts[name] = [first for first, second in column]
    print_distances(firsts["text, trained"], firsts["picture, trained"])
    draw_routing(
        path, firsts["text, trained"], firsts["picture, trained"],
        firsts["text, untrained"], firsts["picture, untrained"])
    print(f"written: {path}")


def distances(text: list[float], picture: list[float]) -> list[float]:
    """Per layer: the difference between the first expert's weights for the two modalities.

    0: the layer treats both alike. 1: each modality has its own expert.
    """
    return [abs(a - b) for a, b in zip(text, picture)]


def print_distances(text: list[float], picture: list[float]) -> None:
    """Print one line: the distance in each layer, their mean, and the largest."""
    apart = distances(text, picture)
    shown = " ".join(f"{distance:.3f}" for distance in apart)
    mean = sum(apart) / len(apart)
    largest = max(apart)
    print(f"distance between text and picture: {shown} · mean {mean:.3f} · "
          f"largest {largest:.3f}, layer {apart.index(largest) + 1}")


def draw_routing(path: str | Path, text: list[float], picture: list[float],
                 text_before: list[float], picture_before: list[float]) -> None:
    """Draw the first expert's weight in each layer, for both modalities, trained and untrained.

    Raises LavinError if `path` cannot be written.
    """
    layers = range(1, len(text) + 1)
    mean = sum(distances(text, picture)) / len(text)
    series = [
        plot.Series("text only", layers, text, plot.BLUE, marker="circle"),
        plot.Series("text and a picture", layers, picture, plot.ORANGE, marker="square"),
        plot.Series(f"distance, {mean:.2f} on average", layers, text, plot.LINE_GREY, 12,
                    ends=picture),
        plot.Series("text only, untrained", layers, text_before, plot.PALE_BLUE, dashed=True),
        plot.Series("text and a picture, untrained", layers, picture_before, plot.PALE_ORANGE,
                    dashed=True),
    ]
    plot.chart(path, "How each layer mixes its two experts", "layer", "weight of the first expert",
               series, x_range=(0.5, len(text) + 0.5), y_range=(-0.03, 1.03))
