"""README's "your own data in five minutes": faces, a skill that the small world lacks.

    python tests/recipe.py make FOLDER                  200 faces and what is to be learned of them, FOLDER/faces.jsonl
    python tests/recipe.py score CHECKPOINT             how many of 200 new faces it reads rightly
"""

import json
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny  # noqa: E402
from data import Sample  # noqa: E402
from instructions import instruction_prompt  # noqa: E402
from model import LaVIN  # noqa: E402

QUESTION = "Is this face happy or sad?"


def face(rng):
    """-> (picture, "happy" or "sad")."""
    mood = rng.choice(["happy", "sad"])
    picture = Image.new("RGB", (128, 128), "white")
    d, (x, y), r = ImageDraw.Draw(picture), (rng.uniform(54, 74) for _ in range(2)), rng.uniform(38, 48)
    d.ellipse((x - r, y - r, x + r, y + r), tiny.shade("yellow", rng), "black", 3)
    for side in (-1, 1):
        d.ellipse((x + side * r / 2.5 - 5, y - r / 3 - 5, x + side * r / 2.5 + 5, y - r / 3 + 5), "black")
    top, angles = (y - r / 3, (10, 170)) if mood == "happy" else (y + r / 7, (190, 350))
    d.arc((x - r / 1.6, top, x + r / 1.6, top + r), *angles, "black", 8)
    return picture, mood


def make(folder):
    rng, folder, rows = random.Random("faces"), Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(200):
        picture, mood = face(rng)
        picture.save(folder / f"{i}.png")
        rows.append({"prompt": QUESTION, "image": f"{i}.png", "answer": f"The face is {mood}."})
    (folder / "faces.jsonl").write_text("\n".join(map(json.dumps, rows)))


def score(checkpoint):
    rng = random.Random("new faces")
    torch.manual_seed(0)
    lavin = LaVIN.load(tiny.PATHS["llama"], tiny.PATHS["vit"], checkpoint)
    faces = [face(rng) for _ in range(200)]
    answers = lavin.generate([Sample(instruction_prompt(QUESTION), image=picture) for picture, _ in faces], 16)
    right = sum(answer.strip() == f"The face is {mood}." for answer, (_, mood) in zip(answers, faces))
    print(f"{right} of {len(faces)} new faces read rightly; the first: {answers[0]}")


if __name__ == "__main__":
    {"make": make, "score": score}[sys.argv[1]](sys.argv[2])
