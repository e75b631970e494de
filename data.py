"""From samples to batches: pictures, tokens, the samples of each step, ScienceQA's prompts.

The data flow: Sample (text, and a picture's path) -> Encoded (tokens, made once) -> Batch (samples
concatenated, pictures decoded by DataLoader workers) -> LaVIN.forward. `encode` makes the sequence:

    [BOS] "Image: " [features] prompt answer [EOS]     or     [BOS] "Image: N/A" prompt answer [EOS]

Generation uses the same sequence, up to the end of the prompt. A mask marks where the features go.
The label −100 means "no loss on this token", as usual in PyTorch.
"""

import dataclasses
import io
import math
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sentencepiece import SentencePieceProcessor
from torch.utils.data import DataLoader, Dataset

from files import LavinError, check_regular, tokenizer_path

# Pictures

# The authors use these, not CLIP's own values.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

# We let Pillow read only these formats. An installed Pillow may support fewer.
PICTURE_FORMATS = frozenset("""
    AVIF BLP BMP CUR DCX DDS DIB FLI FTEX GBR GIF ICNS ICO IM JPEG JPEG2000 MSP PCD PCX PIXAR
    PNG PPM PSD QOI SGI SPIDER SUN TGA TIFF WEBP XBM XPM XVTHUMB""".split())


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode -> RGB, upright, transparent parts on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # 16 bits a channel. convert() would clip at 255 instead of scaling.
        values = np.asarray(picture).clip(0, 65535) / 257
        picture = Image.fromarray(values.round().astype(np.uint8))
    if picture.mode == "F" and np.asarray(picture).max() <= 1:
        # Floating-point numbers from 0 to 1. convert() expects 0 to 255.
        picture = Image.fromarray(255 * np.asarray(picture))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def open_picture(source: str | Path | BinaryIO) -> Image.Image:
    """A path or an open file -> the picture. Its size is then known, but no pixel is decoded yet.

    Raises LavinError unless the content is in one of PICTURE_FORMATS; the file's name does not
    matter. EPS is not one of them, because Pillow would run the file as a program, in Ghostscript.
    """
    if isinstance(source, str | Path):
        if not os.path.exists(source):
            raise LavinError(f"{source}: no such picture")
        check_regular(source)
    Image.init()
    formats = [name for name in Image.ID if name in PICTURE_FORMATS]
    try:
        return Image.open(source, formats=formats)
    except UnidentifiedImageError as error:
        raise LavinError(f"{source}: not a picture that Pillow can read (unknown format)"
                         ) from error
    except Exception as error:      # Pillow's readers raise anything, even SyntaxError
        raise LavinError(f"{source}: not a picture that Pillow can read ({error})") from error


def load_pixels(image: str | Path | Image.Image, resolution: int) -> torch.Tensor:
    """A path or a picture -> (3, R, R) fp32, normalized. Raises LavinError if it cannot be decoded.

    The picture is resized to R × R, not cropped: a diagram's border may hold the answer.
    """
    picture = image if isinstance(image, Image.Image) else open_picture(image)
    try:
        picture = to_rgb(picture).resize((resolution, resolution), Image.Resampling.BICUBIC)
    except Exception as error:
        raise LavinError(f"{image}: not a picture that Pillow can read ({error})") from error
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255     # (3, R, R)
    return (pixels - IMAGENET_MEAN) / IMAGENET_STD


# Samples, tokens, batches

IGNORED = -100      # label of a token without loss, the default ignore_index of F.cross_entropy


@dataclass
class Sample:
    prompt: str
    answer: str = ""
    image: str | Path | Image.Image | None = None
    id: str = ""                # for messages
    history: tuple = ()         # earlier turns, ((prompt, answer), …); their answers carry loss too


@dataclass
class Encoded:
    """A sample as tokens. The NumPy arrays may be slices of a memory-mapped file."""
    tokens: np.ndarray          # (T,) int32
    labels: np.ndarray          # (T,) int32: the token in an answer and its EOS, else IGNORED
    is_feature: np.ndarray      # (T,) bool: a picture's feature replaces this token
    image: str | Path | Image.Image | torch.Tensor | None       # a tensor holds pixels (3, R, R)
    id: str


@dataclass
class Batch:
    """S samples concatenated without padding: T counts the tokens of all of them.

    N of the samples have a picture of R × R pixels, which becomes F features. The two index tensors
    are computed in advance on the CPU: on a GPU, an operation like nonzero() would make the CPU
    wait.
    """
    tokens: torch.Tensor            # (T,) int64
    labels: torch.Tensor            # (T,) int64
    positions: torch.Tensor         # (T,) int64, each token's position in its sample
    modality: torch.Tensor          # (T,) int64, that of its sample: 0 text only, 1 with a picture
    answer_indices: torch.Tensor    # (n_answer,) int64, where a label is not IGNORED
    feature_indices: torch.Tensor   # (N · F,) int64, where the features of the pictures go
    pixels: torch.Tensor            # (N, 3, R, R) fp32, in the order of the samples
    lengths: torch.Tensor           # (S,) int64, tokens of each sample; stays on the CPU
    ids: list[str]                  # one for each sample
    n_answer: int                   # tokens that carry loss

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device. lengths and ids stay on the CPU: Python loops over them."""
        return dataclasses.replace(
            self,
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            positions=self.positions.to(device),
            modality=self.modality.to(device),
            answer_indices=self.answer_indices.to(device),
            feature_indices=self.feature_indices.to(device),
            pixels=self.pixels.to(device))


class Tokenizer(Protocol):
    """The methods of sentencepiece that every tokenizer here has (see extras/tokenizers.py).

    A tokenizer may also have the attribute `ends` (see answer_ends).
    """

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def bos_id(self) -> int: ...

    def eos_id(self) -> int: ...

    def vocab_size(self) -> int: ...

    def id_to_piece(self, token: int) -> str: ...

    def serialized_model_proto(self) -> bytes: ...


def load_sentencepiece(llama: str | Path) -> SentencePieceProcessor:
    """LLaMA's sentencepiece model, from LLaMA's folder or the folder above it."""
    path = tokenizer_path(llama)
    check_regular(path)
    try:
        tokenizer = SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(path.read_bytes())
        # A damaged file may load and still hold pieces that are not text.
        tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror})") from error
    except (RuntimeError, UnicodeDecodeError) as error:
        raise LavinError(f"{path}: not a sentencepiece tokenizer") from error
    if tokenizer.bos_id() < 0 or tokenizer.eos_id() < 0:
        raise LavinError(f"{path}: has no BOS or EOS token; take LLaMA's tokenizer.model")
    return tokenizer


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of generated tokens.

    Some models have more rows in `output` than their tokenizer has tokens. The tokens of these
    rows have no text, and sentencepiece would raise IndexError.
    """
    n_tokens = tokenizer.vocab_size()
    return tokenizer.decode([token for token in tokens if token < n_tokens])


def answer_ends(tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: EOS, and in some models from Hugging Face several others.

    Our own tokenizers (extras/tokenizers.py) have them all in `ends`. LaVIN.generate and
    fast/engine.py stop at each of them.
    """
    return getattr(tokenizer, "ends", {tokenizer.eos_id()})


def picture_prefix(tokenizer: Tokenizer) -> list[int]:
    """The tokens between BOS and a picture's features."""
    return tokenizer.encode("Image: ")


def tokenize(sample: Sample, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return (tokens, labels), lists of equal length, without "Image: …" and not truncated.

    BOS, and then for each turn prompt + answer + EOS. Prompt and answer are tokenized as one
    string. The labels start after n tokens, where n is the length of the prompt tokenized alone.
    If a token spans prompt and answer, the labels start one token off, as in the authors' code.
    """
    tokens = [tokenizer.bos_id()]
    labels = [IGNORED]
    for prompt, answer in (*sample.history, (sample.prompt, sample.answer)):
        turn = [*tokenizer.encode(prompt + answer), tokenizer.eos_id()]
        n_prompt = len(tokenizer.encode(prompt))
        n_prompt = min(n_prompt, len(turn))     # the whole string may have fewer tokens
        tokens += turn
        labels += [IGNORED] * n_prompt + turn[n_prompt:]
    return tokens, labels


def is_unicode(text: object) -> bool:
    """Is it text that UTF-8 can encode? JSON and terminals may pass on a lone surrogate."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(sample: Sample) -> None:
    """Raises LavinError for text that sentencepiece cannot handle."""
    texts = [sample.prompt, sample.answer]
    for turn in sample.history:
        texts += turn
    if not all(is_unicode(text) for text in texts):
        name = f"problem {sample.id}" if sample.id else "the prompt"
        raise LavinError(f"{name}: not Unicode text")


def encode(sample: Sample, tokenizer: Tokenizer, n_features: int, max_seq_len: int,
           prompt_only: bool = False) -> Encoded:
    """A sample -> the sequence shown at the top of this file.

    For training, the sequence is truncated to max_seq_len - 1 tokens, because the authors' code
    spends one position on the modality token. (Our sequence has no such token: see router.py.) If
    a sample loses its whole answer, make_training_set (extras/runs.py) drops it. prompt_only is for
    generation: the sequence ends with the prompt. Raises LavinError if a long prompt leaves no room
    for an answer.
    """
    check_unicode(sample)
    if prompt_only:
        question = Sample(sample.prompt, history=sample.history)
        tokens, _ = tokenize(question, tokenizer)
        tokens = tokens[:-1]                                        # no EOS
        labels = [IGNORED] * len(tokens)
    else:
        tokens, labels = tokenize(sample, tokenizer)

    if sample.image is None:
        prefix = tokenizer.encode("Image: N/A")
        placeholders = []
    else:
        prefix = picture_prefix(tokenizer)
        placeholders = [0] * n_features             # the features replace them
    inserted = prefix + placeholders                # after BOS
    tokens = tokens[:1] + inserted + tokens[1:]
    labels = labels[:1] + [IGNORED] * len(inserted) + labels[1:]
    is_feature = np.zeros(len(tokens), dtype=bool)
    is_feature[1 + len(prefix):1 + len(inserted)] = True

    context = max_seq_len - 1
    room = context - 1                  # for the prompt: one place stays free for a new token
    if prompt_only and len(tokens) > room:
        raise LavinError(f"the prompt has {len(tokens)} tokens, picture included, but a context of "
                         f"{max_seq_len} has room for {room}; shorten it or raise --max-seq-len")
    tokens = np.array(tokens, dtype=np.int32)
    labels = np.array(labels, dtype=np.int32)
    encoded = Encoded(tokens, labels, is_feature, sample.image, sample.id)
    return cut(encoded, context)


def append_tokens(encoded: Encoded, tokens: list[int]) -> Encoded:
    """The sequence with more tokens appended. They carry no loss."""
    n = len(tokens)
    return dataclasses.replace(
        encoded,
        tokens=np.append(encoded.tokens, tokens).astype(np.int32),
        labels=np.append(encoded.labels, [IGNORED] * n).astype(np.int32),
        is_feature=np.append(encoded.is_feature, [False] * n).astype(bool))


def cut(encoded: Encoded, n: int) -> Encoded:
    """The first n tokens of a sequence."""
    return dataclasses.replace(
        encoded,
        tokens=encoded.tokens[:n],
        labels=encoded.labels[:n],
        is_feature=encoded.is_feature[:n])


def with_pixels(encoded: Encoded, resolution: int) -> Encoded:
    """The same sample with its picture decoded to (3, R, R). A LavinError names the sample.

    In training, this error ends the run. When a data set is answered, only this sample gets no
    answer.
    """
    if encoded.image is None or isinstance(encoded.image, torch.Tensor):
        return encoded
    try:
        pixels = load_pixels(encoded.image, resolution)
    except LavinError as error:
        name = f"problem {encoded.id}: " if encoded.id else ""
        raise LavinError(f"{name}{error}") from error
    return dataclasses.replace(encoded, image=pixels)


def collate(encoded: list[Encoded], resolution: int) -> Batch:
    """Samples -> one Batch on the CPU, pictures decoded."""
    lengths = torch.tensor([len(e.tokens) for e in encoded])                            # (S,)
    tokens = torch.from_numpy(np.concatenate([e.tokens for e in encoded])).long()       # (T,)
    labels = torch.from_numpy(np.concatenate([e.labels for e in encoded])).long()
    is_feature = torch.from_numpy(np.concatenate([e.is_feature for e in encoded]))
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    has_picture = torch.tensor([e.image is not None for e in encoded])                  # (S,)
    answer_indices = (labels != IGNORED).nonzero()[:, 0]

    pictures = [with_pixels(e, resolution).image for e in encoded if e.image is not None]
    if pictures:
        pixels = torch.stack(pictures)
    else:
        pixels = torch.zeros(0, 3, resolution, resolution)

    return Batch(
        tokens, labels, positions,
        modality=has_picture.long().repeat_interleave(lengths),
        answer_indices=answer_indices,
        feature_indices=is_feature.nonzero()[:, 0],
        pixels=pixels,
        lengths=lengths,
        ids=[e.id for e in encoded],
        n_answer=len(answer_indices))


# Which samples a step trains on


def mixed_seed(seed: int, n: int) -> int:
    """A seed made of a run's seed and a number n, such as that of an epoch or a step.

    It has 32 bits, because the CPU's generator ignores the rest. An epoch and a step may share a
    seed. This is harmless: they draw different things.
    """
    return (seed * 1_000_003 + n) % 2**32


def mixture(sizes: list[int], shares: list[float], generator: torch.Generator) -> list[int]:
    """The sample indices of one epoch over several concatenated data sets, each with its share.

    The epoch has as many samples as all data sets together. If a data set is too small for its
    share, its samples are repeated. If it is too large, each epoch draws a new random subset of it.
    """
    indices = []
    start = 0           # where a data set begins in the concatenation
    end_before = 0      # where its share begins in the epoch
    for i, size in enumerate(sizes):
        end = round(sum(sizes) * sum(shares[:i + 1]) / sum(shares))
        n_wanted = end - end_before
        drawn = []
        while len(drawn) < n_wanted:
            drawn += (start + torch.randperm(size, generator=generator)).tolist()
        indices += drawn[:n_wanted]
        start += size
        end_before = end
    order = torch.randperm(len(indices), generator=generator).tolist()
    return [indices[i] for i in order]


def global_batch(step: int, lengths: list[int], batch_size: int, micro_batch: int, seed: int,
                 sizes: list[int] | None = None,
                 shares: list[float] | None = None) -> list[list[int]]:
    """Which samples `step` trains on: a list of micro-batches, each a list of indices.

    Every epoch is a permutation of all samples or, with shares, a mixture. It depends only on seed
    and epoch, so neither the number of workers nor resuming the run changes it. The last batch of
    an epoch may be smaller.

    The samples are dealt like cards, longest first, with every other round in reverse. So all
    micro-batches are about equally long, which keeps the peak memory low.
    """
    steps_per_epoch = math.ceil(len(lengths) / batch_size)
    epoch = step // steps_per_epoch
    first = step % steps_per_epoch * batch_size
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    if shares:
        order = mixture(sizes, shares, generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()

    chosen = order[first:first + batch_size]
    chosen.sort(key=lambda i: lengths[i], reverse=True)
    n_micro_batches = math.ceil(len(chosen) / micro_batch)
    micro_batches = [[] for _ in range(n_micro_batches)]
    for round_number, start in enumerate(range(0, len(chosen), n_micro_batches)):
        dealt = chosen[start:start + n_micro_batches]
        hands = micro_batches
        if round_number % 2 == 1:
            hands = reversed(micro_batches)
        for indices, i in zip(hands, dealt):
            indices.append(i)
    return micro_batches


def in_order(n_samples: int, batch_size: int, n_ranks: int = 1) -> list[list[range]]:
    """The indices of all samples in batches, for evaluation: entry i has one batch for each rank.

    The last entry may have fewer batches than there are ranks.
    """
    batches = []
    for start in range(0, n_samples, batch_size):
        batches.append(range(start, min(start + batch_size, n_samples)))
    plan = []
    for start in range(0, len(batches), n_ranks):
        plan.append(batches[start:start + n_ranks])
    return plan


class Batches(Dataset):
    """Item i: the micro-batches of step i. plan(i) gives their samples, a list of index lists.

    Tokens were made once, before training. Pictures are decoded here, each time their sample is
    drawn, in a worker process if there is one.

    With n ranks, rank k gets micro-batches k, k + n, k + 2n, …. All ranks get equally many, because
    with --fsdp every forward pass needs all of them. A rank that would get one fewer gets an idle
    batch: two tokens without an answer, whose loss is 0.
    """

    def __init__(self, encoded: list[Encoded], plan: Callable, resolution: int, rank=0, n_ranks=1):
        self.encoded = encoded
        self.plan = plan
        self.resolution = resolution
        self.rank = rank
        self.n_ranks = n_ranks

    def __getitem__(self, i):
        chosen = []
        for indices in self.plan(i):
            chosen.append([self.encoded[j] for j in indices])
        first = chosen[0][0]
        no_loss = np.full(2, IGNORED, dtype=np.int32)
        idle = Encoded(first.tokens[:2], no_loss, np.zeros(2, dtype=bool), None, "")
        while len(chosen) % self.n_ranks != 0:
            chosen.append([idle])
        try:
            return [collate(encoded, self.resolution)
                    for encoded in chosen[self.rank::self.n_ranks]]
        except LavinError as error:
            return error        # for `prefetch` to raise: a worker would add its traceback


class Pictures(Dataset):
    """Item i: (sample i with its pixels, None), or (sample i with blank pixels, the error)."""

    def __init__(self, encoded: list[Encoded], resolution: int):
        self.encoded = encoded
        self.resolution = resolution

    def __getitem__(self, i):
        try:
            return with_pixels(self.encoded[i], self.resolution), None
        except LavinError as error:
            blank = torch.zeros(3, self.resolution, self.resolution)
            return dataclasses.replace(self.encoded[i], image=blank), str(error)


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches the workers too, but the main process still needs them to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def pack(item: object) -> bytes:
    """The item that a worker prepared, as bytes for the main process.

    torch would send every tensor as an open file. With many micro-batches, these would exceed the
    limit on open files, and the main process would hang.
    """
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5)
    pickler.dispatch_table = {torch.Tensor: lambda tensor: (torch.from_numpy, (tensor.numpy(),))}
    pickler.dump(item)
    return file.getvalue()


def check_open_files(workers: int) -> None:
    """Raises LavinError if so few open files are allowed that torch's workers would hang."""
    opened = []
    try:
        for _ in range(4 * workers + 8):            # 4 for each worker, and 8 to spare
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise LavinError(f"--workers {workers}: the system allows too few open files for so many "
                         "processes; use --workers 0, or raise ulimit -n") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def prefetch(dataset: Dataset, indices: Iterable[int], workers: int, each: int = 2) -> Iterator:
    """Yield dataset[i] for i in indices. Each worker process prepares `each` items in advance.

    With workers 0, this process prepares each item when it is needed. If the dataset returns a
    LavinError, it is raised.
    """
    if workers:
        check_open_files(workers)
    loader = DataLoader(
        dataset, batch_size=None, sampler=indices, num_workers=workers,
        collate_fn=pack if workers else None, prefetch_factor=each if workers else None,
        worker_init_fn=_ignore_signals)
    for item in loader:
        if workers:
            item = pickle.loads(item)       # see `pack`
        if isinstance(item, LavinError):
            raise item
        yield item


def default_workers() -> int:
    """The number of processes that decode pictures: half the number of cores, at most 8."""
    n_cores = os.cpu_count() or 1
    return min(8, n_cores // 2)


# ScienceQA


# The letters in a format: Question, Context (hint and caption), Multiple choices, Answer, Lecture,
# Explanation (the solution). Letters before the dash make the prompt, letters after it the answer.
ANSWERS = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE")
FORMATS = (*(f"CQM-{answer}" for answer in ANSWERS),
           *(f"QCM-{answer}" for answer in ANSWERS),
           "QCML-A", "QCME-A", "QCMLE-A", "QCLM-A", "QCEM-A", "QCLEM-A", "QCML-AE")
LETTERS = "ABCDE"


def check_format(format: str) -> None:
    """LavinError, with a list of the valid formats, for an unknown one."""
    if format not in FORMATS:
        valid = ", ".join(FORMATS)
        raise LavinError(f"unknown prompt format {format!r}; valid ones: {valid}")


def sqa_prompt(problem: dict, format: str = "QCM-ALE", caption: str = "") -> tuple[str, str]:
    """A ScienceQA problem -> (prompt, answer), exactly as the authors' code writes them.

    The quirks of that code are kept, because the released adapters were trained on them: "AL" gives
    the solution and "AE" the lecture, and newlines in both become a literal backslash-n. If a
    problem has neither, its answer may end in a bare "BECAUSE:".
    """
    check_format(format)
    asked, answered = format.split("-")
    lecture = problem["lecture"].replace("\n", "\\n")
    solution = problem["solution"].replace("\n", "\\n")
    reasons = {"L": lecture, "E": solution,
               "LE": f"{lecture} {solution}", "EL": f"{solution} {lecture}"}
    options = " ".join(f"({letter}) {choice}"
                       for letter, choice in zip(LETTERS, problem["choices"]))
    context = f"{problem['hint']} {caption}".strip() or "N/A"

    prompt = ""
    for part in re.findall("Q|C|M|[LE]+", asked):
        if part == "Q":
            prompt += f"Question: {problem['question']}\n"
        elif part == "C":
            prompt += f"Context: {context}\n"
        elif part == "M":
            prompt += f"Options: {options}\n"
        else:
            prompt += f"BECAUSE: {reasons[part]}\n"
    prompt += "Response:"

    answer = f"The answer is {LETTERS[problem['answer']]}."
    if answered == "AL":
        answer += f" BECAUSE: {solution}"
    elif answered == "AE":
        answer += f" BECAUSE: {lecture}"
    elif answered == "ALE":
        answer += f" BECAUSE: {reasons['LE']}"
    elif answered != "A":                               # LA, EA, LEA, ELA: reasons first
        answer = f"{reasons[answered[:-1]]} {answer}"
    return prompt.replace("  ", " ").strip(), answer.replace("  ", " ").strip()


def sqa_answer(text: str) -> int:
    """The index of the choice that a generated text names, or -1 if it names none.

    If it names several, the last one counts: in formats with the reasons first, the answer is last.
    """
    named = re.findall(rf"The answer is ([{LETTERS}])(?![A-Za-z])", text)
    if not named:
        return -1
    return LETTERS.index(named[-1])
