"""The text on which the small world's LLaMA is pre-trained, and the tokenizer trained on that text.

A document is either a register of options or a question of the world. If the question is about a
picture, words describe the picture. Documents get harder in stages (CURRICULUM).
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
    CAPITALS, COLOURS, COUNTS, DIRECTIONS, GOODS, KINDS, LANGUAGE, MATERIALS, PEOPLE, OBJECTS,
    OPPOSITES, PAST, POSITIONS, SHAPES, TEXT_SKILLS, Item, kinds, opposites, past_tense,
    picture_item, problem)


@dataclass
class Stage:
    """A stage of LLaMA's pre-training, and how its texts are mixed."""
    end: float                  # the step at which it ends
    registers: float            # share of registers; the rest are questions
    links: tuple[str, ...]      # what stands between a word and its letter in a register
    drills: float               # share of drills among the questions
    taught: float = 0           # share of TAUGHT among the other questions
    new: float = 0              # among scenes of things: share of pairs kept for the test split


# Choosing a letter is by far the hardest thing to learn here, and every answer depends on it. So
# the stages teach it first in its densest form, and at last in the questions themselves.
LINKS = (" is ", "? The answer is ", ". The answer is ")
CURRICULUM = (
    Stage(end=360, registers=1, links=(" ",), drills=0),
    Stage(end=560, registers=1, links=(" ", *LINKS), drills=0),
    Stage(end=800, registers=0.3, links=LINKS, drills=1),
    Stage(end=1400, registers=0.1, links=LINKS, drills=0.4),
    Stage(end=math.inf, registers=0.03, links=LINKS, drills=1 / 7, taught=0.2, new=1 / 6),
)
TAUGHT = (opposites, past_tense, kinds, kinds)      # skills with more facts than the others
FORMS = {"QCM-ALE": 8, "QCM-A": 3, "QCM-EA": 2, "Instruction": 2}       # and their weights


def all_words():
    """The words of registers and drills: most choices of the world's questions, and verbs."""
    words = [
        *COLOURS, *SHAPES, *COUNTS, *POSITIONS, *DIRECTIONS, *PEOPLE, *GOODS, *OBJECTS, *MATERIALS,
        *KINDS]
    for pair in OPPOSITES + PAST:
        words += pair
    for _, capital in CAPITALS:
        words.append(capital)
    return words


WORDS = all_words()


def register(rng: Random, links: tuple[str, ...]) -> Sample:
    """A list of options, then ten of its words, each with its letter: "cup is B. hat is A. …"."""
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
    """The task of a register, asked as a question: find a word among the options."""
    n = rng.randrange(2, 5)
    words = rng.sample(WORDS, n)
    return Item(
        "drill", LANGUAGE, f"Which option says {words[0]}?", words,
        lecture="",
        solution=f"The option says {words[0]}.")


def random_question(rng, stage):
    """A drill, a fact or a question of the world, with the probabilities of the stage."""
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
    """Draw a document -> (the words that replace the picture, or None; the Sample).

    These words are the parts of the scene's caption in random order, as a picture has no order.
    """
    if rng.random() < stage.registers:
        return None, register(rng, stage.links)
    item = random_question(rng, stage)
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    parts = item.caption.split(", ")
    words = ", ".join(rng.sample(parts, len(parts))) or None
    if form == "Instruction":
        # One form for all: that of rows with a picture. The other has one more space in it.
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
    """Train the tokenizer -> sentencepiece's model file.

    The settings are LLaMA's: BPE, single bytes for unknown characters, numbers split into digits.
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
        # "(A)" is one token, so that a letter stands directly in front of its option.
        user_defined_symbols=[f"▁({letter})" for letter in data.LETTERS])
    return model.getvalue()
