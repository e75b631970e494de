"""What a LLaMA says without a picture, as rows to train on together with pictures.

    python -m examples.own_words LLAMA FILE.jsonl [--without TEST.jsonl]

Training on pictures alone changes a LLaMA's answers to questions without one: nothing in such data
says what to keep. These rows do. A row is {"prompt": question, "answer": text}. The answers are the
model's own, from before any training, so they teach it nothing new. The questions are of the kinds
to keep: about things, countries, words and sums. Mix the rows in with train.py's --weights.
"""

import argparse
from pathlib import Path

import torch

import checkpoints
from data import Sample
from extras.instructions import instruction_prompt, read_instructions, write_rows
from extras.terminal import Parser, run
from fast import engine
from files import LavinError, check_writable
from tiny import world

THINGS = """
    water, bread, salt, sugar, rice, coffee, tea, honey, paper, glass, iron, gold, wood, stone,
    wool, cotton, leather, soap, paint, oil, coal, wind, rain, snow, fire, the sun, the moon, the
    sea, a river, a lake, a mountain, a forest, a desert, an island, a beach, a garden, a farm, a
    school, a hospital, a museum, a market, a kitchen, a bridge, a road, a train, a bicycle, a
    ship, a plane, a clock, a mirror, a lamp, a candle, a chair, a table, a bed, a door, a window,
    a key, a knife, a spoon, a cup, a book, a letter, a map, a camera, a phone, a computer, a
    piano, a guitar, a drum, a ball, a horse, a cow, a sheep, a bird, a fish, a bee, a spider, an
    apple, an onion"""
COUNTRIES = """
    Sweden, Denmark, Finland, Iceland, Ireland, Scotland, Portugal, Poland, Austria, Hungary,
    Switzerland, Belgium, the Netherlands, Romania, Bulgaria, Turkey, Ukraine, Morocco, Kenya,
    Nigeria, South Africa, India, Pakistan, Thailand, Vietnam, Indonesia, Australia, Canada,
    Mexico, Cuba, Brazil, Argentina, Chile, Peru, Colombia"""
WORDS = """
    wet, dark, hard, soft, loud, rich, strong, long, wide, thick, clean, early, near, open, true,
    right, left, north, east, first, tall, sweet, cheap, safe, brave, kind, polite, smooth, sharp,
    deep, high, in, before, above, summer, morning, love, war, begin, win, buy, laugh, remember"""
DESCRIPTIONS = """
    a baby sheep, a baby cow, a baby horse, a baby duck, a baby frog, a female lion, a male chicken,
    a group of wolves, a person who bakes bread, a person who repairs cars, a person who paints
    pictures, a person who sells meat, a person who travels into space, a doctor for animals, a
    doctor for children, a shop for medicine, a place where planes land, a place where ships stop,
    a place where money is kept, a house made of snow, a shape with four equal sides, a shape with
    five sides, a line across a circle, the star at the center of the solar system, the study of
    living things, the fear of high places, very cold rain, water as a gas, a river of ice, a hill
    of sand, the first meal of the day, a book of maps, a book of words, a story of one's own
    life"""


def sums() -> str:
    """Sums, differences and products of small numbers."""
    found = []
    for first in range(2, 10):
        for second in range(first, 10):
            found.append(f"{first} + {second}")
            found.append(f"{first + second} - {first}")
            found.append(f"{first} x {second}")
    return ", ".join(found)


# (question, what it is asked about)
QUESTIONS = [
    ("Tell me about {}.", THINGS),
    ("What do people use {} for?", THINGS),
    ("Where do you find {}?", THINGS),
    ("Write a sentence about {}.", THINGS),
    ("What is the color of {}?", THINGS),
    ("What is the capital of {}?", COUNTRIES),
    ("What is the opposite of {}?", WORDS),
    ("What is {} called?", DESCRIPTIONS),
    ("What is {}?", sums()),
]
NEW_TOKENS = 40


def questions() -> list[str]:
    """Every question about each of its subjects."""
    found = []
    for question, subjects in QUESTIONS:
        for subject in subjects.split(","):
            found.append(question.format(" ".join(subject.split())))
    return found


def whole_sentences(text: str) -> str:
    """The first line up to its last full stop. Nothing if there is none.

    A small model often goes on with "Question: …" in the next line, and asks itself.
    """
    first_line = text.strip().partition("\n")[0]
    before, stop, _ = first_line.rpartition(".")
    return before + stop


def answer(llama: Path, asked: list[str]) -> list[dict]:
    """Ask the model these questions. One that it leaves unanswered gets no row."""
    # A LaVIN needs a ViT. No question here has a picture, so the smallest one will do.
    lavin = checkpoints.load(llama, world.PATHS["vit"], dtype=torch.bfloat16)
    samples = [Sample(instruction_prompt(question, has_picture=False)) for question in asked]
    texts = engine.generate(lavin, samples, NEW_TOKENS)
    rows = []
    for question, text in zip(asked, texts):
        text = whole_sentences(text)
        if text:
            rows.append({"prompt": question, "answer": text})
    return rows


def main() -> None:
    """Write the file."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", type=Path, metavar="LLAMA", help="a folder or a GGUF file")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--without", type=Path, metavar="TEST",
                        help="rows of questions to leave out, because a test will ask them")
    args = parser.parse_args()
    check_writable(args.file, "FILE")
    asked = questions()
    if args.without is not None:
        samples, bad_rows = read_instructions(f"jsonl:{args.without}")
        if bad_rows:
            raise LavinError(f"--without {bad_rows[0]}")    # its question might be asked
        tested = {sample.prompt for sample in samples}
        asked = [question for question in asked if instruction_prompt(question) not in tested]
    rows = answer(args.llama, asked)
    write_rows(args.file, rows)
    print(f"written: {args.file}, {len(rows)} rows")


if __name__ == "__main__":
    run(main)
