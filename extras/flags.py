"""Every flag of train.py and generate.py, which of them go together, and what --resume keeps."""

import argparse
import math
import os
from pathlib import Path

from data import default_workers
from extras.instructions import KINDS
from files import DTYPES, LavinError, at_least, read_checkpoint

# train.py


def train_parser(description: str) -> argparse.ArgumentParser:
    """No flag has a default of its own: the defaults are those of train.Settings."""
    parser = argparse.ArgumentParser(description=description)
    add_source_flags(parser.add_argument_group("data and weights"))
    add_training_flags(parser.add_argument_group("training"))
    add_speed_flags(parser.add_argument_group("speed and memory"))
    return parser


def add_source_flags(group) -> None:
    kinds = ", ".join(f"{kind}:FILE" for kind in KINDS)
    add = group.add_argument
    add("--data", nargs="+", metavar="SOURCE",
        help=f"sqa: ScienceQA (default); {kinds}, where FILE:IMAGES says where the pictures are")
    add("--weights", nargs="+", type=float, metavar="W",
        help="shares of several sources in every epoch")
    add("--multi-turn", action="store_true", help="make a conversation one sample")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be used")
    add("--val-fraction", type=float,
        help="of every source, held out: its loss after each epoch (default: 0)")
    add("--data-root", help="directory of ScienceQA (default: data/scienceqa)")
    add("--format", help="of ScienceQA's prompts: what is asked - what is answered "
        "(default: QCM-ALE)")
    add("--captions", action="store_true", help="put captions.json's caption into the context")
    add("--max-seq-len", type=at_least(1), help="context in tokens (default: 512)")
    add("--llama", help="directory of LLaMA in Meta's layout (default: weights/7B)")
    add("--vit", help="CLIP's image encoder (default: weights/ViT-L-14.pt)")
    add("--delta", help="folder of Hugging Face's that is added to LLaMA, as Vicuna's are")
    add("--adapter", help="LaVIN checkpoint to begin with (default: adapters that do nothing)")
    add("--out", help="directory of checkpoint.pth and metrics.jsonl (default: out)")


def add_training_flags(group) -> None:
    add = group.add_argument
    add("--epochs", type=at_least(1), help="default: 20, without ScienceQA 15")
    add("--warmup", type=float, help="epochs, at most a tenth of all (default: 2, without "
        "ScienceQA 0.2)")
    add("--batch-size", type=at_least(1), help="samples of one optimizer step (default: 32)")
    add("--micro-batch", type=at_least(1), help="samples of one forward pass (default: 4)")
    add("--lr", type=float, help="peak learning rate (default: 9e-3 · batch size / 256)")
    add("--tau", type=float, help="temperature of the routers: 10 for 7B (default), 5 for 13B")
    add("--dropout", type=float, help="in the adapters (default: 0.1)")
    add("--seed", type=int, help="default: 0")
    add("--adapters", choices=["all", "llama", "none"],
        help="leave them out of the ViT, or everywhere, so that only the projector learns")
    add("--no-routing", dest="routing", action="store_false", help="mix both experts half and half")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pth")
    add("--max-steps", type=at_least(1), help="stop early; --epochs still sets the schedule")
    add("--save-every", type=at_least(1), help="steps between checkpoints (default: an epoch)")
    add("--eval-limit", type=at_least(0), help="problems of val scored at the end (default: all)")
    add("--check", action="store_true", help="read all of the data, say what is wrong and how it "
        "looks, and train nothing")
    add("--dry-run", action="store_true", help="try the longest batch, print memory and hours, "
        "and train nothing")


def add_speed_flags(group) -> None:
    add = group.add_argument
    add("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    add("--dtype", choices=["auto", *DTYPES], help="of the frozen weights")
    add("--compile", action=argparse.BooleanOptionalAction, help="the blocks (default: on a GPU)")
    add("--checkpointing", action="store_true", help="recompute activations, to save memory")
    add("--bits", type=int, choices=[16, 8, 4], help="per number in LLaMA's matrices (default: 16)")
    add("--fsdp", action="store_true", help="under torchrun: cut LLaMA's matrices into a part for "
        "each GPU")
    add("--workers", type=at_least(0), help="processes that decode pictures")


def check_settings(settings, parser: argparse.ArgumentParser) -> None:
    """End with one line for settings that no run can have."""
    if not 0 <= settings.dropout < 1:
        parser.error("--dropout is at least 0 and below 1")
    if not 0 < settings.tau < math.inf or not 0 < settings.lr < math.inf:
        parser.error("--tau and --lr are above 0")
    if not 0 <= settings.val_fraction < 1:
        parser.error("--val-fraction is at least 0 and below 1")
    if not 0 <= settings.warmup < math.inf:
        parser.error("--warmup is at least 0")
    if len(set(settings.data)) < len(settings.data):
        parser.error("--data names a source twice; --weights gives it a larger share")
    if settings.weights:
        valid = all(0 < weight < math.inf for weight in settings.weights)
        if not valid or len(settings.weights) != len(settings.data):
            parser.error("--weights: give one above 0 for each source of --data")
    if settings.fsdp and (settings.bits < 16 or "RANK" not in os.environ):
        parser.error("--fsdp goes with torchrun (torchrun --nproc-per-node 8 train.py …) "
                     "and with --bits 16")


# --resume

# What makes a run what it is. --resume refuses to change these.
FIXED = ("data", "weights", "multi_turn", "val_fraction", "format", "captions", "max_seq_len",
         "epochs", "warmup", "batch_size", "lr", "tau", "dropout", "adapters", "routing",
         "seed", "dtype", "bits")
# What a resumed run does not take over from the one before.
ONCE = ("out", "adapter", "resume", "max_steps", "device", "compile", "fsdp", "dry_run",
        "check")


def read_resumed(out: str, names: list[str]) -> dict:
    """OUT/checkpoint.pth, with all that --resume needs. Of its config, only `names` are kept."""
    path = Path(out, "checkpoint.pth")
    if not path.is_file():
        raise LavinError(f"--resume: there is no {path} to go on from; "
                         "leave --resume out to start")
    resumed = read_checkpoint(path)
    kinds = {"config": dict, "step": int, "optimizer": dict, "scaler": dict}
    if not isinstance(resumed, dict):
        resumed = {}
    for name, kind in kinds.items():
        if not isinstance(resumed.get(name), kind):
            raise LavinError(f"--resume: {path} was not written by train.py")
    config = {}
    for name in names:
        if name in resumed["config"]:
            config[name] = resumed["config"][name]
    if isinstance(config.get("data"), str):         # older checkpoints knew a single source
        config["data"] = [config["data"]]
    resumed["config"] = config
    return resumed


def check_unchanged(settings, before: dict, defaults) -> None:
    """LavinError if a resumed run is told something that would make it another run.

    before: what the checkpoint remembers; older ones do not remember every setting.
    """
    for name in FIXED:
        now = getattr(settings, name)
        then = before.get(name, getattr(defaults, name))
        if then != now:
            path = Path(settings.out, "checkpoint.pth")
            raise LavinError(f"--resume: {path} was trained with {name} {then}, "
                             f"not {now}; leave the flag out")


# generate.py

FIELDS = ["skill", "topic", "category", "subject", "grade", "task"]     # of ScienceQA's problems


def generate_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add_mode_flags(parser.add_argument_group("what to do"))
    add_data_flags(parser.add_argument_group("data sets"))
    add_model_flags(parser.add_argument_group("model"))
    add_sampling_flags(parser.add_argument_group("how to answer"))
    return parser


def add_mode_flags(group) -> None:
    add = group.add_argument
    add("--prompt", help='a question; put into "Instruction: … Response:" unless it says '
        '"Response:" itself')
    add("--image", help="a picture that the prompt or the conversation is about")
    add("--chat", action="store_true", help="a conversation in the terminal")
    add("--serve", nargs="?", type=at_least(0), const=8000, metavar="PORT",
        help="a conversation as a page (default: 8000; 0: any free port)")
    add("--host", default="127.0.0.1",
        help="address of the page (default: 127.0.0.1, this machine alone)")
    add("--data", metavar="SOURCE", help="answer a data set: sqa, mme:FOLDER, or with --prompt "
        "caption:FILE[:IMAGES], the images that COCO's annotations list")
    add("--show-routing", nargs="?", const="out/routing.png", metavar="FILE",
        help="print and draw how each layer mixes its experts (default: out/routing.png)")


def add_data_flags(group) -> None:
    add = group.add_argument
    add("--data-root", help="directory of ScienceQA (default: as trained, or data/scienceqa)")
    add("--split", default="test", help="of ScienceQA (default: test)")
    add("--format", help="of ScienceQA's prompts (default: as trained)")
    add("--score", choices=["letters"], help="take the letter that is likeliest behind "
        '"The answer is": one pass, nothing is generated')
    add("--by", metavar="FIELD", choices=FIELDS,
        help="also print the accuracy for each value of this field of the problems")
    add("--blank-images", action="store_true", help="show white in place of every picture")
    add("--predictions", metavar="FILE", help="write {results: {id: index}, outputs: {id: text}}")
    add("--batch-size", type=at_least(1), default=32,
        help="problems answered at a time (default: 32)")
    add("--workers", type=at_least(0), default=default_workers(),
        help="processes that decode pictures")


def add_model_flags(group) -> None:
    add = group.add_argument
    add("--adapter", help="LaVIN checkpoint, ours or released; none: LLaMA as it is "
        "(default: out/checkpoint.pth)")
    add("--llama", help="directory of LLaMA (default: as trained, or weights/7B)")
    add("--delta", help="folder of Hugging Face's that is added to LLaMA (default: as trained)")
    add("--vit", help="CLIP's image encoder (default: as trained, or weights/ViT-L-14.pt)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    add("--dtype", default="auto", choices=["auto", *DTYPES])
    add("--bits", type=int, choices=[16, 8, 4],
        help="per number in LLaMA's matrices (default: as trained, or 16)")
    add("--max-seq-len", type=at_least(1), help="context in tokens (default: as trained)")
    add("--compile", action="store_true",
        help="the steps of decoding; takes half a minute, and pays off in long answers")


def add_sampling_flags(group) -> None:
    add = group.add_argument
    add("--max-new-tokens", type=at_least(1),
        help="default: 64 where the answer comes first, else 256")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-p", type=float, default=1.0,
        help="draw from the likeliest tokens that hold this much probability (default: 1)")
    add("--seed", type=int, default=0, help="of the drawing")


def check_args(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with one line for flags that contradict each other."""
    kind, _, rest = (args.data or "").partition(":")
    captions = kind == "caption"
    if args.data and args.data != "sqa" and not (kind in ("mme", "caption") and rest):
        parser.error(f"--data {args.data}: give sqa, mme:FOLDER or caption:FILE")
    if captions and not (args.prompt and args.predictions):
        parser.error("--data caption:… needs --prompt and --predictions")
    modes = [args.data, args.show_routing, args.chat, args.serve is not None,
             args.prompt is not None and not captions]
    if sum(bool(mode) for mode in modes) != 1:
        parser.error("give one of --prompt, --chat, --serve, --data and --show-routing")
    if args.image and (captions or args.prompt is None and not args.chat):
        parser.error("--image goes with --prompt or --chat")
    if args.score and (args.data != "sqa" or args.temperature or args.max_new_tokens
                       or args.compile):
        parser.error("--score letters goes with --data sqa and generates nothing, so it takes no "
                     "--temperature, --max-new-tokens and --compile")
    if not args.data and (args.predictions or args.format or args.by or args.blank_images):
        parser.error("--predictions, --format, --by and --blank-images go with --data")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error("--temperature is at least 0, --top-p above 0 and at most 1")
    if args.prompt is not None and not args.prompt.strip():
        raise LavinError("--prompt is empty")
