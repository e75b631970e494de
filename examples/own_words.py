"""What a LLaMA says without a picture, as rows to train on together with pictures.

    python -m examples.own_words LLAMA FILE.jsonl     rows {"prompt": question, "answer": text}

Training on pictures alone changes a LLaMA's answers to questions without one: nothing in such data
says what to keep. These rows do. The answers are the model's own, from before any training, so
they teach it nothing new. Mix them in with train.py's --weights.
"""

import argparse
from pathlib import Path

import torch

import checkpoints
from data import Sample
from extras.instructions import instruction_prompt, write_rows
from extras.terminal import Parser, run
from fast import engine
from files import check_writable
from tiny import world

QUESTIONS = [
    "Tell me about {}.", "What do people use {} for?", "Where do you find {}?",
    "Write a sentence about {}."]
THINGS = """
    water, bread, salt, sugar, rice, coffee, tea, honey, paper, glass, iron, gold, wood, stone,
    wool, cotton, leather, soap, paint, oil, coal, wind, rain, snow, fire, the sun, the moon, the
    sea, a river, a lake, a mountain, a forest, a desert, an island, a beach, a garden, a farm, a
    school, a hospital, a museum, a market, a kitchen, a bridge, a road, a train, a bicycle, a
    ship, a plane, a clock, a mirror, a lamp, a candle, a chair, a table, a bed, a door, a window,
    a key, a knife, a spoon, a cup, a book, a letter, a map, a camera, a phone, a computer, a
    piano, a guitar, a drum, a ball, a horse, a cow, a sheep, a bird, a fish, a bee, a spider, an
    apple, an onion"""
NEW_TOKENS = 40


def questions() -> list[str]:
    """Every question about every thing."""
    found = []
    for thing in THINGS.split(","):
        for question in QUESTIONS:
            found.append(question.format(" ".join(thing.split())))
    return found


def whole_sentences(text: str) -> str:
    """The text up to its last full stop, or all of it if there is none."""
    before, stop, _ = text.rpartition(".")
    return before + stop if stop else text


def answer(llama: Path) -> list[dict]:
    """Ask the model all questions. A question that it leaves unanswered gets no row."""
    lavin = checkpoints.load(llama, world.PATHS["vit"], dtype=torch.bfloat16)
    asked = questions()
    samples = [Sample(instruction_prompt(question, has_picture=False)) for question in asked]
    texts = engine.generate(lavin, samples, NEW_TOKENS)
    rows = []
    for question, text in zip(asked, texts):
        text = whole_sentences(text).strip()
        if text:
            rows.append({"prompt": question, "answer": text})
    return rows


def main() -> None:
    """Write the file."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", type=Path, metavar="LLAMA", help="a folder or a GGUF file")
    parser.add_argument("file", type=Path, metavar="FILE")
    args = parser.parse_args()
    check_writable(args.file, "FILE")
    rows = answer(args.llama)
    write_rows(args.file, rows)
    print(f"written: {args.file}, {len(rows)} rows")


if __name__ == "__main__":
    run(main)
