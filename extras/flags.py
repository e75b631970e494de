"""Every flag of train.py and generate.py, and which of them go together.

What a flag may be told, its type and its range, stands in extras/values.py.
"""

import argparse
import os
from collections.abc import Callable

from data import default_workers
from extras.instructions import KINDS, is_rows
from extras.terminal import Parser
from extras.values import HELD_OUT_ROWS, QUESTION, SETTINGS, SQA_FIELDS
from fast import ranks
from files import LavinError

DTYPE_HELP = ("of the frozen weights (default: auto, which is bf16 on a GPU, fp16 on one too old "
              "for it, and fp32 on a CPU)")
WORKERS_HELP = "processes that decode pictures (default: half as many as cores, at most 8)"


def adder(group, kinds: dict) -> Callable:
    """A group's add_argument for flags whose values extras/values.py describes."""
    def add(flag, **more):
        kind = kinds[flag.removeprefix("--").replace("-", "_")]
        if kind.choices:
            shown = ",".join(str(choice) for choice in kind.choices)
            more = {"metavar": f"{{{shown}}}"} | more
        group.add_argument(flag, type=kind.parse, **more)

    return add


# train.py


def train_parser(description: str) -> argparse.ArgumentParser:
    """No flag has a default of its own: the defaults are those of train.Settings."""
    parser = Parser(description=description)
    add_source_flags(parser.add_argument_group("data and weights"))
    add_training_flags(parser.add_argument_group("training"))
    add_speed_flags(parser.add_argument_group("speed and memory"))
    return parser


def add_source_flags(group) -> None:
    kinds = ", ".join(f"{kind}:FILE" for kind in KINDS)
    add = adder(group, SETTINGS)
    switch = group.add_argument
    add("--data", nargs="+", metavar="SOURCE",
        help=f"sqa: ScienceQA (default); {kinds}, where FILE:IMAGES says where the pictures are")
    add("--weights", nargs="+", metavar="W", help="shares of several sources in every epoch "
        "(default: all samples of each)")
    switch("--multi-turn", action="store_true", help="make a conversation one sample")
    switch("--skip-bad", action="store_true", help="leave out rows that cannot be used")
    add("--val-fraction", help="of every source, held out: after each epoch its loss and, of "
        "--eval-limit rows, how many are answered exactly (ScienceQA: the letter). Default: 0")
    add("--data-root", help="directory of ScienceQA (default: data/scienceqa)")
    add("--format", metavar="FORMAT", help="of ScienceQA's prompts: what is asked - what is "
        "answered (default: QCM-ALE)")
    switch("--captions", action="store_true", help="put captions.json's caption into the context")
    switch("--no-images", dest="images", action="store_false",
           help="leave out the pictures, in training and scoring; captions stay")
    add("--max-seq-len", help="context in tokens (default: 512)")
    add("--llama", help="LLaMA's directory, or a .gguf file (default: weights/7B)")
    add("--vit", help="CLIP's image encoder (default: weights/ViT-L-14.pt)")
    add("--delta", help="folder of Hugging Face's that is added to LLaMA, as Vicuna's are")
    switch("--delta-unpermuted", action="store_true", help="add it with its rows in another order "
           "than LLaMA's, as the authors' code did for their Vicuna adapters")
    add("--adapter", help="LaVIN checkpoint to begin with (default: adapters that do nothing)")
    add("--out", help="directory of checkpoint.pth and metrics.jsonl (default: out)")


def add_training_flags(group) -> None:
    add = adder(group, SETTINGS)
    switch = group.add_argument
    add("--epochs", help="passes over the data (default: 20, without ScienceQA 15)")
    add("--warmup", help="epochs, at most a tenth of all (default: 2, without ScienceQA 0.2)")
    add("--batch-size", help="samples of one optimizer step (default: 32)")
    add("--micro-batch", help="samples of one forward pass (default: 4)")
    add("--lr", help="peak learning rate (default: 9e-3 · batch size / 256)")
    add("--tau", help="temperature of the routers: 10 for 7B (default), 5 for 13B")
    add("--dropout", help="in the adapters (default: 0.1)")
    add("--weight-decay", help="on matrices, none on biases (default: 0.02)")
    add("--clip", help="the gradient's largest norm (default: not clipped)")
    add("--rank", help="of the adapters, an even number (default: 8)")
    add("--scale", help="of the adapters (default: 1)")
    add("--hidden", help="size of the projector's hidden layer (default: 128)")
    add("--experts", help="of an adapter; 1 is a plain adapter without a router (default: 2)")
    add("--seed", help="of everything that is drawn (default: 0)")
    add("--adapters",
        help="llama: leave them out of the ViT; none: out of LLaMA too, so that only the "
        "projector learns (default: all)")
    switch("--no-routing", dest="routing", action="store_false",
           help="mix both experts half and half")
    switch("--resume", action="store_true", help="go on from OUT/checkpoint.pth")
    add("--max-steps", help="stop early; --epochs still sets the schedule")
    add("--save-every", help="steps between checkpoints (default: an epoch)")
    switch("--keep-epochs", action="store_true", help="after every epoch keep its checkpoint as "
           "OUT/checkpoint-N.pth; N counts epochs from 0, as the authors' files do")
    switch("--tensorboard", action="store_true", help="write the numbers of metrics.jsonl to "
           "OUT/tensorboard as well; needs pip install tensorboard")
    add("--eval-limit", help="problems of val scored at the end (default: all), and rows of every "
        f"held-out part answered after each epoch (default: {HELD_OUT_ROWS}; none with --fsdp)")
    switch("--check", action="store_true", help="read all of the data, say what is wrong and how "
           "it looks, and train nothing")
    switch("--dry-run", action="store_true", help="try the longest batch, print memory and hours, "
           "and train nothing; with --device cuda and no GPU they are computed")
    add("--tflops", help="with --dry-run: a GPU's bf16 rate by its data sheet, to estimate hours")


def add_speed_flags(group) -> None:
    add = adder(group, SETTINGS)
    switch = group.add_argument
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: a GPU if there is one)")
    add("--dtype", help=DTYPE_HELP)
    switch("--compile", action=argparse.BooleanOptionalAction,
           help="compile the blocks (default: on a GPU)")
    switch("--checkpointing", action="store_true", help="recompute activations, to save memory")
    add("--bits", help="per number in LLaMA's matrices (default: 16)")
    switch("--fsdp", action="store_true", help="under torchrun: cut LLaMA's matrices into a part "
           "for each GPU")
    add("--workers", help=WORKERS_HELP)


def check_settings(settings) -> None:
    """LavinError for settings that do not go together."""
    if len(set(settings.data)) < len(settings.data):
        raise LavinError("--data names a source twice; --weights gives it a larger share")
    if settings.weights and len(settings.weights) != len(settings.data):
        raise LavinError("--weights: give one above 0 for each source of --data")
    if settings.tflops and not settings.dry_run:
        raise LavinError("--tflops goes with --dry-run")
    if settings.rank % 2:
        raise LavinError("--rank is even: an expert has two groups")
    check_delta(settings.delta, settings.delta_unpermuted)
    if settings.fsdp and (settings.bits < 16 or "RANK" not in os.environ):
        raise LavinError("--fsdp goes with torchrun (torchrun --nproc-per-node 8 train.py …) "
                         "and with --bits 16")


def check_delta(delta: str | None, unpermuted: bool) -> None:
    """LavinError for --delta-unpermuted without a --delta, given or remembered."""
    if unpermuted and not delta:
        raise LavinError("--delta-unpermuted goes with --delta DIR, which names the deltas")


# generate.py

def generate_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(description=description)
    add_mode_flags(parser.add_argument_group("what to do"))
    add_data_flags(parser.add_argument_group("data sets"))
    add_model_flags(parser.add_argument_group("model"))
    add_sampling_flags(parser.add_argument_group("how to answer"))
    return parser


def add_mode_flags(group) -> None:
    add = adder(group, QUESTION)
    switch = group.add_argument
    add("--prompt", help='a question; put into "Instruction: … Response:" unless it says '
        '"Response:" itself')
    add("--image", help="a picture that the prompt or the conversation is about")
    switch("--chat", action="store_true", help="a conversation in the terminal")
    add("--serve", nargs="?", const=8000, metavar="PORT",
        help="a conversation as a page (default: 8000; 0: any free port)")
    add("--host", default="127.0.0.1",
        help="address of the page (default: 127.0.0.1, this machine alone)")
    kinds = ", ".join(f"{kind}:FILE" for kind in KINDS)
    add("--data", metavar="SOURCE", help=f"answer a data set: sqa; {kinds}, where FILE:IMAGES says "
        "where the pictures are (of a conversation, the first question); mme:FOLDER; or with "
        "--prompt caption:FILE[:IMAGES], the images that COCO's annotations list")
    add("--show-routing", nargs="?", const="out/routing.png", metavar="FILE",
        help="print and draw how each layer mixes its experts (default: out/routing.png)")


def add_data_flags(group) -> None:
    add = adder(group, QUESTION)
    switch = group.add_argument
    add("--data-root", help="directory of ScienceQA (default: as trained, or data/scienceqa)")
    add("--split", default="test", help="of ScienceQA (default: test)")
    add("--format", metavar="FORMAT", help="of ScienceQA's prompts (default: as trained)")
    add("--score", help="generate nothing. letters, for sqa: the letter that is likeliest behind "
        '"The answer is". choices, for rows: the likeliest of a row\'s list "choices" or, without '
        "one, of all answers in the file")
    add("--by", metavar="FIELD",
        help="also print the accuracy for each value of this field of the problems or rows")
    switch("--blank-images", action="store_true", help="show white in place of every picture")
    add("--predictions", metavar="FILE", help="write {results: {id: index}, outputs: "
        "{id: text}}, and {missing: {id: why}} where there is no answer; for rows a list of {id, "
        "output, answer, right}")
    add("--batch-size", default=32, help="problems answered at a time (default: 32)")
    add("--workers", default=default_workers(), help=WORKERS_HELP)


def add_model_flags(group) -> None:
    add = adder(group, QUESTION)
    switch = group.add_argument
    add("--adapter", help="LaVIN checkpoint, ours or released; none: LLaMA as it is "
        "(default: out/checkpoint.pth)")
    add("--llama", help="LLaMA's directory, or a .gguf file (default: as trained, or weights/7B)")
    add("--delta", help="folder of Hugging Face's that is added to LLaMA (default: as trained)")
    switch("--delta-unpermuted", action="store_true", help="add it with its rows in another order "
           "than LLaMA's: for the authors' Vicuna adapters, trained so (default: as trained)")
    add("--vit", help="CLIP's image encoder (default: as trained, or weights/ViT-L-14.pt)")
    add("--device", default="auto",
        help="cpu, cuda, cuda:1, mps, … (default: a GPU if there is one)")
    add("--dtype", default="auto", help=DTYPE_HELP)
    add("--bits", help="per number in LLaMA's matrices (default: as trained, or 16)")
    add("--max-seq-len", help="context in tokens (default: as trained)")
    switch("--compile", action="store_true",
           help="compile the steps of decoding; takes half a minute, and pays off in long answers")


def add_sampling_flags(group) -> None:
    add = adder(group, QUESTION)
    add("--max-new-tokens",
        help="of an answer, at most (default: 256; for a data set 64, but 16 for mme and 256 for "
        "sqa with reasons first)")
    add("--temperature", default=0.0, help="0 takes the likeliest token (default)")
    add("--top-p", default=1.0,
        help="draw from the likeliest tokens that hold this much probability (default: 1)")
    add("--seed", default=0, help="of the drawing (default: 0)")


def check_source(source: str) -> None:
    """LavinError for a --data that generate.py does not know."""
    kind, _, rest = source.partition(":")
    has_rest = kind in ("mme", "caption", *KINDS) and rest
    is_file = is_rows(source) and os.path.exists(source)
    if source != "sqa" and not has_rest and not is_file:
        forms = ", ".join(f"{kind}:FILE" for kind in KINDS)
        raise LavinError(f"--data {source}: no such file; give sqa, mme:FOLDER, caption:FILE, "
                         f"or one of {forms}")


def check_scoring(args: argparse.Namespace) -> None:
    """LavinError for a --score or a --by that --data does not have."""
    has_rows = args.data and is_rows(args.data)
    generates = args.temperature or args.max_new_tokens or args.compile
    if args.score == "letters" and (args.data != "sqa" or generates):
        raise LavinError("--score letters goes with --data sqa and generates nothing, so it takes "
                         "no --temperature, --max-new-tokens and --compile")
    if args.score == "choices" and (not has_rows or generates):
        raise LavinError("--score choices goes with --data jsonl:FILE and other rows and generates "
                         "nothing, so it takes no --temperature, --max-new-tokens and --compile")
    if args.by and args.data == "sqa" and args.by not in SQA_FIELDS:
        raise LavinError(f"--by {args.by}: problems of ScienceQA have {', '.join(SQA_FIELDS)}")
    if args.by and args.data and args.data != "sqa" and not has_rows:
        raise LavinError("--by goes with --data sqa, jsonl:FILE and other rows, "
                         f"not with {args.data}")


def check_args(args: argparse.Namespace) -> None:
    """LavinError for flags that contradict each other."""
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
