"""easy-VQA as training data: pictures of one shape, 64 pixels wide, and questions about them.

    pip install easy-vqa
    python -m examples.easy_vqa FOLDER      write FOLDER/train.jsonl, test.jsonl and the pictures
    python train.py --data jsonl:FOLDER/train.jsonl
    python generate.py --data jsonl:FOLDER/test.jsonl --by kind

A line is {"prompt": question, "image": "train/0.png", "answer": answer, "kind": "yes/no", "shape"
or "colour"}. The package (https://pypi.org/project/easy-vqa) has 38,575 questions on about 4,000
pictures for training, and 9,673 questions on about 1,000 pictures for testing.
"""

import argparse
import shutil
from pathlib import Path

from extras.instructions import write_rows
from extras.terminal import Parser, run
from files import LavinError

SHAPES = ("circle", "rectangle", "triangle")


def kind_of(answer: str) -> str:
    """The kind of question that has this answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def write_split(folder: Path, split: str, questions: tuple, pictures: dict[int, str]) -> None:
    """Write FOLDER/split.jsonl, and copy its pictures to FOLDER/split.

    questions: three lists of equal length, with the texts, the answers and the numbers of the
    pictures. pictures: {number: path}.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, path in pictures.items():
        shutil.copy(path, folder / split / f"{number}.png")
    rows = []
    for question, answer, number in zip(*questions):
        rows.append({"prompt": question, "image": f"{split}/{number}.png", "answer": answer,
                     "kind": kind_of(answer)})
    write_rows(folder / f"{split}.jsonl", rows)
    print(f"written: {folder}/{split}.jsonl, {len(rows):,} questions about "
          f"{len(pictures):,} pictures")


def main() -> None:
    """Write both splits."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    try:
        import easy_vqa
    except ImportError as error:
        raise LavinError("the package easy-vqa is missing: pip install easy-vqa") from error
    write_split(folder, "train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
    write_split(folder, "test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())


if __name__ == "__main__":
    run(main)
