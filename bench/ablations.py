"""What each part of MMA contributes, measured on the small world over several seeds.

    python -m tiny.pretrain small-clip      first, once: the smaller ViT
    python -m bench.ablations DIRECTORY [--seeds 5] [--jobs 2]

The variants are the rows of the paper's ablation: text only; pictures, with single adapters in
LLaMA; adapters in the ViT as well; a larger ViT; and MMA. There are two more variants: MMA without
routing, and single adapters of twice the rank. The script first chooses a learning rate for each
variant: it trains once with each of three rates, and keeps the one that is best on 1,200 val
problems. (These runs share a seed that no other run has.) Two controls show what can be answered
without seeing a picture: MMA with blank pictures, and LLaMA alone.

The script prints Markdown tables: the scores by ScienceQA's columns, the scores by skill, and the
distance between the routing weights of the two modalities. It runs train.py and generate.py from
the command line and writes into DIRECTORY. It does not repeat runs whose results are already there,
so use a new DIRECTORY after a change of the code or the models.
With 5 seeds it takes about 100 minutes on two CPU cores.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoints
from extras.evaluate import sqa_scores
from extras.scienceqa import load_sqa
from extras.terminal import Parser, run
from extras.values import Kind
from files import LavinError
from tiny import world

ROOT = Path(__file__).absolute().parent.parent
SINGLE = ["--experts", "1"]
SMALLER = ["--vit", world.SMALL_VIT]
VARIANTS = {
    "text only": [*SINGLE, "--adapters", "llama", "--no-images"],
    "pictures, adapters in LLaMA": [*SINGLE, *SMALLER, "--adapters", "llama"],
    "adapters in the ViT as well": [*SINGLE, *SMALLER],
    "a larger ViT": SINGLE,
    "MMA": [],
    "MMA without routing": ["--no-routing"],
    "single adapters of rank 16": [*SINGLE, "--rank", "16"],
}
RATES = (8e-3, 4e-3, 16e-3)  # of equal scores, the first counts: the small world's default
RATE_SEED = 100             # of the runs that choose the learning rate
N_VAL = 1200                # val problems that it is chosen on


# Runs


def call(script: str, log: Path, *flags) -> float:
    """Run a script on ScienceQA's data, with its output in the log -> the seconds it took."""
    command = [sys.executable, ROOT / script, "--data", "sqa"]
    for flag in flags:
        command.append(str(flag))
    # The models are small and several runs go on at a time, so each gets one thread.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with open(log, "w") as file:
        result = subprocess.run(command, stdout=file, env=environment)
    if result.returncode != 0:
        raise LavinError(f"{script} failed; its message is above, its output in {log}")
    return time.perf_counter() - began


def as_flags(settings: dict) -> list:
    """{a setting's name: its value} -> flags."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", value]
    return flags


def train_flags(variant: str, rate: float, seed: int, **more) -> list:
    """The flags of a training run: the small world's paths and settings, then the variant's own.

    more: settings that replace the small world's, by name.
    """
    settings = world.PATHS | world.DEFAULTS | {"lr": rate, "seed": seed} | more
    return as_flags(settings) + VARIANTS[variant]       # the last value of a flag counts


def folder_of(directory: Path, variant: str, what: str) -> Path:
    """The folder of a run. It is created if it does not exist."""
    name = re.sub(r"\W+", "-", f"{variant} {what}")
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def draw_more_val(directory: Path) -> Path:
    """The folder with the same training problems and a larger val split, to tell rates apart."""
    folder = directory / "world"
    sizes = (world.SIZES[0], N_VAL, 0)
    world.make_folder(folder, lambda new: world.write_world(new, sizes=sizes), anew=False)
    world.check_version(folder, "world.json", f"rm -r {directory}; python -m bench.ablations …")
    return folder


def val_score(directory: Path, data_root: Path, variant: str, rate: float) -> float:
    """Train with this learning rate on data_root -> AVG on its val split, in percent."""
    out = folder_of(directory, variant, f"rate {rate}")
    path = out / "val.json"
    if not path.exists():
        flags = train_flags(variant, rate, RATE_SEED, data_root=data_root)
        call("train.py", out / "train.log", "--out", out, "--eval-limit", 0, *flags)
        call("generate.py", out / "val.log", "--adapter", out / "checkpoint.pth",
             "--split", "val", "--predictions", path)
    problems, _ = load_sqa(data_root, "val")
    return sqa_scores(problems, read_results(path))["AVG"]


def measure(directory: Path, variant: str, rate: float, seed: int) -> dict[str, dict]:
    """Train, then answer the test split. MMA also answers it with blank pictures.

    -> {"test": {id: index of the choice}}, and for MMA the same under "blank". seconds.json is
    written last, so a folder that has it is complete.
    """
    kinds = {"test": []}
    if variant == "MMA":
        kinds["blank"] = ["--blank-images"]
    out = folder_of(directory, variant, f"rate {rate} seed {seed}")
    adapter = out / "checkpoint.pth"
    if not (out / "seconds.json").exists():
        seconds = {}
        flags = train_flags(variant, rate, seed)
        seconds["train"] = call(
            "train.py", out / "train.log", "--out", out, "--eval-limit", 0, *flags)
        for kind, kind_flags in kinds.items():
            seconds[kind] = call(
                "generate.py", out / f"{kind}.log", "--adapter", adapter,
                "--predictions", out / f"{kind}.json", *kind_flags)
        (out / "seconds.json").write_text(json.dumps(seconds))
    return {kind: read_results(out / f"{kind}.json") for kind in kinds}


def read_results(path: Path) -> dict[str, int]:
    """What generate.py --predictions wrote -> {id: index of the choice}."""
    return json.loads(path.read_text())["results"]


def choose_rates(directory: Path, pool: ThreadPoolExecutor) -> dict[str, float]:
    """{variant: the learning rate that is best on the val split}."""
    data_root = draw_more_val(directory)
    futures = {}
    for variant in VARIANTS:
        for rate in RATES:
            futures[variant, rate] = pool.submit(
                val_score, directory, data_root, variant, rate)
    rates = {}
    for variant in VARIANTS:
        scores = {rate: futures[variant, rate].result() for rate in RATES}
        rates[variant] = max(scores, key=scores.get)
    return rates


def measure_all(directory: Path, rates: dict[str, float], n_seeds: int,
                pool: ThreadPoolExecutor) -> dict[tuple, dict]:
    """{(variant, seed): what `measure` returns}."""
    futures = {}
    for seed in range(n_seeds):
        for variant, rate in rates.items():
            futures[variant, seed] = pool.submit(measure, directory, variant, rate, seed)
    return {key: future.result() for key, future in futures.items()}


def measure_llama_alone(directory: Path) -> dict[str, int]:
    """The answers of LLaMA without LaVIN's adapters.

    The projector is untrained, so a picture is noise to LLaMA.
    """
    path = directory / "frozen.json"
    if not path.exists():
        call("generate.py", directory / "frozen.log", "--adapter", "none", "--predictions", path,
             *as_flags(world.PATHS))
    return read_results(path)


# Tables


def spread(values: list[float]) -> str:
    """Mean and range of percentages."""
    mean = sum(values) / len(values)
    return f"{mean:.1f} ({min(values):.1f}–{max(values):.1f})"


def print_row(cells):
    print(f"| {' | '.join(cells)} |")


def percent_right(problems, pids, predictions):
    right = sum(predictions[pid] == problems[pid]["answer"] for pid in pids)
    return 100 * right / len(pids)


def score_columns(problems, predictions) -> dict[str, float]:
    """ScienceQA's columns, and "words alone": the problems without a picture."""
    scores = sqa_scores(problems, predictions)
    pids = [pid for pid in predictions if not problems[pid]["image"]]
    scores["words alone"] = percent_right(problems, pids, predictions)
    return scores


def count_trained(directory: Path, variant: str, rate: float) -> str:
    """The number of trained parameters, as train.py printed it."""
    log = folder_of(directory, variant, f"rate {rate} seed 0") / "train.log"
    return re.search(r"trained +([\d,]+) parameters", log.read_text()).group(1)


def print_variants(directory, problems, results, rates, frozen, n_seeds):
    """The table by ScienceQA's columns: for each variant, the mean and range over the seeds."""
    columns = ("IMG", "words alone", "NO", "AVG")
    print_row(["", "trained", "lr", *columns])
    print("|---|---|---|" + "---|" * len(columns))
    rows = [(variant, variant, "test") for variant in VARIANTS]
    rows.append(("MMA, pictures blanked", "MMA", "blank"))
    for label, variant, kind in rows:
        scores = []
        for seed in range(n_seeds):
            scores.append(score_columns(problems, results[variant, seed][kind]))
        cells = [spread([score[column] for score in scores]) for column in columns]
        trained = count_trained(directory, variant, rates[variant])
        print_row([label, trained, f"{rates[variant]:g}", *cells])
    frozen_scores = score_columns(problems, frozen)
    cells = [f"{frozen_scores[column]:.1f}" for column in columns]
    print_row(["LLaMA alone", "0", "", *cells])


def print_skills(problems, results, n_seeds):
    """The table by skill: MMA with pictures and with blank ones. Picture skills come first."""
    print_row(["skill", "MMA", "pictures blanked"])
    print("|---|---|---|")
    pids_of = {}
    for pid, problem in problems.items():
        key = (problem["image"] is None, problem["skill"])
        pids_of.setdefault(key, []).append(pid)
    for (is_text, skill), pids in sorted(pids_of.items()):
        percents = {"test": [], "blank": []}
        for seed in range(n_seeds):
            for kind, values in percents.items():
                values.append(percent_right(problems, pids, results["MMA", seed][kind]))
        blank = "" if is_text else spread(percents["blank"])
        print_row([f"{skill} ({len(pids)})", spread(percents["test"]), blank])


def print_distances(directory, rate, n_seeds):
    """|w(text only) − w(text and a picture)| of the first expert, for each layer of MMA."""
    distances = []
    for seed in range(n_seeds):
        adapter = folder_of(directory, "MMA", f"rate {rate} seed {seed}") / "checkpoint.pth"
        lavin = checkpoints.load(world.PATHS["llama"], world.PATHS["vit"], adapter)
        w = lavin.route()[:, :, 0]                          # (L, 2 modalities)
        distances.append((w[:, 0] - w[:, 1]).abs().tolist())
    print_row(["layer", "distance of the two modalities' weights"])
    print("|---|---|")
    for layer, values in enumerate(zip(*distances), 1):
        mean = sum(values) / len(values)
        print_row([str(layer), f"{mean:.2f} ({min(values):.2f}–{max(values):.2f})"])


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    count = Kind(int, low=1, high=1000).parse
    parser.add_argument("--seeds", type=count, default=5)
    parser.add_argument("--jobs", type=count, default=2, help="runs at a time")
    args = parser.parse_args()
    if not world.SMALL_VIT.exists():
        raise LavinError(f"{world.SMALL_VIT}: no such file; make it first: "
                         "python -m tiny.pretrain small-clip")
    # Make the data first, so that several runs do not try to make them at once.
    world.prepare(argparse.Namespace(data="sqa", **world.PATHS))
    problems, _ = load_sqa(world.PATHS["data_root"], "test")
    pool = ThreadPoolExecutor(args.jobs)
    try:
        rates = choose_rates(args.directory, pool)
        results = measure_all(args.directory, rates, args.seeds, pool)
    finally:
        pool.shutdown(cancel_futures=True)      # after an error, start no more runs
    frozen = measure_llama_alone(args.directory)
    print_variants(args.directory, problems, results, rates, frozen, args.seeds)
    print()
    print_skills(problems, results, args.seeds)
    print()
    print_distances(args.directory, rates["MMA"], args.seeds)


if __name__ == "__main__":
    run(main)
