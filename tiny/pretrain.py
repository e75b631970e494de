"""The small world's base models, pre-trained from scratch: a LLaMA and a CLIP.

    python -m tiny.pretrain              train both again, one after the other
    python -m tiny.pretrain clip         train one of them: llama or clip
    python -m tiny.pretrain small-clip   train a smaller CLIP, for bench/ablations.py only
    python -m tiny.pretrain --compile    CLIP with torch.compile, which is faster

LLaMA is trained on text about the world (tiny/corpus.py): facts, and questions about scenes that
are described in words. It never sees a picture. CLIP is trained contrastively on pictures and their
captions, half of them the world's scenes and half from tiny/album.py, with a text tower that is
then dropped. Both are written in the official formats, so the rest of the code does not know where
they come from.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

import data
from adapters import Adapter, AdapterConfig
from data import Sample
from extras.terminal import Parser, run
from fast import ops
from files import read_json, write_atomically
from model import LLaMA, LLaMAConfig
from tiny import album
from tiny.corpus import CURRICULUM, document, train_tokenizer
from tiny.world import (
    OTHER_SKILLS, PATHS, PICTURE_SKILLS, ROOT, SMALL_VIT, TEXT_SKILLS, VERSION, Item, make_folder,
    problem, render, things)
from vit import LayerNorm, ViTConfig, VisionTransformer

MODELS = ("llama", "clip")
SMALL_CLIP = "small-clip"
LLAMA_STEPS = 5000
CLIP_STEPS = 10000


# What both models share


def initialise(module: nn.Module) -> None:
    """Random initial weights. The adapters stay the identity and are not trained."""
    for name, p in module.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif name.endswith("weight"):       # of a norm
            nn.init.ones_(p)
        else:
            nn.init.zeros_(p)
    for child in module.modules():
        if isinstance(child, Adapter):
            child.reset_parameters()
            child.requires_grad_(False)


def idle_routing(llama: LLaMA, n: int) -> torch.Tensor:
    """Routing weights of n samples, (L, n, 1, 2), for adapters that do nothing."""
    return torch.full((len(llama.layers), n, 1, 2), 0.5)


def pretrained(module: nn.Module) -> dict[str, torch.Tensor]:
    """{name: fp16 tensor} of the parameters that were trained."""
    return {name: p.detach().half() for name, p in module.named_parameters() if p.requires_grad}


def make_optimizer(module: nn.Module, beta2: float) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, betas=(0.9, beta2), weight_decay=0.1)


def update(module, optimizer, loss, done: float, lr: float) -> None:
    """One optimizer step. done: the fraction of all steps that came before it, 0 to 1.

    The learning rate rises to lr over the first twentieth of the steps. Then it follows half a
    cosine down to a twentieth of lr.
    """
    warmup = done * 20
    cosine = 0.05 + 0.475 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = lr * min(warmup, cosine)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# LLaMA


TINY_PARAMS = {
    "dim": 128,
    "n_layers": 5,
    "n_heads": 4,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "vocab_size": -1,           # -1 is the tokenizer's size, as in Meta's files
}
NOTHING = slice(0, 0)


@dataclass
class EncodedDocument:
    """A document as tokens."""
    tokens: list[int]
    labels: list[int]           # the token itself if it belongs to the answer, else IGNORED
    description: slice          # of tokens: the words in the picture's place


def encode_document(words: str | None, sample: Sample,
                    tokenizer: SentencePieceProcessor) -> EncodedDocument:
    """The sequence that data.encode makes of a sample, with words where a picture's features go."""
    tokens, labels = data.tokenize(sample, tokenizer)
    if words is None:
        prefix = tokenizer.encode("Image: N/A")
        description = NOTHING
    else:
        prefix = data.picture_prefix(tokenizer) + tokenizer.encode(words)
        description = slice(1 + len(data.picture_prefix(tokenizer)), 1 + len(prefix))
    tokens = tokens[:1] + prefix + tokens[1:]                       # after BOS
    labels = labels[:1] + [data.IGNORED] * len(prefix) + labels[1:]
    return EncodedDocument(tokens, labels, description)


def blur(words: str | None, rng: Random) -> bool:
    """Blur this description? If so, the vector of each of its words is replaced by their mean.

    LLaMA then has to read the whole description from every vector, much as it reads a picture from
    a few features. Bar charts and flags are left out: there it matters which word belongs to
    which, and a mean loses that.
    """
    if words is None or "tall " in words or "top " in words:
        return False
    return rng.random() < 0.5


def text_batches(steps: int, tokenizer, seed: int,
                 batch_size: int) -> Iterator[list[EncodedDocument]]:
    """Yield the documents of every step. Only those that are to be blurred keep a description."""
    rng = Random(f"{seed} corpus")
    blur_rng = Random(f"{seed} blur")
    batches = []
    for step in range(steps):
        if not batches:
            # Sort the rows of four batches by length before cutting them up: less padding.
            stage = next(stage for stage in CURRICULUM if step < stage.end)
            rows = []
            for _ in range(4 * batch_size):
                words, sample = document(rng, stage)
                row = encode_document(words, sample, tokenizer)
                if not blur(words, blur_rng):
                    row.description = NOTHING
                rows.append(row)
            rows.sort(key=lambda row: len(row.tokens))
            batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
            batches = rng.sample(batches, 4)
        yield batches.pop()


def pad(sequences, value=0):
    """Lists of token ids -> (N, T) int64, padded with `value` at the end."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def letter_loss(llama: LLaMA, rows: list[EncodedDocument],
                tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Blur the descriptions of the rows -> (loss; for each letter, whether it is predicted).

    The loss is a weighted cross-entropy. The weights are 0.1 for a token of the question, 1 for a
    token of the answer, and 8 for a letter in the answer.
    """
    tokens = pad([row.tokens for row in rows])                      # (N, T)
    labels = pad([row.labels for row in rows], data.IGNORED)
    x = llama.tok_embeddings(tokens[:, :-1])                        # (N, T - 1, C)
    for i, row in enumerate(rows):
        if row.description != NOTHING:
            x[i, row.description] = x[i, row.description].mean(0)
    logits = llama.output(llama(x, idle_routing(llama, len(rows))))

    targets = tokens[:, 1:]
    labels = labels[:, 1:]
    letters = torch.isin(labels, torch.tensor(tokenizer.encode("A B C D")))
    # Token 0 is padding.
    weight = 0.1 * (targets != 0) + 0.9 * (labels != data.IGNORED) + 7 * letters
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = losses @ weight.flatten() / weight.sum()
    is_right = logits.argmax(-1) == targets
    return loss, is_right[letters]


@torch.no_grad()
def letter_scores(llama: LLaMA, tokenizer, n: int) -> dict[str, float]:
    """{skill: percent of new questions whose right letter is the likeliest token}.

    Scenes are described. n: questions for each entry of PICTURE_SKILLS and TEXT_SKILLS, on average.
    """
    rng = Random("letter scores")
    skills = PICTURE_SKILLS + TEXT_SKILLS
    rows = {}
    for _ in range(n * len(skills)):
        skill = rng.choice(skills)
        item = skill(rng)
        prompt, answer = data.sqa_prompt(problem(item, rng, "corpus"), "QCM-A")
        row = encode_document(item.caption or None, Sample(prompt, answer), tokenizer)
        row.description = NOTHING       # words, not blurred
        rows.setdefault(item.skill, []).append(row)
    scores = {}
    for name, rows_of_skill in sorted(rows.items()):
        _, is_right = letter_loss(llama, rows_of_skill, tokenizer)
        scores[name] = percent(is_right)
    return scores


def percent(is_right):
    """Bools (N,) -> the percentage of True, to one decimal."""
    return round(100 * is_right.float().mean().item(), 1)


def new_llama(vocab_size: int) -> LLaMA:
    """A LLaMA with random weights that make it easier to learn to find a word again."""
    config = LLaMAConfig(**TINY_PARAMS | {"vocab_size": vocab_size})
    llama = LLaMA(config, AdapterConfig())
    llama.tok_embeddings.weight.requires_grad_(True)
    initialise(llama)
    # To choose a letter, LLaMA has to find a word again and see what stands beside it. The mean
    # that all embeddings share lets attention go by position alone. Equal wq and wk let it find
    # equal words. Without these two, LLaMA did not learn this in 600 steps.
    nn.init.normal_(llama.tok_embeddings.weight, mean=0.5, std=0.5)
    for layer in llama.layers:
        layer.attention.wk.weight.data.copy_(layer.attention.wq.weight)
    return llama


def pretrain_llama(folder: Path, steps: int, seed: int = 0, batch_size: int = 32, lr: float = 1e-3,
                   n_scored: int = 100) -> dict[str, float]:
    """Pre-train a LLaMA, and make its folder in Meta's layout -> its letter_scores."""
    torch.manual_seed(seed)
    tokenizer_model = train_tokenizer(seed)
    tokenizer = SentencePieceProcessor(model_proto=tokenizer_model)
    llama = new_llama(tokenizer.vocab_size())
    optimizer = make_optimizer(llama, beta2=0.95)
    batches = text_batches(steps, tokenizer, seed, batch_size)
    right = 0.0                 # a moving average over about fifty steps
    bar = tqdm(batches, total=steps, desc="LLaMA", file=sys.stdout)
    for step, rows in enumerate(bar):
        loss, is_right = letter_loss(llama, rows, tokenizer)
        update(llama, optimizer, loss, step / steps, lr)
        right += 0.02 * (is_right.float().mean().item() - right)
        status = f"loss {loss.item():.3f} letters {100 * right:.1f} %"
        bar.set_postfix_str(status, refresh=False)

    def write(temporary):
        (temporary / "tokenizer.model").write_bytes(tokenizer_model)
        torch.save(pretrained(llama), temporary / "consolidated.00.pth")
        params = TINY_PARAMS | {"version": VERSION}
        (temporary / "params.json").write_text(json.dumps(params))

    make_folder(folder, write)
    return letter_scores(llama, tokenizer, n_scored)


# CLIP


CLIP_CONFIG = ViTConfig(width=64, layers=12, patch=8, resolution=64)
# As ViT-B/16 is to ViT-L/14: fewer blocks, so fewer features, and coarser patches.
SMALL_CLIP_CONFIG = ViTConfig(width=64, layers=8, patch=16, resolution=64)


class Towers(nn.Module):
    """CLIP: an image encoder, and a small LLaMA for captions. Both map into a common space."""

    def __init__(self, config: ViTConfig, vocab_size: int, common: int = 64):
        super().__init__()
        self.visual = VisionTransformer(config, AdapterConfig())
        self.ln_post = LayerNorm(config.width)
        self.proj = nn.Parameter(torch.empty(config.width, common))
        text_config = LLaMAConfig(
            dim=common, n_layers=2, n_heads=2, vocab_size=vocab_size, multiple_of=32)
        self.text = LLaMA(text_config, AdapterConfig())
        self.text.tok_embeddings.weight.requires_grad_(True)
        self.text.output.requires_grad_(False)          # only its hidden state is used
        initialise(self)
        # As large as a patch's own embedding. Otherwise CLIP learns positions much later.
        nn.init.normal_(self.visual.positional_embedding)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pixels, captions, lengths):
        """How well N pictures and M captions match -> scores (F, N, M).

        pixels (N, 3, R, R); captions (M, T) of `lengths` tokens (M,). Each of the F features
        that LaVIN takes has its own scores. The original CLIP uses only the last feature.
        """
        features = self.visual(pixels).transpose(0, 1)                      # (F, N, V)
        images = F.normalize(self.ln_post(features) @ self.proj, dim=-1)    # (F, N, common)
        x = self.text.tok_embeddings(captions)                              # (M, T, common)
        x = self.text(x, idle_routing(self.text, len(captions)))
        last = x[torch.arange(len(x)), lengths - 1]                         # (M, common)
        texts = F.normalize(last, dim=-1)
        scale = self.log_scale.exp().clamp(max=100)
        return images @ texts.T * scale


def shrink(picture: Image.Image) -> np.ndarray:
    """A picture as CLIP sees it: pixels (R, R, 3) uint8."""
    side = CLIP_CONFIG.resolution
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


def picture_of(item: Item, rng: Random) -> tuple[np.ndarray, str]:
    """The item's scene, drawn flat, as CLIP sees it, and its caption."""
    return shrink(render(item, rng)), item.caption


def similar_things(n: int, rng: Random) -> list[Item]:
    """n Items of things that differ in shape and in one more property: colour, number or place.

    None shows a pair that is kept for the test split.
    """
    first = things(rng)
    same = rng.sample([1, 2, 3], 2)         # of a scene: shape, colour, number, position
    items = [first]
    while len(items) < n:
        item = things(rng)
        if all(item.scene[i] == first.scene[i] for i in same):
            items.append(item)
    return items


def random_batch(n: int, rng: Random) -> list[tuple[np.ndarray, str]]:
    """n pictures with their captions, in four groups. Within a group they are hard to tell apart.

    One group shows things, which stand for four skills. One shows another skill of the world. Two
    are from the album.
    """
    size = n // 4
    batch = []
    for item in similar_things(size, rng):
        batch.append(picture_of(item, rng))
    skill = rng.choice(OTHER_SKILLS)
    for _ in range(size):
        batch.append(picture_of(skill(rng), rng))
    for picture, caption in album.group(size, rng) + album.group(size, rng):
        batch.append((shrink(picture), caption))
    return batch


def clip_batch(scenes: list, tokenizer):
    """N scenes, [(pixels, caption)], with M different captions -> the inputs of Towers, and match.

    Pixels (N, 3, R, R), normalised; captions (M, T); lengths (M,); and match (N,), the index of
    each picture's caption.
    """
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in scenes]))   # (N, R, R, 3)
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - data.IMAGENET_MEAN) / data.IMAGENET_STD
    different = sorted({caption for _, caption in scenes})
    tokens = [tokenizer.encode(caption) for caption in different]
    lengths = torch.tensor([len(t) for t in tokens])
    match = torch.tensor([different.index(caption) for _, caption in scenes])
    return pixels, pad(tokens), lengths, match


def contrastive_loss(scores: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """CLIP's loss for scores (F, N, M), where picture i has the caption match[i].

    Several pictures may share a caption. The caption then has to match all of them.
    """
    positives = F.one_hot(match, scores.shape[-1]).float()                  # (N, M)
    log_p_caption = scores.log_softmax(2)
    log_p_picture = scores.log_softmax(1)
    of_pictures = -(log_p_caption * positives).sum(2).mean()
    of_captions = -(log_p_picture * positives / positives.sum(0)).sum(1).mean()
    return (of_pictures + of_captions) / 2


def best_is_right(scores, match):
    """Does the last feature of each picture match its own caption best? -> bools (N,)."""
    return scores[-1].argmax(1) == match


def new_things(rng: Random) -> Item:
    return things(rng, new=True)


@torch.no_grad()
def caption_scores(towers: Towers, tokenizer, n: int) -> dict[str, float]:
    """{skill: percent of new pictures whose own caption scores best among all of that skill's}.

    n: pictures of each skill.
    """
    rng = Random("caption scores")
    skills = {skill.__name__: skill for skill in OTHER_SKILLS}
    skills |= {"things": things, "new combinations": new_things}
    scores = {}
    for name, skill in skills.items():
        scenes = [picture_of(skill(rng), rng) for _ in range(n)]
        pixels, captions, lengths, match = clip_batch(scenes, tokenizer)
        is_right = best_is_right(towers(pixels, captions, lengths), match)
        scores[name] = percent(is_right)
    return scores


def official_clip(towers: Towers) -> dict[str, torch.Tensor]:
    """The image encoder with the names of OpenAI's archive. The text tower is left out."""
    state = {}
    for name, tensor in pretrained(towers).items():
        if name.startswith(("visual.", "ln_post.", "proj")):
            name = name.removeprefix("visual.")
            name = name.replace("resblocks.", "transformer.resblocks.")
            state[f"visual.{name}"] = tensor
    return state


def pretrain_clip(path: Path, steps: int, config: ViTConfig = CLIP_CONFIG, seed: int = 0,
                  batch_size: int = 96, lr: float = 1e-3, n_scored: int = 200,
                  compiled: bool = False) -> dict[str, float]:
    """Write CLIP's image encoder to the path -> its caption_scores, "new combinations" included."""
    ops.keep_freed_memory()
    torch.manual_seed(seed)
    rng = Random(f"{seed} album")
    tokenizer = SentencePieceProcessor(model_proto=train_tokenizer(seed))
    towers = Towers(config, tokenizer.vocab_size())
    if compiled:
        towers.visual.compile()
    optimizer = make_optimizer(towers, beta2=0.98)
    right = 0.0                 # a moving average over about fifty steps
    bar = tqdm(range(steps), desc="CLIP", file=sys.stdout)
    for step in bar:
        batch = random_batch(batch_size, rng)
        pixels, captions, lengths, match = clip_batch(batch, tokenizer)
        scores = towers(pixels, captions, lengths)
        loss = contrastive_loss(scores, match)
        update(towers, optimizer, loss, step / steps, lr)
        right += 0.02 * (best_is_right(scores, match).float().mean().item() - right)
        status = f"loss {loss.item():.3f} captions {100 * right:.1f} %"
        bar.set_postfix_str(status, refresh=False)
    write_atomically(path, lambda temporary: torch.save(official_clip(towers), temporary))
    return caption_scores(towers, tokenizer, n_scored)


def save_score(model: str, score: dict[str, float]) -> None:
    """Keep a model's score in scores.json, beside those of the other models, and print it."""
    path = ROOT / "scores.json"
    scores = read_json(path) if path.exists() else {}
    scores[model] = score
    text = json.dumps(scores, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"{model}: {json.dumps(score)}")


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)} or {SMALL_CLIP}")
    parser.add_argument("--compile", action="store_true", help="torch.compile for CLIP")
    args = parser.parse_args()
    models = args.models or MODELS
    for model in models:
        if model not in (*MODELS, SMALL_CLIP):
            parser.error(f"{model}: the models are {', '.join(MODELS)} and {SMALL_CLIP}")
    if "llama" in models:
        save_score("llama", pretrain_llama(PATHS["llama"], LLAMA_STEPS))
    if "clip" in models:
        save_score("clip", pretrain_clip(PATHS["vit"], CLIP_STEPS, compiled=args.compile))
    if SMALL_CLIP in models:
        score = pretrain_clip(SMALL_VIT, CLIP_STEPS, SMALL_CLIP_CONFIG, compiled=args.compile)
        save_score(SMALL_CLIP, score)


if __name__ == "__main__":
    run(main)
