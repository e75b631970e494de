"""Answering as the authors' code does it, and as we do, with the same weights on a CPU.

    git clone https://github.com/luogen1996/LaVIN authors
    python -m bench.reference authors [--dtype bf16] [--text]

48 prompts with the lengths of ScienceQA's get 32 new tokens each. Half of them have a picture;
with --text, none has one. The model is bench/speed.py's "mid", with random weights. The authors'
code takes all 48 prompts as one batch. We answer the text first and then the pictures, with folded
adapters, as `generate.py --data` does. Both take turns, and the medians count. Reading pictures
from files is not part of it.

The authors' code is written for one GPU. To run it on a CPU, this script replaces a few things
around it: fairscale's parallel layers by nn.Linear, CLIP's file by random weights, autocast for
CUDA by autocast for the CPU, and .cuda() by nothing. With bf16, .half() gives bf16 as well, because
a CPU is slow in fp16. fairscale and timm need not be installed.
"""

import argparse
import functools
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn as nn

import data
from bench.speed import PROBLEMS, build, make_prompt
from checkpoints import to_official
from extras.estimate import MODEL_SHAPES
from extras.evaluate import by_modality
from extras.terminal import Parser, run
from extras.values import Kind
from fast.engine import continue_prompts
from fast.fold import fold
from files import DTYPES, LavinError
from model import LaVIN

NEW_TOKENS = 32
# The first tokens of every prompt: BOS, then "Image: " or "Image: N/A".
PREFIXES = {True: [1, 11, 12, 13], False: [1, 11, 12, 13, 14, 15]}


# The authors' code


def stand_in(name: str, **content) -> types.ModuleType:
    """A module that `import name` will find."""
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def import_authors(folder: Path, dtype: torch.dtype):
    """Return their modules lavin.eval_model, lavin.mm_adapter, lavin.generator and clip.model."""
    def linear(n_in, n_out, bias=False, **_):
        return nn.Linear(n_in, n_out, bias=bias)

    def embedding(n, width, **_):
        return nn.Embedding(n, width)

    initialize = "fairscale.nn.model_parallel.initialize"
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel"):
        stand_in(name)
    sys.modules["fairscale.nn.model_parallel"].initialize = stand_in(
        initialize, get_model_parallel_world_size=lambda: 1)
    stand_in("fairscale.nn.model_parallel.layers", ParallelEmbedding=embedding,
             RowParallelLinear=linear, ColumnParallelLinear=linear)
    for name in ("timm", "timm.models"):
        stand_in(name)
    stand_in("timm.models.layers", DropPath=nn.Identity)
    # As packages without their __init__.py, which imports what a forward pass does not need.
    stand_in("clip", __path__=[str(folder / "clip")])
    stand_in("lavin", __path__=[str(folder / "lavin")])

    torch.Tensor.cuda = lambda self, *_: self
    nn.Module.cuda = lambda self, *_: self
    torch.cuda.amp.autocast = functools.partial(
        torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    if dtype == torch.bfloat16:
        torch.Tensor.half = torch.Tensor.bfloat16
    sys.path.insert(0, str(folder))
    import clip.model
    import lavin.eval_model
    import lavin.generator
    import lavin.mm_adapter
    return lavin.eval_model, lavin.mm_adapter, lavin.generator, clip.model


def build_authors(folder: Path, ours: LaVIN):
    """Return their LaVIN_Generator, with our weights."""
    dtype = ours.llama.norm.weight.dtype
    eval_model, mm_adapter, generator, clip_model = import_authors(folder, dtype)
    vit = MODEL_SHAPES["mid"].vit

    def load_clip(_):
        text_tower = (77, 100, 64, 1, 1)            # small, and deleted below
        return (clip_model.CLIP(
            vit.width, vit.resolution, vit.layers, vit.width, vit.patch, *text_tower),)

    # In their code, the ViT is always 1,024 wide.
    router = mm_adapter.RepAdapter_Router
    projector = eval_model.AdapterMLP
    mm_adapter.RepAdapter_Router = lambda _, **more: router(vit.width, **more)
    eval_model.AdapterMLP = lambda _, *sizes: projector(vit.width, *sizes)
    sys.modules["clip"].load = load_clip

    config = ours.llama.config
    theirs = eval_model.Transformer(eval_model.ModelArgs(
        dim=config.dim, n_layers=config.n_layers, n_heads=config.n_heads,
        vocab_size=config.vocab_size, multiple_of=config.multiple_of, norm_eps=config.norm_eps,
        max_batch_size=len(PROBLEMS), max_seq_len=ours.max_seq_len))
    del theirs.backbone.transformer
    mm_adapter.set_MMAdapter(theirs, "attn")
    mm_adapter.set_Clip_Adapter(theirs.backbone.visual, "router")

    weights = to_official(ours)
    for name, tensor in ours.llama.state_dict().items():
        if ".adapter." not in name:
            weights[name] = tensor
    for name, tensor in ours.vit.state_dict().items():
        if ".adapter." not in name:
            name = name.replace("resblocks.", "transformer.resblocks.")
            weights[f"backbone.visual.{name}"] = tensor
    theirs.to(dtype)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):        # CLIP's norms compute in fp32
            module.float()
    state = theirs.state_dict()
    for name, tensor in weights.items():
        state[name].copy_(tensor.view_as(state[name]))
    return generator.LaVIN_Generator(theirs, AuthorsTokenizer())


class AuthorsTokenizer:
    """Prompts are lists of tokens already. Only the prefixes are text."""
    eos_id = -1                 # no answer ends early

    def encode(self, text, bos, eos):
        if isinstance(text, str):
            return PREFIXES[text == "Image: "]
        return text

    def decode(self, tokens):
        return tokens


# Prompts and answers


def make_prompts(lavin: LaVIN, with_pictures: bool) -> list[data.Encoded]:
    """PROBLEMS as prompts. with_pictures: every second one has a picture."""
    prompts = []
    for i, (n_tokens, _, _) in enumerate(PROBLEMS):
        has_picture = with_pictures and i % 2 == 1
        prefix = PREFIXES[has_picture]
        length = len(prefix) + lavin.n_features * has_picture + n_tokens
        prompt = make_prompt(lavin, length, has_picture)
        prompt.id = str(i)
        prompt.tokens[:len(prefix)] = prefix
        if has_picture:
            prompt.image = torch.randn(3, lavin.resolution, lavin.resolution)
        prompts.append(prompt)
    return prompts


def answer_as_authors(generator, prompts: list[data.Encoded], n_features: int) -> list[list[int]]:
    """All prompts in one batch, padded on the right -> the new tokens of each."""
    texts = []
    images = []
    indicators = []
    for prompt in prompts:
        has_picture = prompt.image is not None
        start = len(PREFIXES[has_picture]) + n_features * has_picture
        texts.append(prompt.tokens[start:].tolist())
        images.append(prompt.image if has_picture else torch.zeros(3, 224, 224))
        indicators.append(int(has_picture))
    rows = generator.generate(texts, torch.stack(images), indicators, NEW_TOKENS,
                              n_feats=n_features, temperature=0.0)
    return [row[len(prompt.tokens):][:NEW_TOKENS] for row, prompt in zip(rows, prompts)]


def answer_as_we_do(folded: list[LaVIN], prompts: list[data.Encoded]) -> list[list[int]]:
    """Longest prompts first, one modality after the other -> the new tokens of each."""
    answers = {}
    for lavin, waiting in zip(folded, by_modality(prompts)):
        if waiting:
            for number, ids in continue_prompts(lavin, waiting, len(waiting), NEW_TOKENS):
                answers[waiting[number].id] = ids
    return [answers[prompt.id] for prompt in prompts]


def seconds_of(function, *inputs) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    answers = function(*inputs)
    return time.perf_counter() - began, answers


@torch.no_grad()
def main() -> None:
    """Print tokens per second of both."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("authors", type=Path, metavar="FOLDER", help="their repository")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--text", action="store_true", help="prompts without pictures")
    parser.add_argument("--turns", type=Kind(int, low=1, high=1000).parse, default=5)
    args = parser.parse_args()
    if not (args.authors / "lavin" / "eval_model.py").is_file():
        raise LavinError(f"{args.authors}: not a copy of https://github.com/luogen1996/LaVIN, "
                         "there is no lavin/eval_model.py")
    torch.manual_seed(0)
    lavin = build("mid", torch.device("cpu"), DTYPES[args.dtype], bits=16).eval()
    for module in lavin.trained_modules():          # so that the adapters are not the identity
        for p in module.parameters():
            nn.init.normal_(p, std=0.02)
    generator = build_authors(args.authors, lavin)
    folded = [fold(lavin, 0), fold(lavin, 1)]
    prompts = make_prompts(lavin, with_pictures=not args.text)

    their_seconds = []
    our_seconds = []
    for _ in range(args.turns):
        seconds, their_answers = seconds_of(
            answer_as_authors, generator, prompts, lavin.n_features)
        their_seconds.append(seconds)
        seconds, our_answers = seconds_of(answer_as_we_do, folded, prompts)
        our_seconds.append(seconds)
    n_tokens = NEW_TOKENS * len(prompts)
    assert n_tokens == sum(len(ids) for ids in our_answers)
    same = sum(their_ids == our_ids for their_ids, our_ids in zip(their_answers, our_answers))
    theirs = statistics.median(their_seconds)
    ours = statistics.median(our_seconds)
    print(f"{args.dtype}, {len(prompts)} prompts, {NEW_TOKENS} new tokens each: "
          f"the authors {n_tokens / theirs:.0f} tokens/s, we {n_tokens / ours:.0f}, "
          f"{theirs / ours:.2f} × as fast; {same} answers equal")


if __name__ == "__main__":
    run(main)
