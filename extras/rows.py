"""Score your own rows (the files of extras/instructions.py) by exact match.

    read_rows       reads a source of --data: its samples, and what each of them is scored by
    is_right        compares two texts, ignoring case, surrounding space and a final full stop
    score_table     gives the percentage of right answers: all rows, and each value of a field
    held_out_right  counts right answers to the rows that a training run holds out

read_rows keeps only the first question of a conversation.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

import data
from data import Encoded, Sample
from extras import evaluate, instructions, runs
from extras.values import HELD_OUT_ROWS, short
from fast import ranks
from fast.engine import continue_prompts
from files import LavinError
from model import LaVIN

MOST_CHOICES = 300          # answers taken from a file as choices; each is read after every prompt
NO_GROUP = "(none)"


@dataclass
class Row:
    """What a sample is scored by."""
    id: str | int           # its "id", or its number among the file's rows
    answer: str             # "" if it has none
    group: str              # its value in the field of --by
    choices: list[str]      # to choose from; empty unless asked for


# A file


def make_row(content: dict, number: int, answer: str, by: str | None, with_choices: bool) -> Row:
    """A row of a file -> its Row. Raises ValueError if its choices are not texts."""
    identity = content.get("id")
    if type(identity) is not int and not data.is_unicode(identity):
        identity = number
    group = NO_GROUP
    if content.get(by) is not None:
        group = content[by] if isinstance(content[by], str) else short(content[by])
    choices = []
    if with_choices and content.get("choices") is not None:
        choices = content["choices"]
        if not isinstance(choices, list) or not choices or not all(map(is_choice, choices)):
            raise ValueError("'choices' is not a list of texts")
        choices = [choice.strip() for choice in choices]
    return Row(identity, answer, group, choices)


def is_choice(value):
    return data.is_unicode(value) and value.strip() != ""


def read_rows(source: str, by: str | None = None,
              with_choices: bool = False) -> tuple[dict[str, Row], list[Sample]]:
    """A source of --data -> ({a sample's id: its Row}, [Sample]). The id is the row's place.

    by: the field to group the rows by. with_choices: find every row's choices. Raises LavinError
    for a file without rows, a row that cannot be used, a field that no row has, and a row for which
    no choices are found.
    """
    kind, path, folder = instructions.parse_source(source)
    rows = {}
    samples = []
    fields = set()
    for number, (place, content) in enumerate(instructions.iterate_rows(kind, path), 1):
        if isinstance(content, instructions.BadRow):
            raise LavinError(str(content))
        try:
            sample = instructions.question_of_row(content, folder, place)
            rows[place] = make_row(content, number, sample.answer, by, with_choices)
        except ValueError as error:
            raise LavinError(f"{place}: {error}") from error
        samples.append(sample)
        fields.update(content)
    if not rows:
        raise LavinError(f"{path}: holds no rows")
    if by and by not in fields:
        raise LavinError(f"--by {by}: no row of {path} has this field; "
                         f"the fields are {', '.join(sorted(fields))}")
    if with_choices:
        settle_choices(rows, path)
    return rows, samples


def settle_choices(rows: dict[str, Row], path: str) -> None:
    """Rows without choices get all answers of the file as their choices."""
    answers = {}                        # a dict keeps their order, a set would not
    for row in rows.values():
        if row.answer:
            answers[row.answer] = True
    for place, row in rows.items():
        if row.choices:
            continue
        if not answers:
            raise LavinError(f'{place}: has no "choices", and no row of the file has an answer; '
                             "--score choices needs one of the two")
        if len(answers) > MOST_CHOICES:
            raise LavinError(f"{path}: --score choices takes the answers of the file as choices, "
                             f"at most {MOST_CHOICES}, but there are {len(answers)}; give each row "
                             'a list "choices"')
        row.choices = list(answers)


# Scores


def is_right(output: str, answer: str) -> bool:
    """Are both equal, ignoring letter case, surrounding space and one final full stop?"""
    return output != "" and bare(output) == bare(answer)


def bare(text):
    return text.strip().removesuffix(".").strip().casefold()


def score_table(rows: dict[str, Row], outputs: dict[str, str], by: str | None) -> str:
    """The percentage of right outputs for rows with an answer. by: also for each group."""
    groups = {}                         # {group: [is the output of this row right?]}
    right = []                          # the same for all groups together
    for place, row in rows.items():
        if row.answer:
            right.append(is_right(outputs[place], row.answer))
            groups.setdefault(row.group, []).append(right[-1])
    if not right:
        return "no row has an answer, so nothing is scored"
    lines = []
    if by:
        lines += [evaluate.percent_row(group, groups[group]) for group in sorted(groups)]
    lines.append(evaluate.percent_row("exact match", right))
    if len(right) < len(rows):
        lines.append(f"{len(rows) - len(right)} rows have no answer and do not count")
    return "\n".join(lines)


def predictions(rows: dict[str, Row], outputs: dict[str, str], missing: dict[str, str]) -> list:
    """The contents of --predictions: {id, output, answer, right} for every row.

    right is None if the row has no answer. missing: {a sample's id: why it has no output}.
    """
    written = []
    for place, row in rows.items():
        line = {"id": row.id, "output": outputs[place], "answer": row.answer or None}
        line["right"] = is_right(outputs[place], row.answer) if row.answer else None
        if place in missing:
            line["missing"] = missing[place]
        written.append(line)
    return written


# The rows that a training run holds out


def question_of(encoded: Encoded, tokenizer: data.Tokenizer) -> tuple[Encoded, str]:
    """An encoded sample -> (its prompt, its answer). In a conversation, the last answer counts."""
    has_loss = encoded.labels != data.IGNORED
    begins = np.flatnonzero(has_loss[1:] & ~has_loss[:-1]) + 1      # where each answer begins
    begin = begins[-1]
    answer = encoded.labels[begin:].tolist()
    if answer[-1] == tokenizer.eos_id():
        answer.pop()
    no_loss = np.full(begin, data.IGNORED, dtype=np.int32)
    prompt = dataclasses.replace(data.cut(encoded, begin), labels=no_loss)
    return prompt, tokenizer.decode(answer)


def count_right(lavin: LaVIN, encoded: list[Encoded], source: str, settings) -> int:
    """How many of these held-out samples the model answers correctly.

    For ScienceQA, only the letter counts. As many samples are answered at a time as a micro-batch
    has, so this needs less memory than training.
    """
    if not encoded:
        return 0
    prompts = []
    expected = []
    for sample in encoded:
        prompt, answer = question_of(sample, lavin.tokenizer)
        prompts.append(prompt)
        expected.append(answer)
    # One token more than the longest answer is enough to see that an output is wrong.
    most = max(len(sample.tokens) - len(prompt.tokens) for sample, prompt in zip(encoded, prompts))
    done = evaluate.letter_is_out(lavin, settings.format) if source == "sqa" else None
    n_right = 0
    with torch.compiler.set_stance("force_eager"):
        # Not folded: training may leave no memory for copies of LLaMA's matrices.
        n_rows = min(settings.micro_batch, len(prompts))
        for number, tokens in continue_prompts(lavin, prompts, n_rows, most, done=done):
            output = data.decode(lavin.tokenizer, tokens)
            if source == "sqa":
                letter = data.sqa_answer(output)
                n_right += letter >= 0 and letter == data.sqa_answer(expected[number])
            else:
                n_right += is_right(output, expected[number])
    return n_right


def held_out_right(lavin: LaVIN, held_out: dict[str, list[Encoded]],
                   settings) -> dict[str, tuple[int, int]]:
    """{source: (rows answered correctly, rows asked)} for the held-out rows, over all ranks.

    The first --eval-limit rows of every source are asked, by default HELD_OUT_ROWS. With --fsdp
    the result is {}: every pass needs all ranks, but here each rank answers rows of its own.
    """
    results = {}
    if settings.fsdp:
        return results
    limit = HELD_OUT_ROWS if settings.eval_limit is None else settings.eval_limit
    lavin.eval()
    for source, encoded in held_out.items():
        asked = encoded[:limit]
        if asked:
            share = asked[ranks.rank()::ranks.count()]
            n_right = torch.tensor(count_right(lavin, share, source, settings))
            results[source] = ranks.all_reduce(n_right.to(lavin.device)).item(), len(asked)
    lavin.train()
    return results


def score_held_out(lavin: LaVIN, held_out: dict[str, list[Encoded]], step: int, log: runs.Log,
                   settings) -> None:
    """Log the loss of the held-out rows, and how many of them are answered correctly."""
    losses = runs.held_out_losses(lavin, held_out, settings)
    right = held_out_right(lavin, held_out, settings)
    log.held_out(step, losses, right)
