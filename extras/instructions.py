"""Instruction data to train on or to answer: public data sets, and files of your own.

    alpaca:FILE.json            a list of {instruction, input, output}
    llava:FILE.json[:IMAGES]    a list of {id, image, conversations: [{from, value}, …]}
    jsonl:FILE[:IMAGES]         on each line {instruction or prompt, answer or output, image},
                                or {image, conversations}
    all_data:FILE[:IMAGES]      the authors' mixture:
                                {"all": [{instruction, answer, image, image_source, qid}, …]}

IMAGES is the folder of the pictures (default: the folder of FILE). COCO's pictures are found with
and without the prefix COCO_train2014_ in their names.

An unusable row becomes a BadRow, which gives the row's place in the file and what is wrong.
`read_instructions` raises no error for a row; `rows.read_rows` does. A picture must be inside
IMAGES: rows come from other people, and a name such as ../../x.png could point to any file on your
machine.
"""

import functools
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from data import Encoded, Sample
from files import LavinError, check_regular, inside, read_json, write_atomically

KINDS = ("alpaca", "llava", "jsonl", "all_data")


@dataclass
class BadRow:
    """A row that cannot be used."""
    place: str          # the file, and the number of the row or line in it
    reason: str

    def __str__(self):
        return f"{self.place}: {self.reason}"


# A row


def instruction_prompt(instruction: str, more: str = "", has_picture: bool = False) -> str:
    """The prompt for an instruction, exactly as the authors' code makes it.

    more: the row's input. If it is empty, a row without a picture keeps a space before the newline
    (the authors' form for Alpaca), and a row with a picture does not (their form for LLaVA). The
    released adapters were trained on both. Double spaces become single ones in a single pass, so
    three spaces become two. An instruction without input that contains "Response:" is a whole
    prompt already, and is only stripped.
    """
    if "Response:" in instruction and not more:
        return instruction.strip()
    if more or not has_picture:
        instruction = f"{instruction} {more}"
    prompt = f"Instruction: {instruction}\nResponse:"
    return prompt.replace("  ", " ").strip()


def text_field(row, *names, needed=True):
    """The first text that is not empty in these fields of a row, or "".

    Raises ValueError if it is not Unicode text, or if it is needed but missing or empty.
    """
    value = ""
    for name in names:
        if row.get(name) is not None:
            value = row[name]
            if not data.is_unicode(value):
                raise ValueError(f"{name!r} is not Unicode text")
        if value.strip():
            break
    if needed and not value.strip():
        missing = " or ".join(repr(name) for name in names)
        raise ValueError(f"{missing} is missing or empty")
    return value


@functools.cache
def list_folder(folder):
    """The names in a folder, read once. Asking the disk for each of 158,000 pictures is slow."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:                 # no such folder, or no permission to read it
        return frozenset()


def find_image(row, folder):
    """The path of a row's picture, or None if it has none.

    Raises ValueError if the picture does not exist or is not inside the folder.
    """
    name = text_field(row, "image", needed=False)
    if not name:
        return None
    if row.get("image_source") == "sqa":                    # ScienceQA's own layout
        name = f"train/{text_field(row, 'qid')}/{name}"
    prefix = "COCO_train2014_"
    base = os.path.basename(name)
    bare = base.removeprefix(prefix)
    variants = (
        name,
        os.path.join(os.path.dirname(name), prefix + base),
        os.path.join(os.path.dirname(name), bare),
        f"train2014/{prefix}{bare}",
    )
    for variant in variants:
        path = str(inside(folder, variant))
        if os.path.basename(path) in list_folder(os.path.dirname(path)):
            return path
    raise ValueError(f"no picture {name[:200]!r} in {folder}")


def pairs_of_conversation(conversation, has_picture):
    """[{from, value}, …] -> [(prompt, answer), …]. The placeholder <image> is removed."""
    if not isinstance(conversation, list) or len(conversation) < 2 or len(conversation) % 2:
        raise ValueError("'conversations' is not a list of questions, each with its answer")
    texts = []
    for i, turn in enumerate(conversation):
        speakers = ("human", "user") if i % 2 == 0 else ("gpt", "assistant")
        if not isinstance(turn, dict) or turn.get("from") not in speakers:
            raise ValueError(f"turn {i + 1} is not from {speakers[0]}")
        text = text_field(turn, "value").replace("<image>", "").strip()
        if not text:
            raise ValueError(f"turn {i + 1} is empty")
        texts.append(text)
    pairs = []
    for question, answer in zip(texts[::2], texts[1::2]):
        prompt = instruction_prompt(question, has_picture=has_picture)
        pairs.append((prompt, answer))
    return pairs


def turns_of_row(row, folder, needs_answer=True):
    """A row of any kind -> ([(prompt, answer), …], the path of its picture or None).

    Raises ValueError, which says what is wrong with the row. needs_answer=False: an instruction
    may lack an answer, which is then "".
    """
    if not isinstance(row, dict):
        raise ValueError("is not an object")
    image = find_image(row, folder)
    if "conversations" in row:
        return pairs_of_conversation(row["conversations"], image is not None), image
    instruction = text_field(row, "instruction", "prompt")
    more = text_field(row, "input", needed=False)
    prompt = instruction_prompt(instruction, more, has_picture=image is not None)
    answer = text_field(row, "answer", "output", needed=needs_answer).strip()
    return [(prompt, answer)], image


def samples_of_row(row, folder, place, multi_turn=False):
    """A row of any kind -> [Sample]. Raises ValueError, which says what is wrong with the row.

    A conversation becomes one sample per turn. With multi_turn it becomes a single sample: the last
    turn, with the earlier turns as its history. The answers in the history carry loss as well.
    """
    pairs, image = turns_of_row(row, folder)
    if multi_turn:
        prompt, answer = pairs[-1]
        return [Sample(prompt, answer, image, place, history=tuple(pairs[:-1]))]
    return [Sample(prompt, answer, image, place) for prompt, answer in pairs]


def question_of_row(row: object, folder: str | Path, place: str) -> Sample:
    """A row of any kind -> a Sample with its question. The answer is "" if the row has none.

    Of a conversation, this takes the first question. Raises ValueError, which says what is wrong.
    """
    pairs, image = turns_of_row(row, folder, needs_answer=False)
    prompt, answer = pairs[0]
    return Sample(prompt, answer, image, place)


# A file


def iterate_lines(path):
    """Yield (place, row) for each line of JSON. If a line is not JSON, its row is a BadRow."""
    try:
        # "-sig" skips a byte-order mark. Bytes that are not UTF-8 are let through, so that a later
        # error can name their row.
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{path} line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = BadRow(place, f"not JSON ({error})")
                yield place, row
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror})") from error


def iterate_rows(kind, path):
    """Yield (place, row) for each row of a file of this kind."""
    if kind == "jsonl":
        yield from iterate_lines(path)
        return
    content = read_json(path)
    if isinstance(content, dict):
        content = content.get("all")
    if not isinstance(content, list):
        raise LavinError(f'{path}: not a list of rows, and no such list under "all"')
    for number, row in enumerate(content, 1):
        yield f"{path} row {number}", row


def split_folder(source: str) -> tuple[str, str]:
    """FILE[:IMAGES] -> (file, folder or ""). A colon may also be part of the file's name."""
    if ":" not in source or os.path.exists(source):
        return source, ""
    path, _, folder = source.rpartition(":")
    return path, folder


def is_rows(source: str) -> bool:
    """Does generate.py's --data name a file or one of KINDS, and not a benchmark?"""
    return source.partition(":")[0] not in ("sqa", "mme", "caption")


def parse_source(source: str) -> tuple[str, str, str]:
    """A source of --data -> (kind, file, folder of the pictures).

    A FILE without a kind is jsonl if its name ends in .jsonl, else alpaca. Raises LavinError if
    the kind, the file or the folder does not exist.
    """
    if os.path.exists(source):
        kind = "jsonl" if source.endswith(".jsonl") else "alpaca"
        source = f"{kind}:{source}"
    kind, _, rest = source.partition(":")
    if kind not in KINDS or not rest:
        forms = ", ".join(f"{kind}:FILE" for kind in KINDS)
        raise LavinError(f"--data {source}: no such file; give sqa, or one of {forms}")
    path, folder = split_folder(rest)
    check_regular(path)
    if folder and not os.path.isdir(folder):
        raise LavinError(f"--data {source}: there is no folder {folder}")
    return kind, path, folder or os.path.dirname(os.path.abspath(path))


def bad_pictures(samples, read):
    """Call `read(path)` for each picture -> a BadRow for each row where it raises LavinError."""
    paths = sorted({sample.image for sample in samples if sample.image})
    reasons = {}
    for path in tqdm(paths, desc="pictures", file=sys.stdout):
        try:
            read(path)
        except LavinError as error:
            reasons[path] = str(error)
    faults = {}                 # a conversation's samples have the same id: the place of their row
    for sample in samples:
        if sample.image in reasons:
            faults[sample.id] = reasons[sample.image]
    return [BadRow(place, reason) for place, reason in faults.items()]


def look_at(path):
    """Raises LavinError if the file does not begin like a picture. 0.1 ms; decoding takes 6."""
    data.open_picture(path).close()


def write_rows(path: str | Path, rows: list[dict]) -> None:
    """Write a file for `jsonl:`. Raises LavinError if this fails."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_instructions(source: str, multi_turn: bool = False,
                      look: bool = False) -> tuple[list[Sample], list[BadRow]]:
    """Read a source of --data -> ([Sample], [BadRow]). Raises LavinError if there is no such file.

    multi_turn: make one sample of each conversation. look: check that every picture file begins
    like a picture.
    """
    kind, path, folder = parse_source(source)
    samples = []
    bad_rows = []
    for place, row in iterate_rows(kind, path):
        if isinstance(row, BadRow):
            bad_rows.append(row)
            continue
        try:
            samples += samples_of_row(row, folder, place, multi_turn)
        except ValueError as error:
            bad_rows.append(BadRow(place, str(error)))
    if look:
        bad_rows += bad_pictures(samples, look_at)
        bad_places = {row.place for row in bad_rows}
        samples = [sample for sample in samples if sample.id not in bad_places]
    return samples, bad_rows


# Tokens

# Fewer samples than this are tokenized in seconds. More can take minutes.
MANY = 50_000


def cache_key(samples, tokenizer, n_features, max_seq_len):
    """A hash of everything that the tokens depend on, so that outdated tokens are never used."""
    version = 2                     # of tokenize and encode in data.py; raise it if they change
    key = hashlib.sha256(tokenizer.serialized_model_proto())
    special = f"{tokenizer.bos_id()} {tokenizer.eos_id()}"      # not named in tokenizer.json
    key.update(f"{n_features} {max_seq_len} {special} {version}".encode())
    for sample in samples:
        # The tokens depend on whether there is a picture, but not on which one.
        fields = [sample.prompt, sample.answer, sample.history, sample.image is None]
        key.update(json.dumps(fields).encode())
    return key.hexdigest()[:16]


def write_tokens(path, samples, tokenizer, n_features, max_seq_len):
    """Tokenize all samples into one int32 array: lengths, tokens, labels, masks of features."""
    lengths = []
    tokens = []
    labels = []
    masks = []
    for sample in tqdm(samples, desc="tokenizing", file=sys.stdout):
        encoded = data.encode(sample, tokenizer, n_features, max_seq_len)
        lengths.append(len(encoded.tokens))
        tokens.append(encoded.tokens)
        labels.append(encoded.labels)
        masks.append(encoded.is_feature.astype(np.int32))
    flat = np.concatenate([np.array(lengths, dtype=np.int32), *tokens, *labels, *masks])

    def write(temporary):
        with open(temporary, "wb") as file:                 # np.save would add .npy to a name
            np.save(file, flat)

    write_atomically(path, write)


def map_tokens(path, n_samples, vocab_size):
    """Memory-map a file of write_tokens -> its array, or None if the file is damaged."""
    try:
        check_regular(path)
        flat = np.lib.format.open_memmap(path, mode="c").view(np.ndarray)
    except Exception:               # on damaged bytes, the reader may raise any exception
        return None
    if flat.dtype != np.int32 or flat.ndim != 1 or len(flat) < n_samples:
        return None
    lengths = flat[:n_samples]
    rest = flat[n_samples:]
    if lengths.min() < 0 or len(rest) != 3 * lengths.sum(dtype=np.int64):
        return None
    tokens, labels, masks = rest.reshape(3, -1)
    sound = (((0 <= tokens) & (tokens < vocab_size)).all()
             and ((labels == data.IGNORED) | (labels == tokens)).all()
             and ((masks == 0) | (masks == 1)).all())
    return flat if sound else None


def split_tokens(flat, samples):
    """The array of write_tokens -> [Encoded]."""
    lengths = flat[:len(samples)]
    tokens, labels, masks = flat[len(samples):].reshape(3, -1)
    encoded = []
    start = 0
    for sample, length in zip(samples, lengths.tolist()):
        end = start + length
        is_feature = masks[start:end].astype(bool)
        encoded.append(
            Encoded(tokens[start:end], labels[start:end], is_feature, sample.image, sample.id))
        start = end
    return encoded


def encode_all(samples: list[Sample], tokenizer: data.Tokenizer, n_features: int,
               max_seq_len: int, folder: str | Path | None) -> list[Encoded]:
    """[Sample] -> [Encoded]. With MANY samples or more, folder/tokens-KEY.npy caches their tokens.

    If folder is None, nothing is written.
    """
    if len(samples) < MANY or folder is None:
        return [data.encode(sample, tokenizer, n_features, max_seq_len) for sample in samples]
    key = cache_key(samples, tokenizer, n_features, max_seq_len)
    path = Path(folder, f"tokens-{key}.npy")
    flat = map_tokens(path, len(samples), tokenizer.vocab_size())
    if flat is None:
        write_tokens(path, samples, tokenizer, n_features, max_seq_len)
        flat = map_tokens(path, len(samples), tokenizer.vocab_size())
    if flat is None:
        raise LavinError(f"{path}: cannot be mapped into memory; choose another --out")
    return split_tokens(flat, samples)


# What a source holds


def histogram(values: list[int], unit: str, n: int = 10) -> list[str]:
    """The lines of a histogram of whole numbers, in at most n ranges."""
    lowest = min(values)
    highest = max(values)
    width = math.ceil((highest + 1 - lowest) / n)
    starts = range(lowest, highest + 1, width)
    counts = [0] * len(starts)
    for value in values:
        counts[(value - lowest) // width] += 1
    lines = []
    for start, count in zip(starts, counts):
        bar = "█" * round(40 * count / max(counts))
        lines.append(f"  {start:>6} – {start + width - 1:<6} {unit} {count:>7}  {bar}")
    return lines


def show(sample: Sample, encoded: Encoded, tokenizer: data.Tokenizer) -> str:
    """A sample as the model sees it. The part that carries loss is between » and «."""
    shown = ""
    has_loss = False
    sequence = zip(encoded.tokens.tolist(), encoded.labels.tolist(), encoded.is_feature.tolist())
    for token, label, is_feature in sequence:
        if has_loss != (label != data.IGNORED):
            has_loss = not has_loss
            shown += "»" if has_loss else "«"
        if not is_feature:
            # sentencepiece writes a space as ▁, and a byte that no piece covers as <0x..>.
            shown += tokenizer.id_to_piece(token).replace("▁", " ").replace("<0x0A>", "\n")
        elif not shown.endswith("[picture]"):               # once for all of a picture's features
            shown += "[picture]"
    if has_loss:
        shown += "«"
    title = f"{sample.id}, {sample.image}" if sample.image else sample.id
    return f"{title}\n{shown}"


def decode_picture(path):
    """Raises LavinError if the picture cannot be decoded."""
    data.load_pixels(path, 1)


def print_lengths(samples, tokenizer, n_features, max_seq_len):
    """Print how long the samples are, what max_seq_len cuts off, and the first sample.

    -> how many samples lose their whole answer.
    """
    no_limit = 10**9
    lengths = []
    n_cut = 0
    n_lost = 0                      # cut before the answer: nothing can be learned from it
    for sample in samples:
        whole = data.encode(sample, tokenizer, n_features, no_limit)
        cut = data.encode(sample, tokenizer, n_features, max_seq_len)
        lengths.append(len(whole.tokens))
        n_cut += len(cut.tokens) < len(whole.tokens)
        n_lost += bool((cut.labels == data.IGNORED).all())
    print(f"{sum(lengths):,} tokens, {np.mean(lengths):.0f} on average, {max(lengths)} at most; "
          f"with --max-seq-len {max_seq_len}, {n_cut} are cut, {n_lost} of them before the answer")
    for line in histogram(lengths, "tokens"):
        print(line)
    first = data.encode(samples[0], tokenizer, n_features, max_seq_len)
    print("the first sample, with the tokens that carry loss between » and «:")
    print(show(samples[0], first, tokenizer))
    return n_lost


def check_samples(name: str, samples: list[Sample], bad_rows: list[BadRow],
                  tokenizer: data.Tokenizer, n_features: int, max_seq_len: int) -> int:
    """Print what a source holds and what is wrong with it -> the number of its faults.

    A fault is a bad row, or that nothing can be learned from the source. name: the source's name.
    bad_rows: those found while reading it. Rows whose picture cannot be decoded are added to them.
    n_features: the number of tokens per picture.
    """
    bad_rows = bad_rows + bad_pictures(samples, decode_picture)
    for row in bad_rows:
        print(row)
    n_pictures = sum(sample.image is not None for sample in samples)
    print(f"{name}: {len(samples)} samples, {n_pictures} with a picture; {len(bad_rows)} bad rows")
    n_faults = len(bad_rows)
    if not samples:
        print(f"{name}: it holds no samples")
        return n_faults + 1
    n_lost = print_lengths(samples, tokenizer, n_features, max_seq_len)
    if n_lost == len(samples):
        print(f"--max-seq-len {max_seq_len} cuts off the answer of every sample; raise it")
        n_faults += 1
    return n_faults
