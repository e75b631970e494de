"""An invented miniature ScienceQA in the real layout. Half of its problems have a picture.

    python tests/miniature.py DIRECTORY
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SPLITS = {"train": range(24), "val": range(24, 32), "test": range(32, 44)}
COLOURS = ("red", "green", "blue", "yellow")
ANIMALS = ("a crow", "a trout", "a fox", "a bee", "a frog")
MOVES = {
    "a crow": "flies",
    "a trout": "swims",
    "a fox": "runs",
    "a bee": "flies",
    "a frog": "jumps",
}


def problem(i, split):
    """An even problem shows a disc and asks for its colour. An odd one has no picture."""
    common = {
        "task": "closed choice",
        "category": "Things",
        "topic": "things",
        "skill": "Name it",
        "split": split,
        "grade": f"grade{1 + i % 12}",
    }
    if i % 2 == 0:
        return common | picture_problem(i)
    return common | text_problem(i)


def picture_problem(i):
    answer = i // 2 % 4
    return {
        "question": "Which colour is the disc?",
        "choices": list(COLOURS),
        "answer": answer,
        "image": "image.png",
        "hint": "Look at the picture." if i % 4 else "",
        "subject": "natural science",
        "lecture": "A disc is a round shape.\nIt has one colour.",
        "solution": f"The disc is {COLOURS[answer]}.",
    }


def text_problem(i):
    animal = ANIMALS[i % 5]
    choices = sorted(set(MOVES.values()))
    subjects = ("social science", "language science")
    return {
        "question": f"How does {animal} move?",
        "choices": choices,
        "answer": choices.index(MOVES[animal]),
        "image": None,
        "hint": "Animals move in many ways." if i % 4 == 1 else "",
        "subject": subjects[i // 2 % 2],
        "lecture": "",
        "solution": f"{animal} {MOVES[animal]}.",
    }


def draw(colour):
    picture = Image.new("RGB", (40, 30), "white")
    ImageDraw.Draw(picture).ellipse((8, 3, 31, 26), fill=colour)
    return picture


def write(root):
    root = Path(root)
    problems = {}
    for split, numbers in SPLITS.items():
        for i in numbers:
            problems[str(i)] = problem(i, split)

    captions = {}
    for pid, p in problems.items():
        if p["image"]:
            folder = root / "images" / p["split"] / pid
            folder.mkdir(parents=True, exist_ok=True)
            draw(COLOURS[p["answer"]]).save(folder / "image.png")
            captions[pid] = "a disc on white"

    pid_splits = {split: [str(i) for i in numbers] for split, numbers in SPLITS.items()}
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", pid_splits)
    write_json(root / "captions.json", {"captions": captions})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    write(sys.argv[1])
