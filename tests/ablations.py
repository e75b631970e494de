"""The embedded default measured: MMA, its control and its ablations, over seeds. Prints README's tables.

    python tests/ablations.py DIRECTORY [--seeds 3] [--jobs 2]

Runs train.py and generate.py as a person would, into DIRECTORY; what is already there is not done again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import tiny  # noqa: E402

VARIANTS = {"MMA": [], "without routing": ["--no-routing"], "adapters in LLaMA only": ["--adapters", "llama"],
            "projector only": ["--adapters", "none"]}


def call(script, *flags):
    """-> seconds that it took. One thread each: the models are small, and the runs stand side by side."""
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / script, "--data", "sqa", *map(str, flags)], check=True,
                   stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return time.perf_counter() - began


def measure(directory, variant, seed):
    """Train, then answer the test split as it is and with the pictures blanked; leaves seconds.json last."""
    out = directory / f"{variant.replace(' ', '-')}-{seed}"
    if not (out / "seconds.json").exists():
        adapter = ["--adapter", out / "checkpoint.pth"]
        seconds = {"train": call("train.py", "--out", out, "--seed", seed, "--eval-limit", 0, *VARIANTS[variant])}
        seconds["test"] = call("generate.py", *adapter, "--predictions", out / "test.json")
        seconds["blank"] = call("generate.py", *adapter, "--blank-images", "--predictions", out / "blank.json")
        (out / "seconds.json").write_text(json.dumps(seconds))
    return {kind: json.loads((out / f"{kind}.json").read_text())["results"] for kind in ("test", "blank")}


def spread(values):
    """Mean and range of a list of percentages."""
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    tiny.prepare(argparse.Namespace(data="sqa", llama=None, vit=None, data_root=None))
    problems, _ = data.load_sqa(tiny.PATHS["data_root"], "test")
    runs = [(variant, seed) for variant in VARIANTS for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(runs, pool.map(lambda run: measure(args.directory, *run), runs)))
    if not (args.directory / "frozen.json").exists():
        call("generate.py", "--adapter", "none", "--predictions", args.directory / "frozen.json")
    frozen = data.sqa_scores(problems, json.loads((args.directory / "frozen.json").read_text())["results"])

    columns = ("IMG", "TXT", "NO", "AVG")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for variant in VARIANTS:
        for kind in ("test", "blank") if variant == "MMA" else ("test",):
            scores = [data.sqa_scores(problems, results[variant, seed][kind]) for seed in range(args.seeds)]
            label = variant + (", pictures blanked" if kind == "blank" else "")
            print(f"| {label} | " + " | ".join(spread([s[c] for s in scores]) for c in columns) + " |")
    print("| LLaMA alone | " + " | ".join(f"{frozen[c]:.1f}" for c in columns) + " |")

    print("\n| skill | MMA | pictures blanked |\n|---|---|---|")
    for _, skill in sorted({(p["image"] is None, p["skill"]) for p in problems.values()}):      # with pictures first
        pids = [pid for pid, p in problems.items() if p["skill"] == skill]
        percent = {kind: [100 * sum(results["MMA", seed][kind][pid] == problems[pid]["answer"] for pid in pids) / len(pids)
                          for seed in range(args.seeds)] for kind in ("test", "blank")}
        blank = spread(percent["blank"]) if problems[pids[0]]["image"] else ""
        print(f"| {skill} ({len(pids)}) | {spread(percent['test'])} | {blank} |")


if __name__ == "__main__":
    main()
