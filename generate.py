"""Ask LaVIN a question about a picture, chat with it, or answer and score a data set.

    python generate.py --image x.png --prompt "What is in the picture?"
    python generate.py --chat --image x.png                     a conversation in the terminal
    python generate.py --serve 8000                             the same as a web page
    python generate.py --data sqa --split test --predictions out/predictions.json
    python generate.py --data jsonl:mine.jsonl --by kind
    python generate.py --data mme:MME_Benchmark
    torchrun --nproc-per-node 8 generate.py --data sqa          a share of the problems on each GPU
    python generate.py --data caption:captions_val2014.json:val2014 --prompt "Describe it." \\
                       --predictions captions.json

A checkpoint stores the settings of its training run (prompt format, context, paths), so you need
not repeat them.
"""

import argparse
import json
import os
import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends the imports without a traceback

import torch
from PIL import Image

import checkpoints
import data
from extras import benchmarks, chat, choices, evaluate, flags, resume, rows, scienceqa, serve
from extras.instructions import is_rows
from extras.terminal import run
from fast import ranks
from files import (DTYPES, check_compiler, check_writable, choose_paths, pick_device,
                   write_atomically)
from model import LaVIN
from tiny import shelf, world


def find_model(args: argparse.Namespace) -> tuple[str | None, dict]:
    """Fill in the paths in args -> (the checkpoint's path or None, the settings it stores)."""
    adapter = args.adapter or "out/checkpoint.pth"
    if adapter == "none":
        adapter = None
    remembered = {}
    if adapter and os.path.isfile(adapter):
        _, _, remembered = checkpoints.read_adapter(adapter)
    with ranks.rank_0_first():
        world.prepare(args, remembered)
    choose_paths(args, remembered, adapter)
    return adapter, remembered


def load_model(args: argparse.Namespace, adapter: str | None, remembered: dict,
               device: torch.device, dtype: str) -> LaVIN:
    """The model that the flags name, in eval mode. Other settings are as in its training run."""
    delta = args.delta or remembered.get("delta")
    unpermuted = args.delta_unpermuted or remembered.get("delta_unpermuted", False)
    flags.check_delta(delta, unpermuted)
    print(f"adapter {adapter or 'none'} · {device} · {dtype}")
    if adapter is None:
        print("note     without an adapter, LLaMA sees only noise in place of a picture")
    lavin = checkpoints.load(
        args.llama,
        args.vit,
        adapter,
        device=device,
        dtype=DTYPES[dtype],
        max_seq_len=args.max_seq_len,
        bits=args.bits or remembered.get("bits") or 16,
        delta=delta,
        delta_unpermuted=unpermuted)
    resume.note_other_models(args.llama, args.vit, delta, remembered)
    return lavin


def load_data(args: argparse.Namespace, remembered: dict,
              format: str) -> tuple[dict | None, list[data.Sample]]:
    """Read --data -> (the ground truths by the samples' ids, samples).

    A ground truth is a problem in ScienceQA, yes or no in MME, and a row in a file of rows.
    Captions have none here: COCO's own evaluation scores the file of --predictions.
    """
    kind, _, rest = args.data.partition(":")
    images = remembered.get("images", True)
    if kind == "mme":
        samples, truths = benchmarks.load_mme(rest)
    elif kind == "caption":
        samples = benchmarks.load_captions(rest, args.prompt)
        truths = None
    elif kind == "sqa":
        captions = remembered.get("captions", False)
        truths, samples = scienceqa.load_sqa(
            args.data_root, args.split, format, captions, images)
    else:
        truths, samples = rows.read_rows(args.data, args.by, args.score == "choices")
        if not images:
            for sample in samples:
                sample.image = None
    if args.blank_images:
        for sample in samples:
            if sample.image:
                sample.image = Image.new("RGB", (1, 1), "white")
    return truths, samples


def answer_data(lavin: LaVIN, truths: dict | None, samples: list[data.Sample], format: str,
                args: argparse.Namespace) -> None:
    """Answer the samples of --data, print the table of scores, write --predictions.

    If this ends early, the answers so far are written (with several ranks, only rank 0's).
    Raises LavinError if a picture could not be decoded.
    """
    answers = evaluate.Answers(samples)
    try:
        answer_and_score(lavin, truths, samples, answers, format, args)
    finally:
        has_some = answers.given or answers.unread
        if args.predictions and has_some and ranks.rank() == 0:
            write_predictions(args, truths, answers)
    ranks.leave()
    if ranks.rank() == 0:               # every rank knows the unread pictures
        answers.check()


def answer_and_score(lavin: LaVIN, truths: dict | None, samples: list[data.Sample],
                     answers: evaluate.Answers, format: str, args: argparse.Namespace) -> None:
    """Fill `answers` and print the table of scores for this kind of --data."""
    kind = args.data.partition(":")[0]
    options = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "batch_size": args.batch_size,
        "workers": args.workers,
        "compiled": args.compile}
    if kind == "sqa":
        print(f"{len(samples)} problems of {args.data_root}, split {args.split}, "
              f"format {format}")
        evaluate.score(lavin, truths, samples, format, args.by, args.score == "letters", answers,
                       max_new_tokens=args.max_new_tokens, **options)
        return
    if args.score == "choices":
        own = {place: row.choices for place, row in truths.items()}
        choices.choose_all(lavin, samples, answers, own, args.batch_size, args.workers)
    else:
        n_tokens = args.max_new_tokens or (16 if kind == "mme" else 64)
        evaluate.answer_all(lavin, samples, answers, None, n_tokens, **options)
    outputs = answers.outputs()
    if is_rows(args.data):
        print(rows.score_table(truths, outputs, args.by))
    if kind == "mme":
        print(benchmarks.mme_table(benchmarks.mme_scores(outputs, truths)))
        begins = [benchmarks.yes_or_no(text) for text in outputs.values()]
        print(f"{begins.count(None)} of {len(outputs)} answers begin with neither yes "
              "nor no; they count as wrong")
    answers.print_unread()


def write_predictions(args: argparse.Namespace, truths: dict | None,
                      answers: evaluate.Answers) -> None:
    """Write --predictions, in a format for this kind of --data. Missing answers get a reason."""
    kind = args.data.partition(":")[0]
    outputs = answers.outputs()
    missing = answers.missing()
    if kind == "caption":               # COCO's evaluation reads a list
        written = []
        for image_id, text in outputs.items():
            row = {"image_id": image_id, "caption": text.strip()}
            if image_id in missing:
                row["missing"] = missing[image_id]
            written.append(row)
    elif is_rows(args.data):
        written = rows.predictions(truths, outputs, missing)
    else:
        if kind == "sqa":
            written = {"results": evaluate.sqa_predictions(truths, outputs), "outputs": outputs}
        else:
            written = {"scores": benchmarks.mme_scores(outputs, truths), "outputs": outputs}
        if missing:
            written["missing"] = missing
    text = json.dumps(written, indent=1, ensure_ascii=False)

    def write(path):
        # Python reads a file name that is not UTF-8 as surrogates. JSON stores them as \udc...
        path.write_text(text, encoding="utf-8", errors="backslashreplace")

    write_atomically(args.predictions, write)
    print(f"written: {args.predictions}")


def answer_prompt(lavin: LaVIN, args: argparse.Namespace, sampling: dict) -> None:
    """Print the answer to --prompt while it is generated."""
    conversation = chat.Conversation(lavin, args.image, args.compile)
    for text in conversation.say(args.prompt, **sampling):
        print(text, end="", flush=True)
    print()


def listen(args: argparse.Namespace, adapter: str | None, remembered: dict) -> serve.Server:
    """The page's server. With the small world's model, the page has examples and a drawing pad."""
    adapter_name = Path(adapter).name if adapter else "no adapter"
    model_name = f"{Path(args.llama).name} · {adapter_name}"
    colours = {}
    examples = []
    if world.is_used("llama", args, remembered) and world.is_used("vit", args, remembered):
        colours = world.COLOURS
        examples = shelf.examples()
    return serve.listen(args.host, args.serve, model_name, colours, examples)


def main() -> None:
    """Read the flags, check everything, load the model, then do what was asked."""
    parser = flags.generate_parser(__doc__.split("\n\n")[0])
    args = parser.parse_args()
    flags.check_args(args)
    device, dtype = pick_device(args.device, args.dtype)
    check_compiler(args.compile, device)
    if args.data:
        ranks.join(device, for_answers=True)
    adapter, remembered = find_model(args)

    # Find errors here, before 13 GB are loaded.
    format = args.format or remembered.get("format") or "QCM-ALE"
    if args.data:
        truths, samples = load_data(args, remembered, format)
    elif args.image:
        data.load_pixels(args.image, 1)
    if args.predictions:
        check_writable(args.predictions, "--predictions")
    if args.show_routing:
        check_writable(args.show_routing, "--show-routing")
    if args.serve is not None:
        server = listen(args, adapter, remembered)

    # Each rank samples its own tokens.
    torch.manual_seed(data.mixed_seed(ranks.own_seed(args.seed), 0))
    lavin = load_model(args, adapter, remembered, device, dtype)
    sampling = {
        "max_new_tokens": args.max_new_tokens or 256,
        "temperature": args.temperature,
        "top_p": args.top_p}
    if args.show_routing:
        evaluate.show_routing(lavin, args.show_routing)
    elif args.data:
        answer_data(lavin, truths, samples, format, args)
    elif args.chat:
        chat.talk(lavin, args.image, sampling, args.compile)
    elif args.serve is not None:
        serve.serve(server, lavin, sampling, args.compile)
    else:
        answer_prompt(lavin, args, sampling)


if __name__ == "__main__":
    run(main)
