"""A skill that the small world lacks, learned from 200 examples: is this face happy or sad?

    python -m bench.recipe make FOLDER          draw 200 faces and write FOLDER/faces.jsonl
    python train.py --data jsonl:FOLDER/faces.jsonl
    python -m bench.recipe score CHECKPOINT     how many of 200 new faces are read rightly

It measures README's recipe for data of one's own. Neither LLaMA nor CLIP has met a face before; to
compare, score a checkpoint that was trained on the small world alone.
"""

import argparse
import json
from pathlib import Path
from random import Random

import torch
from PIL import Image, ImageDraw

import checkpoints
from data import Sample
from extras.instructions import instruction_prompt
from extras.terminal import Parser, run
from fast import engine
from tiny import world

QUESTION = "Is this face happy or sad?"
N_FACES = 200


def face(rng: Random) -> tuple[Image.Image, str]:
    """A face, 128 × 128 pixels, and its mood: "happy" or "sad"."""
    mood = rng.choice(["happy", "sad"])
    picture = Image.new("RGB", (128, 128), "white")
    canvas = ImageDraw.Draw(picture)
    r = rng.uniform(38, 48)
    x = rng.uniform(54, 74)
    y = rng.uniform(54, 74)
    canvas.ellipse((x - r, y - r, x + r, y + r), world.shade("yellow", rng), "black", 3)
    eye_y = y - r / 3
    for eye_x in (x - r / 2.5, x + r / 2.5):
        canvas.ellipse((eye_x - 5, eye_y - 5, eye_x + 5, eye_y + 5), "black")
    if mood == "happy":
        top = y - r / 3
        angles = (10, 170)          # the lower half of an ellipse
    else:
        top = y + r / 7
        angles = (190, 350)         # the upper half
    canvas.arc((x - r / 1.6, top, x + r / 1.6, top + r), *angles, "black", 8)
    return picture, mood


def make(folder: Path) -> None:
    """Write the pictures, and faces.jsonl with a row for each of them."""
    rng = Random("faces")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(N_FACES):
        picture, mood = face(rng)
        picture.save(folder / f"{i}.png")
        row = {"prompt": QUESTION, "image": f"{i}.png", "answer": f"The face is {mood}."}
        rows.append(json.dumps(row))
    (folder / "faces.jsonl").write_text("\n".join(rows))


def score(checkpoint: Path) -> None:
    """Print how many of N_FACES new faces a checkpoint of the small world reads rightly."""
    torch.manual_seed(0)
    lavin = checkpoints.load(world.PATHS["llama"], world.PATHS["vit"], checkpoint)
    rng = Random("new faces")
    samples = []
    expected = []
    for _ in range(N_FACES):
        picture, mood = face(rng)
        samples.append(Sample(instruction_prompt(QUESTION, has_picture=True), image=picture))
        expected.append(f"The face is {mood}.")
    answers = engine.generate(lavin, samples, max_new_tokens=16)
    right = 0
    for answer, wanted in zip(answers, expected):
        right += answer.strip() == wanted
    print(f"{right} of {N_FACES} new faces read rightly; the first: {answers[0]}")


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "score"])
    parser.add_argument("path", type=Path, metavar="FOLDER or CHECKPOINT")
    args = parser.parse_args()
    if args.what == "make":
        make(args.path)
    else:
        score(args.path)


if __name__ == "__main__":
    run(main)
