"""Every flag of train.py and generate.py, and which of them go together.

extras/values.py holds the type and the range of each flag's value.
"""

import argparse
import functools
import os

from data import default_workers
from extras.instructions import KINDS, is_rows
from extras.terminal import Parser
from extras.values import HELD_OUT_ROWS, QUESTION, SETTINGS, SQA_FIELDS
from fast import ranks
from files import LavinError

DTYPE_HELP = ("dtype of the frozen weights (default: auto, which is bf16 on an NVIDIA GPU, fp16 on "
              "one too old for bf16, and fp32 on a CPU or Apple's GPU)")
WORKERS_HELP = "processes that decode pictures (default: half the number of cores, at most 8)"


def add_flag(group, kinds: dict, flag: str, **more) -> None:
    """group.add_argument, with the type of the flag's value from `kinds`."""
    kind = kinds[flag.removeprefix("--").replace("-", "_")]
    if kind.choices:
        shown = ",".join(str(choice) for choice in kind.choices)
        more = {"metavar": f"{{{shown}}}"} | more
    group.add_argument(flag, type=kind.parse, **more)


# train.py


def train_parser(description: str) -> argparse.ArgumentParser:
    """No flag has a default here. The defaults are in train.Settings."""
    parser = Parser(description=description)
    add_source_flags(parser.add_argument_group("data and weights"))
    add_training_flags(parser.add_argument_group("training"))
    add_speed_flags(parser.add_argument_group("speed and memory"))
    return parser


def add_source_flags(group) -> None:
    kinds = ", ".join(f"{kind}:FILE" for kind in KINDS)
    add = functools.partial(add_flag, group, SETTINGS)
    switch = group.add_argument
    add("--data", nargs="+", metavar="SOURCE",
        help=f"sqa: ScienceQA (default); {kinds}; FILE:IMAGES names the folder of the pictures")
    add("--weights", nargs="+", metavar="W", help="each source's share of an epoch (default: "
        "every source contributes all of its samples)")
    switch("--multi-turn", action="store_true", help="train on each conversation as one "
           "sample, not as one sample per answer")
    switch("--skip-bad", action="store_true", help="leave out rows that cannot be used")
    add("--val-fraction", help="fraction of each source to hold out. After each epoch, train.py "
        "reports the loss of these rows, and how many of the first --eval-limit of them are "
        "answered exactly (ScienceQA: with the right letter). Default: 0")
    add("--data-root", help="ScienceQA's directory (default: data/scienceqa)")
    add("--format", metavar="FORMAT", help="format of ScienceQA's samples: parts of the prompt - "
        "parts of the answer (default: QCM-ALE)")
    switch("--captions", action="store_true", help="add the captions of captions.json to the "
           "context")
    switch("--no-images", dest="images", action="store_false",
           help="leave out the pictures in training and scoring; captions stay")
    add("--max-seq-len", help="context in tokens (default: 512)")
    add("--llama", help="LLaMA's directory, or a .gguf file (default: weights/7B)")
    add("--vit", help="CLIP's image encoder (default: weights/ViT-L-14.pt)")
    add("--delta", help="Hugging Face folder of weights to add to LLaMA's, such as Vicuna's deltas")
    switch("--delta-unpermuted", action="store_true", help="add the delta without permuting its "
           "rows to LLaMA's order, as the authors' code did for their Vicuna adapters")
    add("--adapter", help="LaVIN checkpoint to start from (default: adapters that do nothing)")
    add("--out", help="directory for checkpoint.pth and metrics.jsonl (default: out)")


def add_training_flags(group) -> None:
    add = functools.partial(add_flag, group, SETTINGS)
    switch = group.add_argument
    add("--epochs", help="passes over the data (default: 20, or 15 without ScienceQA)")
    add("--warmup", help="warm-up in epochs, at most a tenth of the run (default: 2, or 0.2 "
        "without ScienceQA)")
    add("--batch-size", help="samples per optimizer step (default: 32)")
    add("--micro-batch", help="samples per forward pass (default: 4)")
    add("--lr", help="peak learning rate (default: 9e-3 · batch size / 256)")
    add("--tau", help="temperature of the routers: 10 for 7B (default), 5 for 13B")
    add("--dropout", help="dropout in the adapters (default: 0.1)")
    add("--weight-decay", help="weight decay for matrices; biases have none (default: 0.02)")
    add("--clip", help="maximum norm of the gradient (default: no clipping)")
    add("--rank", help="rank of the adapters, an even number (default: 8)")
    add("--scale", help="scale of the adapters (default: 1)")
    add("--hidden", help="size of the projector's hidden layer (default: 128)")
    add("--experts", help="experts per adapter; 1: a plain adapter without a router (default: 2)")
    add("--seed", help="random seed (default: 0)")
    add("--adapters",
        help="which adapters to train. llama: not those in the ViT; none: not those in LLaMA "
        "either, so only the projector is trained (default: all)")
    switch("--no-routing", dest="routing", action="store_false",
           help="give each expert a fixed weight of one half")
    switch("--resume", action="store_true", help="continue from OUT/checkpoint.pth")
    add("--max-steps", help="stop after this many steps; --epochs still sets the schedule")
    add("--save-every", help="also save after every this many steps (default: only after "
        "each epoch)")
    switch("--keep-epochs", action="store_true", help="keep the checkpoint of every epoch as "
           "OUT/checkpoint-N.pth; N counts from 0, as in the authors' files")
    switch("--tensorboard", action="store_true", help="also write the numbers of metrics.jsonl "
           "to OUT/tensorboard; needs pip install tensorboard")
    add("--eval-limit", help="how many problems of val to score at the end (default: all), and how "
        "many rows of each held-out part to answer after each epoch (default: "
        f"{HELD_OUT_ROWS}; none with --fsdp)")
    switch("--check", action="store_true", help="read all data, print what it looks like and "
           "what is wrong with it, and train nothing")
    switch("--dry-run", action="store_true", help="try the longest batch, print memory and hours, "
           "and train nothing; with --device cuda but no GPU, it computes the memory instead, "
           "and with --tflops the hours")
    add("--tflops", help="with --dry-run: a GPU's bf16 TFLOP/s (data sheet), to estimate hours")


def add_speed_flags(group) -> None:
    add = functools.partial(add_flag, group, SETTINGS)
    switch = group.add_argument
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: a GPU if there is one)")
    add("--dtype", help=DTYPE_HELP)
    switch("--compile", action=argparse.BooleanOptionalAction,
           help="compile the blocks (default: on an NVIDIA GPU)")
    switch("--checkpointing", action="store_true", help="recompute activations, to save memory")
    add("--bits", help="8 or 4: quantize LLaMA's matrices (default: 16, which does not)")
    switch("--fsdp", action="store_true", help="under torchrun: shard LLaMA's matrices over the "
           "GPUs")
    add("--workers", help=WORKERS_HELP)


def check_settings(settings) -> None:
    """Raises LavinError for settings that do not go together."""
    if len(set(settings.data)) < len(settings.data):
        raise LavinError("--data names a source twice; use --weights to give it a larger share")
    if settings.weights and len(settings.weights) != len(settings.data):
        raise LavinError("--weights: give one number above 0 for each source of --data")
    if settings.tflops and not settings.dry_run:
        raise LavinError("--tflops goes with --dry-run")
    if settings.rank % 2:
        raise LavinError("--rank must be even: each expert has two groups")
    if settings.adapters == "none" and not settings.images:
        raise LavinError("--adapters none with --no-images trains nothing; leave one of them out")
    check_delta(settings.delta, settings.delta_unpermuted)
    if settings.fsdp and (settings.bits < 16 or "RANK" not in os.environ):
        raise LavinError("--fsdp goes with torchrun (torchrun --nproc-per-node 8 train.py …) "
                         "and with --bits 16")


def check_delta(delta: str | None, unpermuted: bool) -> None:
    """Raises LavinError for --delta-unpermuted without a --delta, from a flag or the checkpoint."""
    if unpermuted and not delta:
        raise LavinError("--delta-unpermuted goes with --delta DIR, the folder of the deltas")


# generate.py

def generate_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(description=description)
    add_mode_flags(parser.add_argument_group("what to do"))
    add_data_flags(parser.add_argument_group("data sets"))
    add_model_flags(parser.add_argument_group("model"))
    add_sampling_flags(parser.add_argument_group("how to answer"))
    return parser


def add_mode_flags(group) -> None:
    add = functools.partial(add_flag, group, QUESTION)
    switch = group.add_argument
    add("--prompt", help='a question; it becomes "Instruction: … Response:" unless it contains '
        '"Response:"')
    add("--image", help="the picture for the prompt or the conversation")
    switch("--chat", action="store_true", help="have a conversation in the terminal")
    add("--serve", nargs="?", const=8000, metavar="PORT",
        help="serve a web page for conversations (default: port 8000; 0: any free port)")
    add("--host", default="127.0.0.1",
        help="address of the page (default: 127.0.0.1, this machine only)")
    kinds = ", ".join(f"{kind}:FILE" for kind in KINDS)
    add("--data", metavar="SOURCE", help=f"answer a data set: sqa; {kinds}; mme:FOLDER; or, "
        "with --prompt, caption:FILE[:IMAGES], the images listed in COCO's annotations. "
        "FILE:IMAGES names the folder of the pictures. Of a conversation, only the first "
        "question is answered")
    add("--show-routing", nargs="?", const="out/routing.png", metavar="FILE",
        help="print and draw how each layer mixes its experts (default: out/routing.png)")


def add_data_flags(group) -> None:
    add = functools.partial(add_flag, group, QUESTION)
    switch = group.add_argument
    add("--data-root", help="ScienceQA's directory (default: as trained, or data/scienceqa)")
    add("--split", default="test", help="split of ScienceQA (default: test)")
    add("--format", metavar="FORMAT", help="format of ScienceQA's prompts (default: as trained, "
        "or QCM-ALE)")
    add("--score", help="choose the most likely answer instead of generating one. letters, for "
        'sqa: the letter after "The answer is". choices, for rows: one of the row\'s "choices" or, '
        "without that list, one of all answers in the file")
    add("--by", metavar="FIELD",
        help="also print the accuracy for each value of this field of the problems or rows")
    switch("--blank-images", action="store_true", help="replace every picture with a white one")
    add("--predictions", metavar="FILE", help="write the answers to FILE: {results: {id: index}, "
        "outputs: {id: text}}, with {missing: {id: why}} for those without an answer; for rows, a "
        "list of {id, output, answer, right}; for mme {scores, outputs}; for captions COCO's list "
        "of {image_id, caption}")
    add("--batch-size", default=32, help="problems answered at a time (default: 32)")
    add("--workers", default=default_workers(), help=WORKERS_HELP)


def add_model_flags(group) -> None:
    add = functools.partial(add_flag, group, QUESTION)
    switch = group.add_argument
    add("--adapter", help="LaVIN checkpoint, ours or released; none: plain LLaMA "
        "(default: out/checkpoint.pth)")
    add("--llama", help="LLaMA's directory, or a .gguf file (default: as trained, or weights/7B)")
    add("--delta", help="Hugging Face folder of weights to add to LLaMA's (default: as trained)")
    switch("--delta-unpermuted", action="store_true", help="add the delta without permuting its "
           "rows to LLaMA's order, as for the authors' Vicuna adapters (default: as trained)")
    add("--vit", help="CLIP's image encoder (default: as trained, or weights/ViT-L-14.pt)")
    add("--device", default="auto",
        help="cpu, cuda, cuda:1, mps, … (default: a GPU if there is one)")
    add("--dtype", default="auto", help=DTYPE_HELP)
    add("--bits", help="8 or 4: quantize LLaMA's matrices (default: as trained, or 16)")
    add("--max-seq-len", help="context in tokens (default: as trained, or 512)")
    switch("--compile", action="store_true",
           help="compile the decoding step; this takes half a minute and pays off for long answers")


def add_sampling_flags(group) -> None:
    add = functools.partial(add_flag, group, QUESTION)
    add("--max-new-tokens",
        help="maximum length of an answer in tokens (default: 256; for a data set 64, but 16 for "
        "mme and 256 for sqa with reasons first)")
    add("--temperature", default=0.0, help="0 takes the most likely token (default: 0)")
    add("--top-p", default=1.0,
        help="sample from the most likely tokens that hold this much probability (default: 1)")
    add("--seed", default=0, help="random seed of the sampling (default: 0)")


def check_source(source: str) -> None:
    """Raises LavinError for a --data that generate.py does not know."""
    kind, _, rest = source.partition(":")
    has_rest = kind in ("mme", "caption", *KINDS) and rest
    is_file = is_rows(source) and os.path.exists(source)
    if source != "sqa" and not has_rest and not is_file:
        forms = ", ".join(f"{kind}:FILE" for kind in KINDS)
        raise LavinError(f"--data {source}: no such file; give sqa, mme:FOLDER, caption:FILE, "
                         f"or one of {forms}")


def check_scoring(args: argparse.Namespace) -> None:
    """Raises LavinError for a --score or a --by that does not fit --data."""
    has_rows = args.data and is_rows(args.data)
    generates = args.temperature or args.max_new_tokens or args.compile
    if args.score == "letters" and (args.data != "sqa" or generates):
        raise LavinError("--score letters goes with --data sqa. It generates nothing, so leave out "
                         "--temperature, --max-new-tokens and --compile")
    if args.score == "choices" and (not has_rows or generates):
        raise LavinError("--score choices goes with --data jsonl:FILE and other rows. It generates "
                         "nothing, so leave out --temperature, --max-new-tokens and --compile")
    if args.by and args.data == "sqa" and args.by not in SQA_FIELDS:
        raise LavinError(f"--by {args.by}: problems of ScienceQA have {', '.join(SQA_FIELDS)}")
    if args.by and args.data and args.data != "sqa" and not has_rows:
        raise LavinError("--by goes with --data sqa, jsonl:FILE and other rows, "
                         f"not with {args.data}")


def check_args(args: argparse.Namespace) -> None:
    """Raises LavinError for flags that contradict each other."""
    if args.data:
        check_source(args.data)
    captions = (args.data or "").startswith("caption:")
    if captions and not (args.prompt and args.predictions):
        raise LavinError("--data caption:… needs --prompt and --predictions")
    modes = [args.data, args.show_routing, args.chat, args.serve is not None,
             args.prompt is not None and not captions]
    if sum(bool(mode) for mode in modes) != 1:
        raise LavinError("give one of --prompt, --chat, --serve, --data and --show-routing")
    if ranks.count() > 1 and not args.data:
        raise LavinError("torchrun deals the problems of --data out to several processes; "
                         "start --prompt, --chat, --serve and --show-routing without it")
    if args.image and (captions or args.prompt is None and not args.chat):
        raise LavinError("--image goes with --prompt or --chat")
    check_scoring(args)
    if not args.data and (args.predictions or args.format or args.by or args.blank_images):
        raise LavinError("--predictions, --format, --by and --blank-images go with --data")
    if args.prompt is not None and not args.prompt.strip():
        raise LavinError("--prompt is empty")
