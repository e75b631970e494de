"""Samples and what becomes of them: prompts, tokens, pictures, batches; ScienceQA in its real layout.

The way of the data: Sample (text and a picture's path) -> Encoded (tokens, made once) -> Batch (packed,
with the pictures decoded by the DataLoader's workers) -> LaVIN.forward. The sequence

    [BOS] "Image: " [features] prompt answer [EOS]      or      [BOS] "Image: N/A" prompt answer [EOS]

is spliced here for training and generation alike. Token 0 (LLaMA's <unk>, which no text contains) holds the
place of features, and as a label means "no loss".
"""

import hashlib
import json
import os
import re
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sentencepiece import SentencePieceProcessor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from files import LavinError, read_json, run, tokenizer_path, write_atomically

# Pictures


IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]     # ImageNet's, not CLIP's: LaVIN's choice
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def to_rgb(picture):
    """A PIL picture of any mode -> RGB, upright, alpha laid on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):                                    # 16 bits: convert() would clip at 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def load_pixels(image, resolution):
    """A path or PIL picture -> (3, R, R) fp32, squeezed (not cropped) to R × R by bicubic, normalised."""
    try:
        picture = to_rgb(image if isinstance(image, Image.Image) else Image.open(image))
    except FileNotFoundError as error:
        raise LavinError(f"{image}: no such picture") from error
    except Exception as error:      # Pillow's readers raise anything, from SyntaxError to struct.error
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise LavinError(f"{image}: not a picture that Pillow can read ({reason})") from error
    picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (pixels - IMAGENET_MEAN) / IMAGENET_STD


# Samples, tokens, batches


@dataclass
class Sample:
    prompt: str
    answer: str = ""
    image: str | Path | Image.Image | None = None
    id: str = ""                # named in messages
    history: tuple = ()         # the turns before: ((prompt, answer), …), whose answers carry loss as well


@dataclass
class Encoded:
    tokens: np.ndarray          # (T,) int32; not torch's, of which thousands use up a worker's file descriptors
    labels: np.ndarray          # (T,) int32, the token itself where it belongs to the answer, else 0
    image: str | Path | Image.Image | torch.Tensor | None       # torch's: pixels, as load_pixels makes them
    id: str


@dataclass
class Batch:
    """Samples packed one behind the other, so that no work is done for padding. All that a GPU could tell only by making
    the CPU wait is made here, on the CPU."""
    tokens: torch.Tensor        # (ΣT,) int64
    labels: torch.Tensor        # (ΣT,) int64
    positions: torch.Tensor     # (ΣT,) int64, of each token in its sample
    modality: torch.Tensor      # (ΣT,) int64, of each token's sample: 0 text only, 1 with a picture
    answers: torch.Tensor       # (n_answer,) int64, where labels is not 0
    pictured: torch.Tensor      # (N,) int64, where the samples of modality 1 begin
    pixels: torch.Tensor        # (N, 3, R, R) fp32, theirs, in their order
    lengths: list[int]          # (B)
    ids: list[str]
    n_answer: int               # tokens that carry loss

    def to(self, device):
        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return Batch(**vars(self) | tensors)


def load_tokenizer(llama):
    """LLaMA's sentencepiece model, from LLaMA's folder or its parent."""
    path = tokenizer_path(llama)
    try:
        tokenizer = SentencePieceProcessor(model_file=str(path))
        tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))      # a damaged one may hold what is not text
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise LavinError(f"{path}: not a sentencepiece tokenizer") from error
    if tokenizer.bos_id() < 0 or tokenizer.eos_id() < 0:
        raise LavinError(f"{path}: has no BOS or EOS token; LLaMA's tokenizer.model is meant")
    return tokenizer


def picture_prefix(tokenizer):
    """The tokens between BOS and a picture's features."""
    return tokenizer.encode("Image: ")


def tokenize(sample, tokenizer, max_seq_len):
    """(tokens, labels) of BOS and, for each turn, prompt + answer + EOS, cut to max_seq_len, no picture yet.

    Prompt and answer are tokenized as one string; the answer begins where the prompt alone would end.
    """
    tokens, labels = [tokenizer.bos_id()], [0]
    for prompt, answer in (*sample.history, (sample.prompt, sample.answer)):
        turn = [*tokenizer.encode(prompt + answer), tokenizer.eos_id()]
        n_prompt = len(tokenizer.encode(prompt)) if answer else len(turn) - 1
        tokens += turn
        labels += [0] * min(n_prompt, len(turn)) + turn[n_prompt:]
    return tokens[:max_seq_len], labels[:max_seq_len]


def encode(sample, tokenizer, n_features, max_seq_len, prompt_only=False):
    """A Sample -> Encoded: the sequence of the module's docstring, with 0 where the features go.

    For training it is cut to max_seq_len, the modality token counted, which stands in front of it without
    being in it. With prompt_only, for generation, it ends with the prompt, and a prompt that leaves no
    room for an answer raises LavinError.
    """
    try:
        "".join([*map("".join, sample.history), sample.prompt, sample.answer]).encode()
    except UnicodeEncodeError as error:
        raise LavinError(f"{f'problem {sample.id}' if sample.id else 'the prompt'}: not Unicode text ({error})") from error
    if prompt_only:
        tokens, _ = tokenize(Sample(sample.prompt, history=sample.history), tokenizer, 10**9)
        tokens = tokens[:-1]                                            # no EOS
        labels = [0] * len(tokens)
    else:
        tokens, labels = tokenize(sample, tokenizer, max_seq_len)
    prefix = tokenizer.encode("Image: N/A") if sample.image is None else picture_prefix(tokenizer) + [0] * n_features
    tokens, labels = tokens[:1] + prefix + tokens[1:], labels[:1] + [0] * len(prefix) + labels[1:]
    if prompt_only and len(tokens) > max_seq_len - 2:       # the modality token and one new one
        raise LavinError(f"the prompt has {len(tokens)} tokens, picture counted, but a context of {max_seq_len} "
                         f"has room for {max_seq_len - 2}; shorten it or raise --max-seq-len")
    tokens, labels = (np.array(ids[:max_seq_len - 1], dtype=np.int32) for ids in (tokens, labels))
    return Encoded(tokens, labels, sample.image, sample.id)


MANY = 20_000           # samples: fewer take seconds


def encode_all(samples, tokenizer, n_features, max_seq_len, folder):
    """[Sample] -> [Encoded]. Of many, which takes minutes, the tokens are kept in folder/tokens-KEY.npy and mapped from
    there the next time; KEY is a hash of all that they depend on, so that nothing else is ever taken for them.
    folder None: nothing is written."""
    if len(samples) < MANY or folder is None:
        return [encode(sample, tokenizer, n_features, max_seq_len) for sample in samples]
    key = hashlib.sha256(tokenizer.serialized_model_proto() + f"{n_features} {max_seq_len} 1".encode())     # 1: of this code
    for s in samples:
        key.update(json.dumps([s.prompt, s.answer, s.history, s.image is None]).encode())
    path = Path(folder, f"tokens-{key.hexdigest()[:16]}.npy")
    if not path.exists():
        encoded = [encode(s, tokenizer, n_features, max_seq_len) for s in tqdm(samples, desc="tokenizing", file=sys.stdout)]
        flat = np.concatenate([np.array([len(e.tokens) for e in encoded], dtype=np.int32),
                               *(e.tokens for e in encoded), *(e.labels for e in encoded)])
        del encoded

        def write(temporary):
            with open(temporary, "wb") as file:         # np.save would add .npy to a name
                np.save(file, flat)

        write_atomically(path, write)
    flat = np.load(path, mmap_mode="c").view(np.ndarray)
    lengths, (tokens, labels) = flat[:len(samples)], flat[len(samples):].reshape(2, -1)
    ends = np.cumsum(lengths).tolist()
    return [Encoded(tokens[start:end], labels[start:end], sample.image, sample.id)
            for sample, start, end in zip(samples, [0, *ends], ends)]


def decoded(encoded, resolution):
    """The same with its picture as pixels (3, R, R). LavinError names the sample."""
    if encoded.image is None or isinstance(encoded.image, torch.Tensor):
        return encoded
    try:
        return replace(encoded, image=load_pixels(encoded.image, resolution))
    except LavinError as error:
        raise LavinError(f"problem {encoded.id}: {error}" if encoded.id else str(error)) from error


def collate(encoded, resolution):
    """Encoded samples -> one Batch on the CPU, its pictures decoded."""
    lengths = [len(e.tokens) for e in encoded]
    tokens = torch.from_numpy(np.concatenate([e.tokens for e in encoded])).long()
    labels = torch.from_numpy(np.concatenate([e.labels for e in encoded])).long()
    positions = torch.cat([torch.arange(T) for T in lengths])
    pictures = torch.tensor([e.image is not None for e in encoded])
    starts = (positions == 0).nonzero()[:, 0]
    answers = labels.nonzero()[:, 0]
    pixels = [decoded(e, resolution).image for e in encoded if e.image is not None]
    return Batch(tokens, labels, positions, pictures.long().repeat_interleave(torch.tensor(lengths)), answers, starts[pictures],
                 torch.stack(pixels) if pixels else torch.zeros(0, 3, resolution, resolution),
                 lengths, [e.id for e in encoded], len(answers))


# Batches ahead of the step


def mixed_seed(seed, n):
    """A seed for the n-th draw of a run, of 32 bits: the CPU's generator looks at no more of them."""
    return (seed * 1_000_003 + n) % 2**32


def mixture(sizes, weights, generator):
    """An epoch in which sources of these sizes, one behind the other, have their weights' shares: indices in order.

    A source that comes off short begins again, one that has too much goes on in another epoch's draw.
    """
    ends = [round(sum(sizes) * sum(weights[:i]) / sum(weights)) for i in range(len(weights) + 1)]
    start, chosen = 0, []
    for size, share in zip(sizes, np.diff(ends).tolist()):
        rounds = [start + torch.randperm(size, generator=generator) for _ in range(-(-share // size))]
        chosen.append(torch.cat([*rounds, torch.zeros(0, dtype=torch.int64)])[:share])
        start += size
    chosen = torch.cat(chosen)
    return chosen[torch.randperm(len(chosen), generator=generator)].tolist()


def global_batch(step, lengths, batch_size, micro_batch, seed, sizes=None, weights=None):
    """Which samples step `step` trains on: a list of micro-batches (lists of indices), of about as many tokens each.

    Every epoch is a permutation of its own, or with weights a mixture, drawn from (seed, epoch) alone: the same whatever
    the number of workers or the step at which a run was resumed. The last batch of an epoch may be smaller.
    """
    epoch, place = divmod(step, -(-len(lengths) // batch_size))
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    if weights:
        order = mixture(sizes, weights, generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    chosen = sorted(order[place * batch_size:(place + 1) * batch_size], key=lambda i: -lengths[i])
    n = -(-len(chosen) // micro_batch)
    rounds = [chosen[i:i + n][::(-1) ** (i // n)] for i in range(0, len(chosen), n)]        # dealt to and fro
    return [[dealt[i] for dealt in rounds if i < len(dealt)] for i in range(n)]


class Collated(Dataset):
    """Item i: the batches that plan(i), a list of lists of indices, asks for. Runs in the workers.

    Of several ranks each gets its share, all equally many: who comes off short gets one that has no answer.
    """

    def __init__(self, encoded, plan, resolution, rank=0, n_ranks=1):
        self.encoded, self.plan, self.resolution, self.rank, self.n_ranks = encoded, plan, resolution, rank, n_ranks

    def __getitem__(self, i):
        chosen = [[self.encoded[j] for j in indices] for indices in self.plan(i)]
        first = chosen[0][0]
        idle = Encoded(first.tokens[:2], np.zeros_like(first.labels[:2]), None, "")
        chosen += [[idle]] * (-len(chosen) % self.n_ranks)
        try:
            return [collate(encoded, self.resolution) for encoded in chosen[self.rank::self.n_ranks]]
        except LavinError as error:
            return error                # raised by `ahead`: from here, a traceback of the worker would come along


class Decoded(Dataset):
    """Item i: sample i, its picture decoded. Runs in the workers."""

    def __init__(self, encoded, resolution):
        self.encoded, self.resolution = encoded, resolution

    def __getitem__(self, i):
        try:
            return decoded(self.encoded[i], self.resolution)
        except LavinError as error:
            return error


def _leave_signals_to_the_main_process(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C reaches the whole group, and the step is to be finished
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def ahead(dataset, items, workers, each=2):
    """Yield dataset[i] for i in items, prepared by `workers` processes, `each` ahead of their use (0: in this one)."""
    for item in DataLoader(dataset, batch_size=None, sampler=items, num_workers=workers, prefetch_factor=each if workers else None,
                           worker_init_fn=_leave_signals_to_the_main_process):
        if isinstance(item, LavinError):
            raise item
        yield item


def default_workers():
    return min(8, (os.cpu_count() or 1) // 2)


# ScienceQA


# What is asked and what is answered: Question, Context (hint and caption), Multiple choices, Lecture, Explanation.
ANSWERS = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE")
FORMATS = (*(f"CQM-{answer}" for answer in ANSWERS), *(f"QCM-{answer}" for answer in ANSWERS),
           "QCML-A", "QCME-A", "QCMLE-A", "QCLM-A", "QCEM-A", "QCLEM-A", "QCML-AE")
LETTERS = "ABCDE"
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG")


def check_format(format):
    if format not in FORMATS:
        raise LavinError(f"unknown prompt format {format!r}; valid ones: {', '.join(FORMATS)}")


def sqa_prompt(problem, format="QCM-ALE", caption=""):
    """A ScienceQA problem -> (prompt, answer), to the letter as the reference writes them.

    Its quirks are kept, since the released adapters were trained on them: in "AL" the solution is given and
    in "AE" the lecture, newlines inside both become a literal backslash-n, and an answer without either
    ends in a bare "BECAUSE:".
    """
    check_format(format)
    ask, answer = format.split("-")
    lecture, solution = (problem[field].replace("\n", "\\n") for field in ("lecture", "solution"))
    reasons = {"L": lecture, "E": solution, "LE": f"{lecture} {solution}", "EL": f"{solution} {lecture}", "": ""}
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"]))
    context = f"{problem['hint']} {caption}".strip() or "N/A"
    parts = {
        "Q": f"Question: {problem['question']}\n",
        "C": f"Context: {context}\n",
        "M": f"Options: {options}\n",
    } | {part: f"BECAUSE: {reason}\n" for part, reason in reasons.items()}
    prompt = "".join(parts[part] for part in re.findall("[LE]+|.", ask))
    result = f"The answer is {LETTERS[problem['answer']]}."
    if answer.startswith("A"):
        reason = reasons[{"L": "E", "E": "L"}.get(answer[1:], answer[1:])]
        text = result if answer == "A" else f"{result} BECAUSE: {reason}"
    else:
        text = f"{reasons[answer[:-1]]} {result}"
    return tuple(part.replace("  ", " ").strip() for part in (f"{prompt}Response:", text))


def sqa_answer(text):
    """The index of the choice that a generated text names, or -1 where it names none.

    Of several the last: where the reasoning comes first, the answer comes last.
    """
    named = re.findall(rf"The answer is ([{LETTERS}])(?![A-Za-z])", text)
    return LETTERS.index(named[-1]) if named else -1


SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def _columns(problem):
    """The columns of the table in which a problem counts."""
    grade = int(problem["grade"].removeprefix("grade"))
    context = [name for name, there in (("TXT", problem["hint"]), ("IMG", problem["image"])) if there] or ["NO"]
    return {SUBJECTS[problem["subject"]], "G1-6" if grade <= 6 else "G7-12", "AVG", *context}


def sqa_counts(problems, predictions):
    """{column: (problems answered rightly, problems)} over the problems predicted, {id: index of the choice}."""
    counts = {}
    for column in COLUMNS:
        right = [predictions[pid] == problems[pid]["answer"]
                 for pid in predictions if column in _columns(problems[pid])]
        counts[column] = (sum(right), len(right))
    return counts


def sqa_scores(problems, predictions):
    """{column: percent right}, nan where a column has no problem."""
    return {column: 100 * right / total if total else float("nan")
            for column, (right, total) in sqa_counts(problems, predictions).items()}


def sqa_table(problems, predictions):
    """The nine-column table as text: percent, and how many of how many."""
    counts, scores = sqa_counts(problems, predictions), sqa_scores(problems, predictions)
    percent = [f"{scores[c]:.2f}" if counts[c][1] else "-" for c in COLUMNS]
    rows = [COLUMNS, percent, [f"{right}/{total}" for right, total in counts.values()]]
    return "\n".join("".join(f"{cell:>11}" for cell in row) for row in rows)


def sqa_table_by(field, problems, predictions):
    """A table with a row for each value of a problem's field (skill, topic, …): percent, how many of how many."""
    right = {}
    for pid, index in predictions.items():
        right.setdefault(str(problems[pid].get(field)), []).append(index == problems[pid]["answer"])
    return "\n".join(f"{value:40}{100 * sum(rs) / len(rs):>8.2f}{f'{sum(rs)}/{len(rs)}':>11}"
                     for value, rs in sorted(right.items()))


def _check_problem(pid, problem):
    """What is wrong with a problem of problems.json, or None."""
    texts = ("question", "hint", "lecture", "solution", "split", "subject", "grade")
    if not isinstance(problem, dict):
        return "is not an object"
    for field in (*texts, "choices", "answer", "image"):
        if field not in problem:
            return f"lacks the field {field!r}"
        if field in texts and not isinstance(problem[field], str):
            return f"has a {field!r} that is not text"
    choices, answer = problem["choices"], problem["answer"]
    texts_only = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts_only or not 1 <= len(choices) <= len(LETTERS):
        return f"has choices other than 1 to {len(LETTERS)} texts"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"has the answer {answer!r}, outside its {len(choices)} choices"
    if problem["subject"] not in SUBJECTS or not re.fullmatch(r"grade\d{1,2}", problem["grade"]):
        return f"has the subject {problem['subject']!r} and the grade {problem['grade']!r}, not ScienceQA's"
    if not isinstance(problem["image"], str | None):
        return f"has the image {problem['image']!r}, neither a file name nor null"
    return None


def load_sqa(root, split, format="QCM-ALE", use_captions=False):
    """One split of ScienceQA -> ({id: problem}, [Sample]). Raises LavinError naming file, problem and field."""
    check_format(format)
    root = Path(root)
    problems_path, splits_path, captions_path = root / "problems.json", root / "pid_splits.json", root / "captions.json"
    problems, splits = read_json(problems_path), read_json(splits_path)
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise LavinError(f"{root}: problems.json and pid_splits.json are not objects, as ScienceQA's are")
    for pid, problem in problems.items():
        if wrong := _check_problem(pid, problem):
            raise LavinError(f"{problems_path}: problem {pid} {wrong}")
    for name, pids in splits.items():
        if not isinstance(pids, list):
            raise LavinError(f"{splits_path}: split {name!r} is not a list of ids")
        if unknown := [pid for pid in pids if str(pid) not in problems]:
            raise LavinError(f"{splits_path}: split {name!r} names problem {unknown[0]}, which problems.json lacks")
    if split not in splits:
        raise LavinError(f"{splits_path}: no split {split!r}; it has {', '.join(splits)}")
    captions = read_json(captions_path) if use_captions else {"captions": {}}
    if not isinstance(captions, dict) or not isinstance(captions.get("captions"), dict):
        raise LavinError(f"{captions_path}: not an object with an object \"captions\" in it, as ScienceQA's is")
    chosen, samples = {str(pid): problems[str(pid)] for pid in splits[split]}, []
    for pid, problem in chosen.items():
        image = root / "images" / problem["split"] / pid / problem["image"] if problem["image"] else None
        if image and not image.is_file():
            raise LavinError(f"problem {pid}: {image}: no such picture")
        samples.append(Sample(*sqa_prompt(problem, format, captions["captions"].get(pid, "")), image, pid))
    if not samples:
        raise LavinError(f"{splits_path}: split {split!r} is empty")
    return chosen, samples


if __name__ == "__main__":
    import instructions     # which imports this file, by its name

    run(instructions.main)
