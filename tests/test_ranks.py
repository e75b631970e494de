"""Several processes, one run: the same losses, adapters and answers as one process alone.

    python tests/test_ranks.py '[2, RUN, RUN]' '[4, RUN]'

As a script this file is a torchrun that imports PyTorch only once. Each argument is JSON: a number
of ranks, and one or more runs, which these ranks do one after the other. A run is a list: "train"
or "generate", and its flags; or "cut" and the arguments of answer_cut.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from conftest import ADAPTER, LLAMA, ROOT, VIT, difference      # first: it finds our modules

import checkpoints
import generate
import train
from extras import evaluate, terminal
from extras.flags import check_settings
from extras.scienceqa import load_sqa
from fast import ranks
from files import LavinError

SCRIPTS = {"train": train, "generate": generate}
BARS = ("answering:", "choosing:")          # how a line of a progress bar begins


def flags(sqa, out, *more):
    """Six steps of ten samples, three in a micro-batch.

    So the ranks get different numbers of answer tokens and of pictures. At the end of an epoch,
    they also get different numbers of micro-batches.
    """
    flags = [
        "--data", "sqa", "--data-root", sqa, "--llama", LLAMA, "--vit", VIT, "--out", out,
        "--batch-size", 10, "--micro-batch", 3, "--epochs", 2, "--lr", 1e-3, "--dropout", 0,
        "--max-seq-len", 160, "--workers", 0, "--eval-limit", 0, "--device", "cpu", *more]
    return [str(flag) for flag in flags]


def start(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read_run(out):
    """Return (its losses, its trained weights)."""
    losses = [line["loss"] for line in read_metrics(out) if "loss" in line]
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=False)
    return losses, checkpoint["model"]


def assert_equal_runs(out, other_out):
    losses, weights = read_run(out)
    other_losses, other_weights = read_run(other_out)
    assert len(losses) == len(other_losses) == 6
    assert difference(losses, other_losses) < 1e-5
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert difference(weight, other_weights[name]) < 1e-5, name


def test_two_and_four_ranks_do_what_one_does(sqa, tmp_path, call):
    """This includes --fsdp, and a run that changes its number of ranks from 2 to 4 to 1."""
    alone = tmp_path / "alone"
    two = tmp_path / "two"
    two_fsdp = tmp_path / "two-fsdp"
    four = tmp_path / "four"
    four_fsdp = tmp_path / "four-fsdp"
    changed = tmp_path / "changed"
    assert call(train, *flags(sqa, alone))[0] == 0

    on_two = [
        2,
        ["train", *flags(sqa, two)],
        ["train", *flags(sqa, two_fsdp, "--fsdp")],
        ["train", *flags(sqa, changed, "--max-steps", 2)]]
    on_four = [
        4,
        ["train", *flags(sqa, four)],
        ["train", *flags(sqa, four_fsdp, "--fsdp", "--checkpointing")],
        ["train", *flags(sqa, changed, "--resume", "--max-steps", 4, "--fsdp")]]
    result = start(__file__, json.dumps(on_two), json.dumps(on_four))
    assert result.returncode == 0, result.stderr
    for count in (2, 4):                        # once per run, as only rank 0 prints
        line = f"batch    10 in micro-batches of 3 · context 160 tokens · {count} ranks"
        assert result.stdout.count(line) == 3
    assert call(train, *flags(sqa, changed, "--resume"))[0] == 0

    for out in (two, two_fsdp, four, four_fsdp, changed):
        assert_equal_runs(alone, out)


def test_a_rank_that_dies_ends_the_run_with_its_own_error(sqa, tmp_path):
    """One rank finds a broken picture while the other one waits for its gradients."""
    picture = next((sqa / "images" / "train").glob("*/image.png"))
    picture.write_bytes(b"no picture")
    out = tmp_path / "out"
    began = time.perf_counter()
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    result = start(*torchrun, "train.py", *flags(sqa, out))
    assert result.returncode != 0
    assert time.perf_counter() - began < 200
    assert str(picture) in result.stderr
    assert not (out / "checkpoint.pth").exists()


def test_fsdp_without_torchrun_is_refused(sqa, tmp_path, fails):
    fails(train, *flags(sqa, tmp_path / "out", "--fsdp"), says=["torchrun"])
    assert not (tmp_path / "out").exists()


def test_fsdp_with_quantized_matrices_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_settings(train.Settings(fsdp=True))
    with pytest.raises(LavinError, match="--fsdp"):
        check_settings(train.Settings(fsdp=True, bits=8))


# Scores at the end of a run


def scores_of(out):
    """The line that the scores of val are in."""
    (line,) = [line for line in read_metrics(out) if "split" in line]
    return line


def answer_test_split(lavin, sqa):
    """{id: six tokens} of the miniature's test split."""
    _, samples = load_sqa(sqa, "test")
    answers = evaluate.Answers(samples)
    evaluate.answer_all(lavin, samples, answers, "QCM-LEA", 6, batch_size=2)
    outputs = answers.outputs()
    assert len(set(outputs.values())) > 1
    return outputs


def test_ranks_score_val_as_one_does(sqa, tmp_path, call):
    """With and without --fsdp, where the matrices stay cut and all ranks answer together.

    The miniature run learns nothing in three steps. So answers of the golden model are compared
    too, word by word.
    """
    alone = tmp_path / "alone"
    two = tmp_path / "two"
    two_fsdp = tmp_path / "two-fsdp"
    short = ("--epochs", 1, "--eval-limit", 7, "--lr", 0.01)
    code, stdout, _ = call(train, *flags(sqa, alone, *short))
    assert code == 0
    on_two = [
        2,
        ["train", *flags(sqa, two, *short)],
        ["train", *flags(sqa, two_fsdp, *short, "--fsdp")],
        ["cut", str(sqa), str(tmp_path / "cut.json")]]
    result = start(__file__, json.dumps(on_two))
    assert result.returncode == 0, result.stderr
    whole = checkpoints.load(LLAMA, VIT, ADAPTER, max_seq_len=300)
    assert json.loads((tmp_path / "cut.json").read_text()) == answer_test_split(whole, sqa)
    for out in (two, two_fsdp):
        assert scores_of(out) == scores_of(alone)
    table = behind_the_bar(stdout)
    assert "NAT" in table
    assert lines_of(result.stdout).count(table) == 2


# Answers


def lines_of(stdout):
    """What was printed, a progress bar's states on lines of their own; not where it was written."""
    kept = [line for line in stdout.splitlines() if not line.startswith("written:")]
    return "\n".join(kept)


def behind_the_bar(stdout):
    """What was printed once everything was answered: the table, and what counts as wrong."""
    lines = lines_of(stdout).split("\n")
    bars = [number for number, line in enumerate(lines) if line.startswith(BARS)]
    return "\n".join(lines[bars[-1] + 1:])


def questions(tmp_path, sqa, mme):
    """The flags of --data, of every kind. One problem of ScienceQA does not fit the context."""
    rows = tmp_path / "rows.jsonl"
    written = []
    for i in range(7):
        row = {"instruction": f"Name metal {i}.", "output": ("iron", "zinc")[i % 2]}
        written.append(json.dumps(row))
    rows.write_text("\n".join(written))
    captions = tmp_path / "captions.json"
    pictures = sqa / "images" / "test"
    images = []
    for i, picture in enumerate(sorted(pictures.glob("*/image.png"))):
        images.append({"id": i, "file_name": picture.relative_to(pictures).as_posix()})
    captions.write_text(json.dumps({"images": images, "annotations": []}))
    problems = json.loads((sqa / "problems.json").read_text())
    problems["33"]["question"] = "How " * 200
    (sqa / "problems.json").write_text(json.dumps(problems))
    data_root = ("--data-root", sqa)
    return {
        "sqa": ("--data", "sqa", *data_root, "--format", "QCM-ALE", "--by", "subject"),
        "letters": ("--data", "sqa", *data_root, "--format", "QCM-ALE", "--score", "letters"),
        "rows": ("--data", f"jsonl:{rows}"),
        "choices": ("--data", f"jsonl:{rows}", "--score", "choices"),
        "mme": ("--data", f"mme:{mme}"),
        "captions": ("--data", f"caption:{captions}:{pictures}", "--prompt", "Describe it."),
    }


def ask(asked, path):
    model = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)
    how = ["--batch-size", 2, "--workers", 0, "--device", "cpu", "--max-seq-len", 300]
    if "--score" not in asked:
        how += ["--max-new-tokens", 5]
    return [str(flag) for flag in (*model, *how, *asked, "--predictions", path)]


def test_ranks_answer_as_one_does(sqa, mme, tmp_path, call):
    """The same table and the same --predictions, of every kind of --data."""
    asked = questions(tmp_path, sqa, mme)
    reports = {}
    for name, flags_of_data in asked.items():
        code, stdout, _ = call(generate, *ask(flags_of_data, tmp_path / f"1-{name}.json"))
        assert code == 0
        reports[name] = behind_the_bar(stdout)
    arguments = []
    for count in (2, 4):
        runs = []
        for name, flags_of_data in asked.items():
            runs.append(["generate", *ask(flags_of_data, tmp_path / f"{count}-{name}.json")])
        arguments.append(json.dumps([count, *runs]))
    result = start(__file__, *arguments)
    assert result.returncode == 0, result.stderr

    printed = lines_of(result.stdout)
    assert printed.count("1 prompts do not fit the context") == 2 * 2   # twice by 2 ranks and by 4
    for name in asked:
        for count in (2, 4):
            alone = (tmp_path / f"1-{name}.json").read_text()
            assert (tmp_path / f"{count}-{name}.json").read_text() == alone, name
    for name in ("sqa", "letters", "rows", "choices", "mme"):       # captions have no table
        assert reports[name] != ""
        assert printed.count(reports[name]) == 2, name


def test_a_picture_that_cannot_be_decoded_is_reported_once(sqa, mme, tmp_path, call):
    asked = questions(tmp_path, sqa, mme)["sqa"]
    pictures = sorted((sqa / "images" / "test").glob("*/image.png"))
    for picture in pictures[:3]:
        picture.write_bytes(b"no picture")
    code, _, stderr = call(generate, *ask(asked, tmp_path / "alone.json"))
    assert code == 2
    result = start(__file__, json.dumps([2, ["generate", *ask(asked, tmp_path / "two.json")]]))
    assert result.returncode == 1
    assert result.stderr == "rank 0: " + stderr
    assert (tmp_path / "two.json").read_text() == (tmp_path / "alone.json").read_text()


def test_a_rank_that_fails_ends_the_others(sqa, mme, tmp_path):
    """Rank 1 has another context, in which no picture has room. Each rank ends in one line."""
    asked = ask(questions(tmp_path, sqa, mme)["sqa"], tmp_path / "predictions.json")
    run = ["generate", *asked, "rank 1 alone", "--max-seq-len", "5"]
    result = start(__file__, json.dumps([2, run]))
    assert result.returncode == 1
    lines = sorted(result.stderr.splitlines())
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("rank 0: error: another rank has ended")
    assert lines[1].startswith("rank 1: error: --max-seq-len 5 has no room for text")


def test_the_others_hear_that_rank_0_has_ended(monkeypatch):
    """Rank 1 waits in `first` until rank 0 is done. Here rank 0 ends before that."""
    def fail():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "barrier", fail)
    with pytest.raises(LavinError, match="another rank has ended"), ranks.rank_0_first():
        pass


@pytest.mark.parametrize("mode", [
    ["--prompt", "x"], ["--chat"], ["--serve", 0], ["--show-routing"]])
def test_torchrun_is_for_data_sets(fails, monkeypatch, mode):
    """`fails` wants one line, that of this rank."""
    monkeypatch.setattr(ranks, "count", lambda: 2)
    fails(generate, *mode, "--llama", LLAMA, "--vit", VIT, says=["torchrun", "without it"])


# What the script does


def check_sharded(block):
    """--fsdp shards the frozen matrices. It must leave everything else whole."""
    sharded = set()
    frozen_matrices = set()
    for name, p in block.named_parameters():
        if hasattr(p, "to_local"):
            sharded.add(name)
        if not p.requires_grad and p.dim() > 1:
            frozen_matrices.add(name)
    assert sharded == frozen_matrices, sharded


def answer_cut(sqa, path):
    """Answer with the golden model, cut into a part for each rank; rank 0 writes the answers."""
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER, max_seq_len=300, fsdp=True)
    outputs = answer_test_split(lavin, sqa)
    if ranks.rank() == 0:
        Path(path).write_text(json.dumps(outputs))


def run_rank(rank, count, meeting, runs):
    """What torchrun and the scripts do, in this process; the ranks meet once for all runs."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    leave = torch.distributed.destroy_process_group
    shard = ranks.shard

    def do_nothing(*args, **how):
        pass

    def checked_shard(block, device):
        shard(block, device)
        check_sharded(block)

    torch.distributed.init_process_group = do_nothing
    torch.distributed.destroy_process_group = do_nothing
    ranks.shard = checked_shard
    for script, *argv in runs:
        if script == "cut":
            answer_cut(*argv)
            continue
        if "rank 1 alone" in argv:      # what stands behind it is for that rank
            place = argv.index("rank 1 alone")
            argv = argv[:place] + (argv[place + 1:] if rank == 1 else [])
        sys.argv = [f"{script}.py", *argv]
        terminal.run(SCRIPTS[script].main)
    leave()                         # gloo's threads abort a process that ends without it


def run_ranks(count, runs):
    """Run all ranks -> whether all of them succeeded."""
    context = torch.multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(count):
            args = (rank, count, f"{folder}/meeting", runs)
            process = context.Process(target=run_rank, args=args)
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
    return all(process.exitcode == 0 for process in processes)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        count, *runs = json.loads(argument)
        if not run_ranks(count, runs):
            sys.exit(1)
