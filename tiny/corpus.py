"""The text that the small world's LLaMA is pre-trained on, and the tokenizer that is made of it.

A document is a register of options, or a question of the world whose picture, if it has one, is
described in words. Documents get harder in stages (CURRICULUM).
"""

import io
import math
from dataclasses import dataclass
from random import Random

import sentencepiece

import data
from data import Sample
from extras.instructions import instruction_prompt
from tiny.world import (
    CAPITALS, COLOURS, COUNTS, DIRECTIONS, GOODS, KINDS, LANGUAGE, MATERIALS, NAMES, OBJECTS,
    OPPOSITES, PAST, POSITIONS, SHAPES, TEXT_SKILLS, Item, kinds, opposites, past_tense,
    picture_item, problem)


@dataclass
class Stage:
    """A stretch of LLaMA's pre-training, and the shares of its texts."""
    end: float                  # the step at which it ends
    registers: float            # share of registers, the rest are questions
    links: tuple[str, ...]      # what stands between a word and its letter in a register
    drills: float               # share of drills among the questions
    taught: float = 0           # share of TAUGHT among the other questions
    new: float = 0              # among scenes, share of the pairs that are kept for the test split


# By far the hardest thing to learn here is to choose a letter, and everything rests on it. So it is
# taught in stages, from its densest form to the questions themselves.
LINKS = (" is ", "? The answer is ", ". The answer is ")
CURRICULUM = (
    Stage(end=360, registers=1, links=(" ",), drills=0),
    Stage(end=560, registers=1, links=(" ", *LINKS), drills=0),
    Stage(end=800, registers=0.3, links=LINKS, drills=1),
    Stage(end=1400, registers=0.1, links=LINKS, drills=0.4),
    Stage(end=math.inf, registers=0.03, links=LINKS, drills=1 / 7, taught=0.2, new=1 / 6),
)
TAUGHT = (opposites, past_tense, kinds, kinds)      # skills with more facts than the others
FORMS = {"QCM-ALE": 8, "QCM-A": 3, "QCM-EA": 2, "Instruction": 2}       # with their weights


def all_words():
    """Every word that is the choice of some question."""
    words = [
        *COLOURS, *SHAPES, *COUNTS, *POSITIONS, *DIRECTIONS, *NAMES, *GOODS, *OBJECTS, *MATERIALS,
        *KINDS]
    for pair in OPPOSITES + PAST:
        words += pair
    for _, capital in CAPITALS:
        words.append(capital)
    return words


WORDS = all_words()


def register(rng: Random, links: tuple[str, ...]) -> Sample:
    """Options, and then ten times a word of theirs and its letter: "cup is B. hat is A. …"."""
    n = rng.randrange(2, 5)
    words = rng.sample(WORDS, n)
    link = rng.choice(links)
    options = []
    for letter, word in zip(data.LETTERS, words):
        options.append(f"({letter}) {word}")
    entries = []
    for _ in range(10):
        i = rng.randrange(n)
        entries.append(f"{words[i]}{link}{data.LETTERS[i]}.")
    return Sample(f"Options: {' '.join(options)}\nResponse:", " ".join(entries))


def drill(rng: Random) -> Item:
    """A register's task as a question: find a word among options."""
    n = rng.randrange(2, 5)
    words = rng.sample(WORDS, n)
    return Item(
        "drill", LANGUAGE, f"Which option says {words[0]}?", words,
        lecture="",
        solution=f"The option says {words[0]}.")


def draw_question(rng, stage):
    """A drill, a fact or a question of the world, as often as the stage says."""
    if rng.random() < stage.drills:
        return drill(rng)
    if stage.taught > 0 and rng.random() < stage.taught:
        skill = rng.choice(TAUGHT)
        return skill(rng)
    if rng.random() < 0.6:
        new = stage.new > 0 and rng.random() < stage.new
        return picture_item(rng, new)
    skill = rng.choice(TEXT_SKILLS)
    return skill(rng)


def document(rng: Random, stage: Stage) -> tuple[str | None, Sample]:
    """A text of the world -> (the words in the picture's place or None, Sample).

    A scene's words are the remarks of its caption in any order, since a picture has no order.
    """
    if rng.random() < stage.registers:
        return None, register(rng, stage.links)
    item = draw_question(rng, stage)
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    remarks = item.caption.split(", ")
    words = ", ".join(rng.sample(remarks, len(remarks))) or None
    if form == "Instruction":
        # The form of a question about a picture, for those in words alone as well.
        prompt = instruction_prompt(item.question, has_picture=True)
        return words, Sample(prompt, item.solution)
    written = problem(item, rng, "corpus")
    if form != "QCM-ALE":
        written["lecture"] = ""
    prompt, answer = data.sqa_prompt(written, form)
    return words, Sample(prompt, answer)


# The tokenizer


TOKENIZER_DOCUMENTS = 20_000
TOKENIZER_STAGE = Stage(end=math.inf, registers=0.1, links=LINKS, drills=0.3)


def train_tokenizer(seed: int) -> bytes:
    """sentencepiece's model file.

    The settings are LLaMA's: BPE, single bytes for what is unknown, numbers split into digits.
    """
    rng = Random(f"{seed} tokenizer")
    lines = []
    for _ in range(TOKENIZER_DOCUMENTS):
        words, sample = document(rng, TOKENIZER_STAGE)
        lines.append(f"Image: {words or 'N/A'}")
        lines.append(sample.prompt + sample.answer)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        # One token each, so that a letter stands right in front of its option.
        user_defined_symbols=[f"▁({letter})" for letter in data.LETTERS])
    return model.getvalue()
