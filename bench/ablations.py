"""What each part of MMA is worth, measured on the small world over several seeds.

    python -m bench.ablations DIRECTORY [--seeds 3] [--jobs 2]

It trains LaVIN as it is, without routing, with adapters in LLaMA only, and with the projector only.
Two controls show what can be answered without looking: LaVIN with blank pictures, and LLaMA alone.
Two Markdown tables are printed, one by ScienceQA's columns and one by skill.

train.py and generate.py run as a person would run them, and write into DIRECTORY. What is there
already is not done again. With 3 seeds it takes about a quarter of an hour on two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from extras.evaluate import sqa_scores
from extras.scienceqa import load_sqa
from extras.terminal import Parser, run
from tiny import world

ROOT = Path(__file__).absolute().parent.parent
VARIANTS = {
    "MMA": [],
    "without routing": ["--no-routing"],
    "adapters in LLaMA only": ["--adapters", "llama"],
    "projector only": ["--adapters", "none"],
}
COLUMNS = ("IMG", "TXT", "NO", "AVG")


def call(script: str, *flags) -> float:
    """Run a script on ScienceQA's data -> the seconds that it took."""
    command = [sys.executable, ROOT / script, "--data", "sqa"]
    for flag in flags:
        command.append(str(flag))
    # The models are small and the runs are side by side, so each gets one thread.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


def read_results(path: Path) -> dict[str, int]:
    """What generate.py --predictions wrote -> {id: index of the choice}."""
    return json.loads(path.read_text())["results"]


def measure(directory: Path, variant: str, seed: int) -> dict[str, dict]:
    """Train, and answer the test split with its pictures and with blank ones.

    -> {"test": {id: index of the choice}, "blank": the same}. seconds.json is written last, so a
    folder that has it is complete.
    """
    out = directory / f"{variant.replace(' ', '-')}-{seed}"
    adapter = out / "checkpoint.pth"
    if not (out / "seconds.json").exists():
        seconds = {}
        seconds["train"] = call(
            "train.py", "--out", out, "--seed", seed, "--eval-limit", 0, *VARIANTS[variant])
        seconds["test"] = call(
            "generate.py", "--adapter", adapter, "--predictions", out / "test.json")
        seconds["blank"] = call(
            "generate.py", "--adapter", adapter, "--blank-images",
            "--predictions", out / "blank.json")
        (out / "seconds.json").write_text(json.dumps(seconds))
    return {
        "test": read_results(out / "test.json"),
        "blank": read_results(out / "blank.json"),
    }


def measure_all(directory: Path, n_seeds: int, n_jobs: int) -> dict[tuple, dict]:
    """{(variant, seed): what `measure` returns}, n_jobs runs at a time."""
    futures = {}
    results = {}
    with ThreadPoolExecutor(n_jobs) as pool:
        for variant in VARIANTS:
            for seed in range(n_seeds):
                futures[variant, seed] = pool.submit(measure, directory, variant, seed)
        for key, future in futures.items():
            results[key] = future.result()
    return results


def measure_llama_alone(directory: Path) -> dict[str, int]:
    """The answers of LLaMA without LaVIN's adapters, which sees no picture."""
    path = directory / "frozen.json"
    if not path.exists():
        call("generate.py", "--adapter", "none", "--predictions", path)
    return read_results(path)


def spread(values: list[float]) -> str:
    """Mean and range of percentages."""
    mean = sum(values) / len(values)
    return f"{mean:.1f} ({min(values):.1f}–{max(values):.1f})"


def print_row(cells):
    print(f"| {' | '.join(cells)} |")


def print_variants(problems, results, frozen, n_seeds):
    """The table by ScienceQA's columns: a row for each variant, mean and range over the seeds."""
    print_row(["", *COLUMNS])
    print("|---|" + "---|" * len(COLUMNS))
    rows = [(variant, variant, "test") for variant in VARIANTS]
    rows.insert(1, ("MMA, pictures blanked", "MMA", "blank"))
    for label, variant, kind in rows:
        scores = []
        for seed in range(n_seeds):
            scores.append(sqa_scores(problems, results[variant, seed][kind]))
        cells = [spread([score[column] for score in scores]) for column in COLUMNS]
        print_row([label, *cells])
    frozen_scores = sqa_scores(problems, frozen)
    print_row(["LLaMA alone", *[f"{frozen_scores[column]:.1f}" for column in COLUMNS]])


def percent_right(problems, pids, predictions):
    right = sum(predictions[pid] == problems[pid]["answer"] for pid in pids)
    return 100 * right / len(pids)


def print_skills(problems, results, n_seeds):
    """The table by skill: MMA with its pictures and with blank ones; picture skills come first."""
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


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    # Made here, the data need not be made by several runs at once.
    world.prepare(argparse.Namespace(data="sqa", llama=None, vit=None, data_root=None))
    problems, _ = load_sqa(world.PATHS["data_root"], "test")
    results = measure_all(args.directory, args.seeds, args.jobs)
    frozen = measure_llama_alone(args.directory)
    print_variants(problems, results, frozen, args.seeds)
    print()
    print_skills(problems, results, args.seeds)


if __name__ == "__main__":
    run(main)
