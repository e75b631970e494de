"""A skill that the small world lacks, learned from 200 examples: is this face happy or sad?

    python -m bench.recipe FOLDER

draws 200 faces to train on (FOLDER/faces.jsonl) and 200 others to test on (FOLDER/new-faces.jsonl).
Neither LLaMA nor CLIP has seen a face before. docs/small-world.md, "A new skill", has the commands
that train and test on them, and the results.
"""

import argparse
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from extras.instructions import write_rows
from extras.terminal import Parser, run
from tiny import drawing

QUESTION = "Is this face happy or sad?"
N_FACES = 200


def face(rng: Random) -> tuple[Image.Image, str]:
    """A face of 128 × 128 pixels, and its mood: "happy" or "sad"."""
    mood = rng.choice(["happy", "sad"])
    picture = Image.new("RGB", (128, 128), "white")
    canvas = ImageDraw.Draw(picture)
    r = rng.uniform(38, 48)
    x = rng.uniform(54, 74)
    y = rng.uniform(54, 74)
    canvas.ellipse((x - r, y - r, x + r, y + r), drawing.shade("yellow", rng), "black", 3)
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


def write_faces(folder: Path, name: str) -> None:
    """Draw N_FACES pictures into FOLDER/NAME, and write FOLDER/NAME.jsonl with a row for each."""
    rng = Random(name.replace("-", " "))
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(N_FACES):
        picture, mood = face(rng)
        picture.save(folder / name / f"{i}.png")
        row = {"prompt": QUESTION, "image": f"{name}/{i}.png", "answer": f"The face is {mood}."}
        rows.append(row)
    write_rows(folder / f"{name}.jsonl", rows)
    print(f"written: {folder / name}.jsonl")


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    write_faces(folder, "faces")
    write_faces(folder, "new-faces")


if __name__ == "__main__":
    run(main)
