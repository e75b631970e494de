"""Ask LaVIN a question about a picture, or let it answer and score a whole data set.

    python generate.py --image x.png --prompt "What is in the picture?"
    python generate.py --data sqa --split test --predictions out/predictions.json
    python generate.py --chat --image x.png
    python generate.py --data mme:MME_Benchmark
    python generate.py --data caption:captions_val2014.json:val2014 --prompt "Describe the picture." --predictions x.json

What the training run was told (prompt format, context, paths) is in its checkpoint and need not be said again.
"""

import argparse
import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import adapters
import benchmarks
import chat
import data
import plot
import tiny
from decode import Decoder, continued
from files import DTYPES, LavinError, at_least, check_compiler, check_writable, choose_paths, pick_device, run, write_atomically
from model import LaVIN


def by_modality(lavin, samples, encode):
    """[Sample] -> ([Encoded] without, [Encoded] with a picture), the longest first; and {id: ""} of those that do not fit."""
    groups, outputs = ([], []), {}
    for sample in samples:
        try:
            groups[sample.image is not None].append(encode(sample))
        except LavinError:
            outputs[sample.id] = ""
    if outputs:
        print(f"{len(outputs)} prompts do not fit the context of {lavin.max_seq_len} tokens and count as wrong; "
              "--max-seq-len widens it")
    for group in groups:
        group.sort(key=lambda encoded: -len(encoded.tokens))
    return groups, outputs


def answer_all(lavin, samples, format, max_new_tokens=None, temperature=0.0, top_p=1.0, batch_size=32, workers=0, compiled=False):
    """Answer every sample -> {id: text}; "" for a prompt that does not fit the context.

    One modality after the other, each by a model that is folded for it. A format that begins with the answer needs no
    reasons for the score: a sample ends as soon as its letter is out.
    """
    answer_first = format.split("-")[1].startswith("A")
    max_new_tokens = max_new_tokens or (64 if answer_first else 256)

    def letter_is_out(ids):
        return data.sqa_answer(lavin.tokenizer.decode(ids)) >= 0

    done = letter_is_out if answer_first else None
    groups, outputs = by_modality(lavin, samples, functools.partial(lavin.encode, prompt_only=True))
    with tqdm(total=sum(map(len, groups)), desc="answering", unit=" problems", file=sys.stdout) as bar:
        for modality, encoded in enumerate(groups):
            if not encoded:
                continue
            dataset, rows = data.Decoded(encoded, lavin.resolution), min(batch_size, len(encoded))
            prompts = data.ahead(dataset, range(len(encoded)), workers * modality, each=rows)
            for number, ids in continued(lavin.fold(modality), prompts, rows, max_new_tokens, temperature, top_p, done, compiled,
                                         longest=len(encoded[0].tokens)):
                outputs[encoded[number].id] = lavin.tokenizer.decode(ids)
                bar.update()
    return outputs


def choose_all(lavin, samples, problems, batch_size=32, workers=0):
    """The likeliest of each problem's letters behind "The answer is": one pass, nothing is generated -> {id: text}."""
    letters = {}

    def encode(sample):
        """The prompt up to the token that names the choice; which that is tell the tokens of all choices."""
        choices = data.LETTERS[:max(2, len(problems[sample.id]["choices"]))]
        variants = [lavin.encode(replace(sample, prompt=f"{sample.prompt}The answer is {letter}."), True) for letter in choices]
        tokens = np.stack([v.tokens[:min(len(v.tokens) for v in variants)] for v in variants])      # (choices, T)
        place = int((tokens != tokens[0]).any(0).argmax())
        letters[sample.id] = tokens[:len(problems[sample.id]["choices"]), place].tolist()
        return replace(variants[0], tokens=tokens[0, :place], labels=variants[0].labels[:place])

    groups, outputs = by_modality(lavin, samples, encode)
    with tqdm(total=sum(map(len, groups)), desc="choosing", unit=" problems", file=sys.stdout) as bar:
        for modality, encoded in enumerate(groups):
            if not encoded:
                continue
            decoder = Decoder(lavin.fold(modality), batch_size, len(encoded[0].tokens))
            plan = [[range(i, min(i + batch_size, len(encoded)))] for i in range(0, len(encoded), batch_size)]
            dataset = data.Collated(encoded, plan.__getitem__, lavin.resolution)
            for (batch,) in data.ahead(dataset, range(len(plan)), workers * modality):
                for identity, logits in zip(batch.ids, decoder.read(batch)):
                    best = int(logits[letters[identity]].argmax())
                    outputs[identity] = f"The answer is {data.LETTERS[best]}."
                decoder.lengths.clear()
                bar.update(len(batch.ids))
    return outputs


def score(lavin, problems, samples, format, by=None, letters=False, **how):
    """Answer ScienceQA problems (how: answer_all's), print the table -> ({id: index, -1 unparsed}, {id: text}).

    by: a field of the problems, for a second table with a row for each of its values. letters: choose, do not generate.
    """
    if letters:
        outputs = choose_all(lavin, samples, problems, how["batch_size"], how["workers"])
    else:
        outputs = answer_all(lavin, samples, format, **how)
    predictions = {}
    for sample in samples:
        index = data.sqa_answer(outputs[sample.id])
        predictions[sample.id] = index if index < len(problems[sample.id]["choices"]) else -1
    unparsed = sum(index < 0 for index in predictions.values())
    if by:
        print(data.sqa_table_by(by, problems, predictions))
    print(data.sqa_table(problems, predictions))
    print(f"{unparsed} of {len(predictions)} outputs name no valid choice; they count as wrong")
    return predictions, outputs


def show_routing(lavin, path):
    """Print by which weights each layer mixes its two experts, beside an untrained router's, and draw it."""
    weights = {"trained": lavin.route()}
    lavin.init_trained()
    weights["untrained"] = lavin.route()
    columns = {f"{what}, {kind}": w[:, m].tolist() for kind, w in weights.items()
               for m, what in enumerate(("text", "picture"))}
    print("layer" + "".join(f"{name:>22}" for name in columns))
    for i, row in enumerate(zip(*columns.values()), 1):
        print(f"{i:5}" + "".join(f"{f'{first:.3f} {second:.3f}':>22}" for first, second in row))
    plot.lines(path, "Weight of the first of the two experts", "layer", range(1, len(weights["trained"]) + 1),
               {name: [first for first, _ in column] for name, column in columns.items()})
    print(f"written: {path}")


def add_model_flags(parser):
    """Which model: what serve.py takes as well."""
    weights = parser.add_argument_group("model")
    weights.add_argument("--adapter", help="LaVIN checkpoint, ours or released; none: LLaMA as it is "
                         "(default: out/checkpoint.pth)")
    weights.add_argument("--llama", help="directory of LLaMA (default: as trained, or weights/7B)")
    weights.add_argument("--delta", help="folder of Hugging Face's that is added to LLaMA: Vicuna's (default: as trained)")
    weights.add_argument("--vit", help="CLIP's image encoder (default: as trained, or weights/ViT-L-14.pt)")
    weights.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    weights.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    weights.add_argument("--bits", type=int, choices=[16, 8, 4], help="that hold a number of LLaMA's matrices "
                         "(default: as trained, or 16)")
    weights.add_argument("--max-seq-len", type=at_least(1), help="context in tokens (default: as trained)")
    weights.add_argument("--compile", action="store_true", help="the steps of decoding: worth its half minute in long ones")


def add_sampling_flags(parser):
    """-> the group of the flags, for more."""
    how = parser.add_argument_group("how to answer")
    how.add_argument("--max-new-tokens", type=at_least(1), help="default: 64 where the answer comes first, else 256")
    how.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    how.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that hold so much")
    return how


def sampling(args, parser):
    """The flags of add_sampling_flags, checked, as Conversation.say takes them."""
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error("--temperature is at least 0, --top-p above 0 and at most 1")
    return {"max_new_tokens": args.max_new_tokens or 256, "temperature": args.temperature, "top_p": args.top_p}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_argument_group("what to answer")
    what.add_argument("--prompt", help='a question; put into "Instruction: … Response:" unless it says "Response:"')
    what.add_argument("--image", help="a picture that the prompt is about")
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal, about --image if there is one")
    what.add_argument("--data", metavar="SOURCE", help="answer a data set instead: sqa, mme:FOLDER, or with --prompt "
                      "caption:FILE[:IMAGES], the images that COCO's annotations list")
    what.add_argument("--data-root", help="default: what the checkpoint was trained on, or data/scienceqa")
    what.add_argument("--split", default="test", help="of the data set (default: test)")
    what.add_argument("--format", help="of ScienceQA's prompts (default: as trained)")
    what.add_argument("--predictions", metavar="FILE", help="write {results: {id: index}, outputs: {id: text}} there")
    what.add_argument("--by", metavar="FIELD", choices=["skill", "topic", "category", "subject", "grade", "task"],
                      help="also print the accuracy for each value of this field of the problems")
    what.add_argument("--blank-images", action="store_true", help="the control: white instead of every picture")
    what.add_argument("--show-routing", nargs="?", const="out/routing.png", metavar="FILE",
                      help="instead: how each layer mixes its experts, printed and drawn (default: out/routing.png)")
    add_model_flags(parser)
    how = add_sampling_flags(parser)
    how.add_argument("--score", choices=["letters"], help="of ScienceQA's problems, by which letter is likeliest behind "
                     "\"The answer is\": one pass, nothing is generated")
    how.add_argument("--seed", type=int, default=0, help="of the sampling")
    how.add_argument("--batch-size", type=at_least(1), default=32, help="problems answered at a time (default: 32)")
    how.add_argument("--workers", type=at_least(0), default=data.default_workers(), help="that decode pictures")
    args = parser.parse_args()
    kind, _, rest = (args.data or "").partition(":")
    if args.data and args.data != "sqa" and (kind not in ("mme", "caption") or not rest):
        parser.error(f"--data {args.data}: give sqa, mme:FOLDER or caption:FILE")
    captions = kind == "caption"
    if captions and not (args.prompt and args.predictions):
        parser.error("--data caption:… needs --prompt and --predictions")
    if [None if captions else args.prompt, args.data, args.show_routing, args.chat or None].count(None) != 3:
        parser.error("give one of --prompt, --chat, --data and --show-routing")
    if args.image and (args.prompt is None and not args.chat or captions):
        parser.error("--image goes with --prompt or --chat")
    if args.score and (args.data != "sqa" or args.temperature or args.max_new_tokens or args.compile):
        parser.error("--score letters goes with --data sqa, and generates nothing: without --temperature, --max-new-tokens and --compile")
    if not args.data and (args.predictions or args.format or args.by or args.blank_images):
        parser.error("--predictions, --format, --by and --blank-images go with --data")
    args.how = sampling(args, parser)
    return args


def load(args, remembered, format):
    """What --data names -> (problems or truths or None, [Sample])."""
    kind, _, rest = args.data.partition(":")
    if kind == "mme":
        samples, truths = benchmarks.load_mme(rest)
    elif kind == "caption":
        samples, truths = benchmarks.load_captions(rest, args.prompt), None
    else:
        truths, samples = data.load_sqa(args.data_root, args.split, format, remembered.get("captions", False))
    for sample in samples:
        if sample.image and args.blank_images:
            sample.image = Image.new("RGB", (1, 1), "white")
    return truths, samples


def answer_data(lavin, truths, samples, format, args):
    """Answer what --data names, print its table, write --predictions."""
    kind = args.data.partition(":")[0]
    how = {"temperature": args.temperature, "top_p": args.top_p, "batch_size": args.batch_size, "workers": args.workers,
           "compiled": args.compile}
    if kind == "sqa":
        print(f"{len(samples)} problems of {args.data_root}, split {args.split}, format {format}")
        predictions, outputs = score(lavin, truths, samples, format, args.by, args.score == "letters",
                                     max_new_tokens=args.max_new_tokens, **how)
        written = {"results": predictions, "outputs": outputs}
    else:
        outputs = answer_all(lavin, samples, "-", args.max_new_tokens or (16 if kind == "mme" else 64), **how)
        if kind == "mme":
            scores = benchmarks.mme_scores(outputs, truths)
            print(benchmarks.mme_table(scores))
            print(f"{sum(benchmarks.yes_or_no(text) is None for text in outputs.values())} of {len(outputs)} answers begin with "
                  "neither yes nor no; they count as wrong")
            written = {"scores": scores, "outputs": outputs}
        else:
            written = [{"image_id": identity, "caption": text.strip()} for identity, text in outputs.items()]
    if args.predictions:
        text = json.dumps(written, indent=1, ensure_ascii=False)
        write_atomically(args.predictions, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"written: {args.predictions}")


def find_model(args):
    """Settle the paths in args -> (the checkpoint's path or None, what it remembers)."""
    adapter = None if args.adapter == "none" else args.adapter or "out/checkpoint.pth"
    remembered = adapters.read(adapter)[2] if adapter and Path(adapter).is_file() else {}
    tiny.prepare(args, remembered)
    choose_paths(args, remembered, adapter)
    return adapter, remembered


def load_model(args, adapter, remembered):
    device, dtype = pick_device(args.device, args.dtype)
    check_compiler(args.compile, device)
    print(f"adapter {adapter or 'none'} · {device} · {dtype}")
    return LaVIN.load(args.llama, args.vit, adapter, device=device, dtype=DTYPES[dtype], max_seq_len=args.max_seq_len,
                      bits=args.bits or remembered.get("bits") or 16, delta=args.delta or remembered.get("delta"))


def main():
    args = parse_args()
    if args.prompt is not None and not args.prompt.strip():
        raise LavinError("--prompt is empty")
    adapter, remembered = find_model(args)
    format = args.format or remembered.get("format") or "QCM-ALE"
    if args.data:
        truths, samples = load(args, remembered, format)
    elif args.image:
        data.load_pixels(args.image, 1)         # complain about the picture before loading 13 GB
    for flag, path in (("--predictions", args.predictions), ("--show-routing", args.show_routing)):
        if path:
            check_writable(path, flag)
    torch.manual_seed(data.mixed_seed(args.seed, 0))
    lavin = load_model(args, adapter, remembered)
    if args.show_routing:
        show_routing(lavin, args.show_routing)
    elif args.data:
        answer_data(lavin, truths, samples, format, args)
    elif args.chat:
        chat.talk(lavin, args.image, args.how, args.compile)
    else:
        for text in chat.Conversation(lavin, args.image, args.compile).say(args.prompt, **args.how):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main)
