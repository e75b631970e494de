"""A miniature of ScienceQA, invented, in its real layout: 24 train, 8 val and 12 test problems, half with a picture.

    python tests/miniature.py DIRECTORY
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")
ANIMALS = ("a crow", "a trout", "a fox", "a bee", "a frog")
MOVES = {"a crow": "flies", "a trout": "swims", "a fox": "runs", "a bee": "flies", "a frog": "jumps"}


def problem(i, split):
    """Even problems show a disc and ask for its colour; odd ones ask in words alone, every other one with a hint."""
    common = {"task": "closed choice", "category": "Things", "topic": "things", "skill": "Name it", "split": split,
              "grade": f"grade{1 + i % 12}"}
    if i % 2 == 0:
        answer = i // 2 % 4
        return common | {
            "question": "Which colour is the disc?", "choices": list(COLOURS), "answer": answer, "image": "image.png",
            "hint": "Look at the picture." if i % 4 else "", "subject": "natural science",
            "lecture": "A disc is a round shape.\nIt has one colour.", "solution": f"The disc is {COLOURS[answer]}."}
    animal = ANIMALS[i % 5]
    return common | {
        "question": f"How does {animal} move?", "choices": sorted(set(MOVES.values())), "image": None,
        "answer": sorted(set(MOVES.values())).index(MOVES[animal]), "lecture": "", "solution": f"{animal} {MOVES[animal]}.",
        "hint": "Animals move in many ways." if i % 4 == 1 else "", "subject": ("social science", "language science")[i // 2 % 2]}


def write(root):
    root = Path(root)
    splits = {"train": range(0, 24), "val": range(24, 32), "test": range(32, 44)}
    problems = {str(i): problem(i, split) for split, ids in splits.items() for i in ids}
    for pid, p in problems.items():
        if p["image"]:
            folder = root / "images" / p["split"] / pid
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (40, 30), "white")
            ImageDraw.Draw(picture).ellipse((8, 3, 31, 26), fill=COLOURS[p["answer"]])
            picture.save(folder / "image.png")
    captions = {pid: "a disc on white" for pid, p in problems.items() if p["image"]}
    for name, content in {"problems": problems, "pid_splits": {s: [str(i) for i in ids] for s, ids in splits.items()},
                          "captions": {"captions": captions}}.items():
        (root / f"{name}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    write(sys.argv[1])
