"""The training loop gives the same numbers, however steps are split and runs interrupted."""

import dataclasses
import functools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoints
import data
import generate
import train
from conftest import ADAPTER, LLAMA, ROOT, VIT, difference, flags
from extras import runs
from extras.resume import FIXED, ONCE
from extras.scienceqa import load_sqa
from fast import ranks
from helpers import assert_same_run, checkpoint_of, read_metrics
from model import LaVIN


# One step


def test_micro_batches_do_not_change_the_gradient(sqa):
    _, samples = load_sqa(sqa, "train")
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER, max_seq_len=160)
    encoded = [lavin.encode(sample) for sample in samples]
    lengths = [len(e.tokens) for e in encoded]
    optimizer = train.make_optimizer(lavin, train.Settings())       # learning rate 0
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    buffer = ranks.gradient_buffer(lavin)
    losses = []
    gradients = []
    for micro_batch in (1, 4, 32):
        batches = []
        for indices in data.global_batch(0, lengths, 32, micro_batch, seed=0):
            chosen = [encoded[i] for i in indices]
            batches.append(data.collate(chosen, lavin.resolution))
        loss, _ = train.train_step(lavin, optimizer, scaler, buffer, batches)
        losses.append(loss)
        named = checkpoints.to_official(lavin, grad=True)
        gradients.append({name: gradient.clone() for name, gradient in named.items()})
    assert difference(losses, losses[0]) < 1e-5
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            largest = gradient.abs().max()
            error = difference(gradient, other[name])
            assert error < 1e-5 * max(1, largest), name
            assert error < 5e-5 * largest, name         # of a small gradient, too


def test_schedule():
    """It is the authors': linear from 0 over 2 of 20 epochs, then half a cosine to 0."""
    settings = train.Settings(epochs=20, lr=1.0, warmup=2)
    rates = [train.learning_rate(step, 10, settings) for step in range(201)]
    assert rates[0] == 0
    assert math.isclose(rates[7], 0.7 / 2)
    assert math.isclose(rates[20], 1)
    assert math.isclose(rates[110], 0.5)
    assert abs(rates[200]) < 1e-12
    assert rates[21:] == sorted(rates[21:], reverse=True)
    settings.epochs = 1                     # the warm-up is at most a tenth of the run
    assert math.isclose(train.learning_rate(1, 10, settings), 1)


def test_weight_decay_is_on_matrices_only(lavin):
    optimizer = train.make_optimizer(lavin, train.Settings())
    decay, no_decay = optimizer.param_groups
    assert decay["weight_decay"] == 0.02 and no_decay["weight_decay"] == 0
    without_decay = set(no_decay["params"])
    n_trained = 0
    for name, p in lavin.named_parameters():
        n_trained += p.requires_grad
        is_trained_bias = p.requires_grad and name.endswith("bias")
        assert (p in without_decay) == is_trained_bias, name
    assert len(decay["params"]) + len(without_decay) == n_trained


def test_dropout_is_on_in_training_and_off_after_loading(lavin, samples):
    batch = lavin.batch(samples)
    assert lavin(batch).item() == lavin(batch).item()
    lavin.train()
    assert lavin(batch).item() != lavin(batch).item()


# A run


def test_a_run_from_start_to_table(call, sqa, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = call(train, *flags(
        sqa, out, "--epochs", 2, "--eval-limit", 5, "--lr", 0.01, "--workers", 1))
    assert (code, stderr) == (0, "")
    assert "trained  32,184 parameters" in stdout
    assert "frozen   692,544 parameters" in stdout
    assert "24 samples, 12 with a picture" in stdout
    assert "6 = 2 epochs × 3" in stdout
    assert "peak lr 0.01" in stdout
    assert "epoch 2/2" in stdout
    assert "samples/s" in stdout
    assert "scoring  5 problems" in stdout
    assert "NAT" in stdout
    *steps, scores = read_metrics(out)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert scores["split"] == "val" and scores["step"] == 6 and "AVG" in scores
    config = checkpoint_of(out)["config"]
    assert config["llama"] == str(LLAMA)
    assert config["dtype"] == "fp32"
    assert config["lr"] == 0.01


def test_samples_without_an_answer_left_are_counted_and_left_out(call, sqa, tmp_path):
    path = sqa / "problems.json"
    problems = json.loads(path.read_text())
    problems["3"]["question"] = "How " * 200
    path.write_text(json.dumps(problems))
    code, stdout, _ = call(train, *flags(sqa, tmp_path / "out", "--max-steps", 1))
    assert code == 0
    assert "23 samples, 12 with a picture" in stdout
    assert "1 left out because their answer is cut off entirely" in stdout


def test_a_new_run_keeps_what_an_older_one_left(call, sqa, trained):
    out = trained(1)
    code, stdout, _ = call(train, *flags(sqa, out, "--max-steps", 1))
    assert code == 0
    assert "checkpoint.pth of an earlier run is now" in stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pth", "checkpoint.pth.old", "loss.png", "metrics.jsonl", "metrics.jsonl.old"]


def kept_epochs(out):
    """The numbers of the epochs whose checkpoints were kept."""
    return sorted(int(path.stem.split("-")[1]) for path in out.glob("checkpoint-*.pth"))


def test_every_whole_epoch_is_kept(call, sqa, tmp_path):
    """The run has 3 steps per epoch and two parts. The first part ends within an epoch."""
    out = tmp_path / "out"
    assert call(train, *flags(sqa, out, "--keep-epochs", "--max-steps", 7))[0] == 0
    assert kept_epochs(out) == [0, 1]
    second = out / "checkpoint-1.pth"
    assert torch.load(second, weights_only=False)["step"] == 6
    assert torch.load(second, weights_only=False)["epoch"] == 1
    before = second.stat()

    assert call(train, "--resume", "--out", out, "--max-steps", 9)[0] == 0
    assert kept_epochs(out) == [0, 1, 2]
    assert second.stat().st_ino == before.st_ino            # the file was not rewritten
    assert second.stat().st_mtime_ns == before.st_mtime_ns
    assert (out / "checkpoint-2.pth").read_bytes() == (out / "checkpoint.pth").read_bytes()

    code, stdout, _ = call(train, *flags(sqa, out, "--keep-epochs", "--max-steps", 3))
    assert code == 0
    assert "checkpoint-2.pth is now" in stdout              # the earlier run's
    assert kept_epochs(out) == [0]
    assert (out / "checkpoint-2.pth.old").exists()


def test_without_the_flag_no_epoch_is_kept(call, sqa, tmp_path):
    out = tmp_path / "out"
    assert call(train, *flags(sqa, out, "--max-steps", 3))[0] == 0
    assert kept_epochs(out) == []


def test_a_loss_that_is_not_finite_stops_the_run(call, sqa, tmp_path):
    out = tmp_path / "out"
    code, _, stderr = call(train, *flags(sqa, out, "--lr", 1e30, "--micro-batch", 8))
    assert code == 2
    assert len(stderr.splitlines()) == 1
    assert "step 3: the loss is nan on the samples" in stderr
    assert "stopped without saving" in stderr
    assert not (out / "checkpoint.pth").exists()


def test_fp16_scales_its_loss(call, sqa, tmp_path):
    out = tmp_path / "out"
    assert call(train, *flags(sqa, out, "--dtype", "fp16", "--max-steps", 2))[0] == 0
    checkpoint = checkpoint_of(out)
    assert checkpoint["scaler"]["scale"] > 0
    assert checkpoint["config"]["dtype"] == "fp16"
    assert {weight.dtype for weight in checkpoint["model"].values()} == {torch.float32}


def test_bf16_trains_about_the_same(call, sqa, tmp_path):
    losses = []
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        assert call(train, *flags(sqa, out, "--dtype", dtype, "--max-steps", 4))[0] == 0
        losses.append(torch.tensor([line["loss"] for line in read_metrics(out)]))
    assert 0 < difference(losses[0], losses[1]) < 0.02 * losses[0].max()


def test_a_run_in_4_bits_is_resumed_and_asked_in_4_bits(call, sqa, tmp_path, monkeypatch):
    loaded = []
    load = checkpoints.load

    def watched(*args, **settings):
        loaded.append(settings["bits"])
        return load(*args, **settings)

    monkeypatch.setattr(checkpoints, "load", watched)
    out = tmp_path / "out"
    assert call(train, *flags(
        sqa, out, "--bits", 4, "--checkpointing", "--max-steps", 2))[0] == 0
    assert call(train, "--resume", "--out", out, "--max-steps", 3)[0] == 0
    assert checkpoint_of(out)["step"] == 3
    adapter = out / "checkpoint.pth"
    assert call(generate, "--adapter", adapter, "--prompt", "x", "--max-new-tokens", 2)[0] == 0
    assert loaded == [4, 4, 4]


def test_compiled_blocks_train_the_same(call, sqa, tmp_path, monkeypatch):
    """The compiler runs without its last part, which writes C++ and takes a minute.

    bench/speed.py runs that part, too.
    """
    compile_module = torch.nn.Module.compile

    def compile_without_cpp(module, **how):
        compile_module(module, backend="eager", **how)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_cpp)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()        # from other tests
    run = ("--max-steps", 8, "--batch-size", 7, "--dropout", 0)
    code, stdout, _ = call(train, *flags(sqa, tmp_path / "compiled", *run, "--compile"))
    assert code == 0
    # There is one graph for the ViT's block and two for LLaMA's, up to its attention and after it.
    # Each has a few variants.
    n_graphs = int(stdout.partition("compile  ")[2].partition(" graphs")[0])
    # It is 13 today. There must not be one for each length or number of samples.
    assert n_graphs <= 13, stdout
    assert call(train, *flags(sqa, tmp_path / "eager", *run, "--no-compile"))[0] == 0
    compiled = [line["loss"] for line in read_metrics(tmp_path / "compiled")]
    eager = [line["loss"] for line in read_metrics(tmp_path / "eager")]
    assert difference(compiled, eager) < 1e-5


def test_a_dry_run_reports_memory_and_time_and_writes_nothing(call, sqa, tmp_path):
    code, stdout, _ = call(train, *flags(sqa, tmp_path / "out", "--dry-run"))
    assert code == 0
    assert "peak memory" in stdout
    assert "12 steps of about" in stdout
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_dry_run_can_be_sent_to_workers():
    """Where processes are spawned, as on macOS, workers get it as a pickle."""
    settings = train.Settings(batch_size=2, micro_batch=1)
    plan = functools.partial(
        train.plan_dry_run, longest=[3, 1], lengths=[5, 8, 6, 9], settings=settings)
    plan = pickle.loads(pickle.dumps(plan))
    assert sorted(i for indices in plan(0) for i in indices) == [1, 3]
    assert len(plan(1)) == 2


def test_ranks_without_work_are_reported(capsys, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 16)
    runs.print_batch(train.Settings(batch_size=32, micro_batch=4))
    assert "note     8 of 16 ranks have work in each step" in capsys.readouterr().out
    runs.print_batch(train.Settings(batch_size=32, micro_batch=2))
    assert "note" not in capsys.readouterr().out


def test_a_run_that_left_nothing_does_not_replace_an_older_one(tmp_path):
    """Its metrics are dropped. The older run's stay beside the older run's checkpoint."""
    for name in ("checkpoint.pth.old", "metrics.jsonl.old", "metrics.jsonl"):
        (tmp_path / name).write_text(name)
    runs.set_aside(train.Settings(out=str(tmp_path)))
    assert (tmp_path / "metrics.jsonl.old").read_text() == "metrics.jsonl.old"


@pytest.mark.parametrize("more, helps", [
    ([], "--micro-batch 2, --checkpointing, --bits 8, --bits 4, a lower --max-seq-len"),
    (["--micro-batch", 1, "--checkpointing", "--bits", 4], "a lower --max-seq-len"),
])
def test_too_little_memory_names_what_would_help(call, sqa, tmp_path, monkeypatch, more, helps):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LaVIN, "forward", forward)
    out = tmp_path / "out"
    code, _, stderr = call(train, *flags(sqa, out, *more))
    assert code == 2
    assert stderr == f"error: cpu has too little memory for this; try {helps}\n"
    assert not (out / "checkpoint.pth").exists()


# Flags and their defaults


def test_a_run_starts_from_the_weights_of_adapter(call, trained, sqa, tmp_path):
    """The first step of a run has the learning rate 0, so it changes no weight."""
    out = tmp_path / "out"
    assert call(train, *flags(sqa, out, "--max-steps", 1, "--adapter", ADAPTER))[0] == 0
    given = torch.load(ADAPTER, weights_only=False)["model"]
    fresh = checkpoint_of(trained(1))["model"]
    saved = checkpoint_of(out)["model"]
    assert saved.keys() == given.keys()
    for name, weight in saved.items():
        assert torch.equal(weight, given[name].float()), name
    assert not all(torch.equal(weight, saved[name]) for name, weight in fresh.items())


@pytest.mark.parametrize("source, epochs, warmup", [("sqa", 20, 2), ("jsonl:mine.jsonl", 15, 0.2)])
def test_the_defaults_are_the_papers(monkeypatch, source, epochs, warmup):
    """With real weights, README names them for ScienceQA. The small world has others."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", source, "--llama", "7B"])
    settings, _ = train.parse_args()
    assert (settings.epochs, settings.warmup) == (epochs, warmup)
    assert settings.batch_size == 32
    assert settings.lr == pytest.approx(1.125e-3)
    assert settings.weight_decay == 0.02


# Resuming


@pytest.mark.parametrize("cut", [4, 3], ids=["within an epoch", "between epochs"])
def test_a_run_in_two_parts_is_the_unbroken_run(call, trained, cut):
    whole = trained(8)
    parts = trained(cut)
    # --resume takes all other settings from the checkpoint.
    assert call(train, "--resume", "--out", parts, "--max-steps", 8)[0] == 0
    assert_same_run(whole, parts)


def test_flags_for_speed_and_memory_may_change_at_resume(call, sqa, tmp_path):
    """Without dropout they change the weights only by rounding."""
    runs_of = {"same": [], "other": ["--micro-batch", 2, "--checkpointing", "--workers", 1]}
    weights = {}
    for name, more in runs_of.items():
        out = tmp_path / name
        assert call(train, *flags(sqa, out, "--dropout", 0, "--max-steps", 2))[0] == 0
        assert call(train, "--resume", "--out", out, "--max-steps", 4, *more)[0] == 0
        weights[name] = checkpoint_of(out)["model"]
    for name, weight in weights["same"].items():
        assert difference(weight, weights["other"][name]) < 1e-5, name


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["SIGKILL", "Ctrl-C", "SIGTERM"])
def test_a_killed_run_resumes_as_if_nothing_had_happened(call, sqa, tmp_path, number):
    """The run is killed in the middle of an epoch, with a worker.

    The signal goes to the whole process group, as a terminal sends it.
    """
    out = tmp_path / "killed"
    command = [sys.executable, "train.py", *flags(
        sqa, out, "--epochs", 200, "--save-every", 2, "--workers", 1)]
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pth").exists() or len(read_metrics(out)) < 4:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    stdout = process.communicate(timeout=30)[0]

    step = checkpoint_of(out)["step"]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert step % 2 == 0 or step % 3 == 0           # saved every second step and every epoch
    else:
        assert process.returncode == 128 + number
        assert f"stopped after step {step}" in stdout
        assert "Traceback" not in stdout
    assert call(train, "--resume", "--out", out, "--max-steps", step + 3)[0] == 0
    whole = tmp_path / "whole"
    assert call(train, *flags(sqa, whole, "--epochs", 200, "--max-steps", step + 3))[0] == 0
    assert_same_run(out, whole)


def test_damaged_metrics_do_not_stop_a_resumed_run(call, trained):
    out = trained(2)
    with open(out / "metrics.jsonl", "ab") as metrics:
        metrics.write(b'{bad}\n[1]\n{"step": "x"}\n\xff}\n{"step": 3, "lo')
    assert call(train, "--resume", "--out", out, "--max-steps", 3)[0] == 0
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3]


def test_a_finished_run_whose_log_was_deleted_resumes(call, trained):
    out = trained(1)
    (out / "metrics.jsonl").unlink()
    code, stdout, stderr = call(train, "--resume", "--out", out, "--max-steps", 1)
    assert (code, stderr) == (0, "")
    assert "saved" not in stdout            # no step was left
    assert "nothing to train" in stdout


# Settings that are missing in the checkpoints of earlier versions.
ADDED_WITH_SEVERAL_SOURCES = (
    "weights", "multi_turn", "skip_bad", "val_fraction", "warmup", "delta", "adapter", "adapters",
    "routing", "bits", "fsdp", "dry_run")
ADDED_LATER = ("weight_decay", "betas", "check")


@pytest.mark.parametrize("missing, source", [
    (ADDED_LATER, ["sqa"]),
    (ADDED_LATER, "sqa"),
    ((*ADDED_WITH_SEVERAL_SOURCES, *ADDED_LATER), "sqa"),
], ids=["several sources", "one source", "the first version"])
def test_a_checkpoint_of_an_earlier_version_resumes(call, trained, missing, source):
    whole = trained(8)
    older = trained(4)
    checkpoint = checkpoint_of(older)
    config = checkpoint["config"]
    for name in missing:
        del config[name]
    config["data"] = source
    config["no_longer_a_setting"] = 1
    assert config["n_samples"] == 24
    torch.save(checkpoint, older / "checkpoint.pth")
    code, stdout, stderr = call(train, "--resume", "--out", older, "--max-steps", 8)
    assert (code, stderr) == (0, "")
    assert_same_run(whole, older)
    config = checkpoint_of(older)["config"]
    assert config["data"] == ["sqa"]
    assert config["betas"] == (0.9, 0.95) and config["weight_decay"] == 0.02
    assert "no_longer_a_setting" not in config


def test_an_earlier_version_is_held_to_its_settings_as_well(call, trained):
    """If its checkpoint does not name a setting, the setting had its default."""
    out = trained(1)
    checkpoint = checkpoint_of(out)
    del checkpoint["config"]["bits"]
    torch.save(checkpoint, out / "checkpoint.pth")
    code, _, stderr = call(train, "--resume", "--out", out, "--bits", 8)
    assert code == 2
    assert "was trained with bits 16, not 8" in stderr


def test_every_setting_is_fixed_or_taken_anew_or_free_at_resume():
    """Each new setting needs this decision. A free setting may change without an error."""
    free = {"skip_bad", "micro_batch", "weight_decay", "betas", "llama", "vit", "delta",
            "data_root", "checkpointing", "workers", "save_every", "keep_epochs", "tensorboard",
            "eval_limit", "n_samples", "data_hash", "llama_hash", "vit_hash"}
    names = {setting.name for setting in dataclasses.fields(train.Settings)}
    assert set(FIXED) | set(ONCE) | free == names
    assert not set(FIXED) & set(ONCE)
