"""Instructions to learn from: other people's files, and your own.

    alpaca:FILE.json             a list of {instruction, input, output}
    llava:FILE.json[:IMAGES]     a list of {id, image, conversations: [{from, value}, …]}
    jsonl:FILE[:IMAGES]          a line for each {instruction or prompt, answer or output, image}, or {image, conversations}
    all_data:FILE[:IMAGES]       the reference's mixture: {"all": [{instruction, answer, image, image_source, qid}, …]}

    python data.py check FILE…          read all of it and say what is wrong, how long it is and how it looks

IMAGES is where the pictures lie (default: beside FILE); COCO's are found with and without COCO_train2014_.
A row that cannot be used is a BadRow with its place in the file; nothing here raises anything else for what a row holds.
"""

import argparse
import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import tiny
from data import Sample
from files import LavinError, read_json

KINDS = ("alpaca", "llava", "jsonl", "all_data")


@dataclass
class BadRow:
    place: str
    reason: str

    def __str__(self):
        return f"{self.place}: {self.reason}"


def instruction_prompt(instruction, more=""):
    """As the reference writes it; a prompt that says "Response:" itself stays as it is."""
    if "Response:" in instruction:
        return instruction.strip()
    return f"Instruction: {f'{instruction} {more}'.strip()}\nResponse:".replace("  ", " ")


def text(row, *names, needed=True):
    """The text under the first of these names that the row has. ValueError where it is missing, empty or no text."""
    value = next((row[name] for name in names if row.get(name) is not None), "")
    if not isinstance(value, str):
        raise ValueError(f"{names[0]!r} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{names[0]!r} is not Unicode text") from None
    if needed and not value.strip():
        raise ValueError(f"{' or '.join(map(repr, names))} is missing or empty")
    return value


@functools.cache
def listing(folder):
    """The names in a folder, read once: asking for each of 158,000 pictures would take a minute on some disks."""
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def find_image(row, folder):
    """The row's picture as a path, or None if it has none. ValueError if it is not there."""
    name = text(row, "image", needed=False)
    if not name:
        return None
    if row.get("image_source") == "sqa":
        name = f"train/{text(row, 'qid')}/{name}"
    base = os.path.basename(name)
    for path in (name, name.replace(base, f"COCO_train2014_{base}"), name.replace(base, base.removeprefix("COCO_train2014_")),
                 f"train2014/COCO_train2014_{base.removeprefix('COCO_train2014_')}"):
        place, base_name = os.path.split(os.path.join(folder, path))
        if base_name in listing(place):
            return os.path.join(place, base_name)
    raise ValueError(f"no picture {name!r} in {folder}")


def turns(conversation):
    """[{from, value}, …] -> [(prompt, answer), …], the mark of the picture left out."""
    if not isinstance(conversation, list) or len(conversation) < 2 or len(conversation) % 2:
        raise ValueError("'conversations' is not a list of questions, each with its answer")
    spoken = []
    for i, turn in enumerate(conversation):
        if not isinstance(turn, dict) or turn.get("from") not in (("gpt", "assistant") if i % 2 else ("human", "user")):
            raise ValueError(f"turn {i + 1} is not from {'gpt' if i % 2 else 'human'}")
        spoken.append(text(turn, "value").replace("<image>", "").strip())
        if not spoken[-1]:
            raise ValueError(f"turn {i + 1} says nothing")
    return [(instruction_prompt(question), answer) for question, answer in zip(spoken[::2], spoken[1::2])]


def samples_of(row, folder, place, multi_turn=False):
    """A row of any of the kinds -> [Sample], one, or one for each turn of a conversation."""
    if not isinstance(row, dict):
        raise ValueError("is not an object")
    image = find_image(row, folder)
    if "conversations" in row:
        pairs = turns(row["conversations"])
    else:
        question = text(row, "instruction", "prompt")
        pairs = [(instruction_prompt(question, text(row, "input", needed=False)), text(row, "answer", "output").strip())]
    if multi_turn:
        return [Sample(*pairs[-1], image, place, tuple(pairs[:-1]))]
    return [Sample(*pair, image, place) for pair in pairs]


def rows(kind, path):
    """Yield (place, row), or (place, BadRow)."""
    if kind != "jsonl":
        content = read_json(path)
        if isinstance(content, dict):
            content = content.get("all")
        if not isinstance(content, list):
            raise LavinError(f'{path}: neither a list of rows nor one under "all"')
        for number, row in enumerate(content, 1):
            yield f"{path} row {number}", row
        return
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{path} line {number}"
                try:
                    if line.strip():
                        yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield place, BadRow(place, f"not JSON ({error})")
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror})") from error


def split_folder(text):
    """FILE[:IMAGES] -> (file, folder or "")."""
    path, _, folder = text.rpartition(":") if ":" in text and not os.path.exists(text) else (text, "", "")
    return path, folder


def parse(source):
    """A SOURCE as in the docstring -> (kind, file, folder of the pictures)."""
    if os.path.isfile(source):                          # a bare FILE
        source = f"{'jsonl' if source.endswith('.jsonl') else 'alpaca'}:{source}"
    kind, _, rest = source.partition(":")
    if kind not in KINDS or not rest:
        raise LavinError(f"--data {source}: give sqa, or one of {', '.join(f'{kind}:FILE' for kind in KINDS)}")
    path, folder = split_folder(rest)
    if not os.path.isfile(path):
        raise LavinError(f"--data {source}: there is no file {path}")
    if folder and not os.path.isdir(folder):
        raise LavinError(f"--data {source}: there is no folder {folder}")
    return kind, path, folder or os.path.dirname(os.path.abspath(path))


def is_picture(path):
    """Does the file begin as a picture does? A tenth of a millisecond, where decoding takes six."""
    try:
        with Image.open(path):
            return True
    except Exception:       # Pillow's readers raise anything
        return False


def read(source, multi_turn=False, look=False):
    """A SOURCE -> ([Sample], [BadRow]). look: open every picture, as far as to see that it is one."""
    kind, path, folder = parse(source)
    samples, bad = [], []
    for place, row in rows(kind, path):
        try:
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                samples += samples_of(row, folder, place, multi_turn)
        except ValueError as error:
            bad.append(BadRow(place, str(error)))
    unreadable = {path for path in {sample.image for sample in samples if look and sample.image} if not is_picture(path)}
    bad += [BadRow(sample.id, f"{sample.image}: not a picture") for sample in samples if sample.image in unreadable]
    return [sample for sample in samples if sample.image not in unreadable], bad


# What a file holds


def histogram(values, unit, n=10):
    """Lines of a histogram of whole numbers."""
    width = -(-(max(values) + 1 - min(values)) // n)
    lows = range(min(values), max(values) + 1, width)
    counts = [sum(low <= value < low + width for value in values) for low in lows]
    return [f"  {low:>6} – {low + width - 1:<6} {unit} {count:>7}  {'█' * round(40 * count / max(counts))}"
            for low, count in zip(lows, counts)]


def show(sample, encoded, tokenizer):
    """A sample as the model will see it; what carries loss stands between » and «."""
    pieces, learned = [], False
    for token, label in zip(encoded.tokens.tolist(), encoded.labels.tolist()):
        if bool(label) != learned:
            pieces.append("»" if label else "«")
            learned = bool(label)
        pieces.append("[picture]" if token == 0 else tokenizer.id_to_piece(token).replace("▁", " ").replace("<0x0A>", "\n"))
    shown = "".join(pieces) + "«" * learned
    while "[picture][picture]" in shown:
        shown = shown.replace("[picture][picture]", "[picture]")
    return f"{sample.id}{f', {sample.image}' if sample.image else ''}\n{shown}"


def check(source, tokenizer, n_features, max_seq_len, multi_turn):
    """Print what is in a source and what is wrong with it -> how many rows are bad."""
    samples, bad = read(source, multi_turn)
    for path in tqdm(sorted({sample.image for sample in samples if sample.image}), desc="pictures", file=sys.stdout):
        try:
            data.load_pixels(path, 1)
        except LavinError as error:
            bad += [BadRow(sample.id, str(error)) for sample in samples if sample.image == path]
    for row in bad:
        print(row)
    encoded = [data.encode(sample, tokenizer, n_features, 10**9) for sample in samples]
    lengths = [len(e.tokens) for e in encoded]
    pictures = sum(sample.image is not None for sample in samples)
    print(f"{source}: {len(samples)} samples, {pictures} with a picture; {len(bad)} bad rows")
    if samples:
        cut = [data.encode(sample, tokenizer, n_features, max_seq_len) for sample in samples]
        lost = sum(not c.labels.any() for c in cut)
        print(f"{sum(lengths):,} tokens, {np.mean(lengths):.0f} on average, {max(lengths)} at most; at --max-seq-len {max_seq_len} "
              f"{sum(len(c.tokens) < n for c, n in zip(cut, lengths))} are cut, {lost} of them before the answer")
        print("\n".join(histogram(lengths, "tokens")))
        print(f"the first of them, with the tokens that carry loss between » and «:\n{show(samples[0], cut[0], tokenizer)}")
    return len(bad)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check"])
    parser.add_argument("sources", nargs="+", metavar="FILE", help="a file, or as for --data: llava:FILE:IMAGES, …")
    parser.add_argument("--llama", default=tiny.PATHS["llama"], help="whose tokenizer counts (default: tiny/llama)")
    parser.add_argument("--features", type=int, default=6, help="tokens of a picture: 6 for ViT-L/14 (default)")
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--multi-turn", action="store_true")
    args = parser.parse_args()
    tokenizer = data.load_tokenizer(args.llama)
    sys.exit(int(any([check(source, tokenizer, args.features, args.max_seq_len, args.multi_turn) for source in args.sources])))

