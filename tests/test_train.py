"""The loop: however a step is split or a run is interrupted, the same numbers."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import adapters
import data
import train
from conftest import ADAPTER, LLAMA, ROOT, VIT, difference
from model import LaVIN

WEIGHTS = ("--llama", LLAMA, "--vit", VIT)


def flags(sqa, out, *more):
    """Three steps an epoch, no scoring, unless `more` says otherwise."""
    return ["--data", "sqa", *WEIGHTS, "--data-root", sqa, "--out", out, "--batch-size", 8, "--workers", 0, "--epochs", 4,
            "--max-seq-len", 160, "--eval-limit", 0, *more]


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Bit-equal: weights, optimizer, losses."""
    left, right = (torch.load(out / "checkpoint.pth", weights_only=False) for out in (a, b))
    assert left["step"] == right["step"]
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name]), name
    for i, state in left["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(right["optimizer"]["state"][i][k])) for k, v in state.items())
    assert [(m["step"], m["loss"], m["lr"]) for m in read_metrics(a)] == [(m["step"], m["loss"], m["lr"]) for m in read_metrics(b)]


def test_micro_batches_do_not_change_the_gradient(sqa):
    _, samples = data.load_sqa(sqa, "train")
    lavin = LaVIN.load(LLAMA, VIT, ADAPTER, max_seq_len=160)
    encoded = [lavin.encode(s) for s in samples]
    gradients, losses, buffer = [], [], train.gradient_buffer(lavin)
    scaler = SimpleNamespace(scale=lambda loss: loss, unscale_=lambda o: None, is_enabled=lambda: False,
                             step=lambda o: None, update=lambda: None)
    for micro_batch in (1, 4, 32):
        plan = data.global_batch(0, [len(e.tokens) for e in encoded], 32, micro_batch, seed=0)
        batches = [data.collate([encoded[i] for i in indices], lavin.resolution) for indices in plan]
        losses.append(train.train_step(lavin, None, scaler, buffer, batches)[0])
        gradients.append({name: g.clone() for name, g in adapters.to_official(lavin, grad=True).items()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert difference(gradient, other[name]) < 1e-5 * max(1, gradient.abs().max()), name
    assert difference(losses, losses[0]) < 1e-5


def test_schedule():
    """The reference's: linear from 0 over 2 of 20 epochs, then half a cosine to 0, per step."""
    args = SimpleNamespace(epochs=20, lr=1.0, warmup=2)
    rates = [train.learning_rate(step, 10, args) for step in range(201)]
    assert rates[0] == 0 and math.isclose(rates[7], 0.7 / 2) and math.isclose(rates[20], 1)
    assert math.isclose(rates[110], 0.5) and abs(rates[200]) < 1e-12 and rates[21:] == sorted(rates[21:], reverse=True)
    args.epochs = 1
    assert math.isclose(train.learning_rate(1, 10, args), 1)          # a tenth of a short run


def test_weight_decay_is_on_matrices_only(lavin):
    decayed, others = (set(group["params"]) for group in train.make_optimizer(lavin).param_groups)
    names = {name for name, p in lavin.named_parameters() if p in others}
    assert names == {name for name, p in lavin.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(decayed) + len(others) == sum(p.requires_grad for p in lavin.parameters())


def test_a_run_from_start_to_table(call, sqa, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = call(train, *flags(sqa, out, "--epochs", 2, "--eval-limit", 5, "--lr", 0.01, "--workers", 1))
    assert (code, stderr) == (0, "")
    for said in ("trained  32,184 parameters", "frozen   692,544 parameters", "24 samples, 12 with a picture", "6 = 2 epochs × 3",
                 "peak lr 0.01", "epoch 2/2", "samples/s", "scoring  5 problems", "NAT"):
        assert said in stdout, said
    *steps, scores = read_metrics(out)
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6] and steps[-1]["loss"] < steps[0]["loss"]
    assert scores["split"] == "val" and scores["step"] == 6 and "AVG" in scores
    config = torch.load(out / "checkpoint.pth", weights_only=False)["config"]
    assert config["llama"] == str(LLAMA) and config["dtype"] == "fp32" and config["lr"] == 0.01


def test_damaged_metrics_do_not_stop_a_resumed_run(call, sqa, tmp_path):
    out = tmp_path / "out"
    assert call(train, *flags(sqa, out, "--max-steps", 2))[0] == 0
    with open(out / "metrics.jsonl", "ab") as metrics:
        metrics.write(b'{bad}\n[1]\n{"step": "x"}\n\xff}\n{"step": 3, "lo')
    assert call(train, "--resume", "--out", out, "--max-steps", 3)[0] == 0
    assert [m["step"] for m in read_metrics(out)] == [1, 2, 3]


def test_a_new_run_keeps_what_an_older_one_left(call, sqa, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        code, stdout, _ = call(train, *flags(sqa, out, "--max-steps", 1))
    assert code == 0 and "checkpoint.pth of an earlier run is now" in stdout
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.pth", "checkpoint.pth.old", "loss.png", "metrics.jsonl", "metrics.jsonl.old"]


@pytest.mark.parametrize("cut", [4, 3], ids=["within an epoch", "between epochs"])
def test_four_steps_and_four_more_are_eight(call, sqa, tmp_path, cut):
    assert call(train, *flags(sqa, tmp_path / "whole", "--max-steps", 8))[0] == 0
    assert call(train, *flags(sqa, tmp_path / "parts", "--max-steps", cut))[0] == 0
    assert call(train, "--resume", "--out", tmp_path / "parts", "--max-steps", 8)[0] == 0      # the rest is in the checkpoint
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM],
                         ids=["SIGKILL", "Ctrl-C", "SIGTERM"])
def test_a_killed_run_resumes_as_if_nothing_had_happened(call, sqa, tmp_path, number):
    """In the middle of an epoch, with a worker, by a signal to the whole process group as a terminal sends it."""
    out = tmp_path / "killed"
    command = [sys.executable, "train.py", *flags(sqa, out, "--epochs", 200, "--save-every", 2, "--workers", 1)]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pth").exists() or len(read_metrics(out)) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, number)
    stdout = process.communicate(timeout=30)[0]
    step = torch.load(out / "checkpoint.pth", weights_only=False)["step"]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and f"stopped after step {step}" in stdout and "Traceback" not in stdout
    else:
        assert process.returncode == -signal.SIGKILL and (step % 2 == 0 or step % 3 == 0)
    assert call(train, "--resume", "--out", out, "--max-steps", step + 3)[0] == 0
    assert call(train, *flags(sqa, tmp_path / "whole", "--epochs", 200, "--max-steps", step + 3))[0] == 0
    assert_same_run(out, tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_the_run(call, sqa, tmp_path):
    code, _, stderr = call(train, *flags(sqa, tmp_path / "out", "--lr", 1e30, "--micro-batch", 8))
    assert code == 2 and len(stderr.splitlines()) == 1
    assert "step 3: the loss is nan on the samples" in stderr and "no checkpoint written" in stderr
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_fp16_scales_its_loss(call, sqa, tmp_path):
    assert call(train, *flags(sqa, tmp_path / "out", "--dtype", "fp16", "--max-steps", 2))[0] == 0
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=False)
    assert checkpoint["scaler"]["scale"] > 0 and checkpoint["config"]["dtype"] == "fp16"
    assert {t.dtype for t in checkpoint["model"].values()} == {torch.float32}


def test_compiled_blocks_train_the_same(call, sqa, tmp_path, monkeypatch):
    """The compiler but for its last part, which takes a minute to write C++: tests/bench.py runs that."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()                # of other tests
    for flag in ("--compile", "--no-compile"):
        code, stdout, _ = call(train, *flags(sqa, tmp_path / flag, "--max-steps", 8, "--batch-size", 7, "--dropout", 0, flag))
        assert code == 0
        if flag == "--compile":                         # not one for every length or number of samples: the ViT's block, and LLaMA's up to its attention
            assert int(stdout.partition("compile  ")[2].partition(" graphs")[0]) <= 13, stdout          # and behind it
    compiled, eager = (read_metrics(tmp_path / flag) for flag in ("--compile", "--no-compile"))
    assert difference([m["loss"] for m in compiled], [m["loss"] for m in eager]) < 1e-5


def test_a_dry_run_tells_memory_and_time_and_writes_nothing(call, sqa, tmp_path):
    code, stdout, _ = call(train, *flags(sqa, tmp_path / "out", "--dry-run"))
    assert code == 0 and "peak memory" in stdout and "12 steps of about" in stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more, helps", [
    ([], "--micro-batch 2, --checkpointing, --bits 8, --bits 4, a lower --max-seq-len"),
    (["--micro-batch", 1, "--checkpointing", "--bits", 4], "a lower --max-seq-len")])
def test_too_little_memory_names_what_would_help(call, sqa, tmp_path, monkeypatch, more, helps):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LaVIN, "forward", forward)
    code, _, stderr = call(train, *flags(sqa, tmp_path / "out", *more))
    assert code == 2 and stderr == f"error: cpu has too little memory for this; what would help: {helps}\n"
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_a_finished_run_whose_log_was_deleted_resumes(call, sqa, tmp_path):
    out = tmp_path / "out"
    assert call(train, *flags(sqa, out, "--max-steps", 1))[0] == 0
    (out / "metrics.jsonl").unlink()
    code, stdout, _ = call(train, "--resume", "--out", out, "--max-steps", 1)
    assert code == 0 and "saved" in stdout


def test_samples_without_an_answer_left_are_counted_and_left_out(call, sqa, tmp_path):
    path = sqa / "problems.json"
    problems = json.loads(path.read_text())
    problems["3"]["question"] = "How " * 200
    path.write_text(json.dumps(problems))
    code, stdout, _ = call(train, *flags(sqa, tmp_path / "out", "--max-steps", 1))
    assert code == 0 and "23 samples, 12 with a picture" in stdout and "cut off entirely: 1" in stdout


def test_dropout_is_on_in_training_and_off_after_loading(lavin, samples):
    batch = lavin.batch(samples)
    assert lavin(batch).item() == lavin(batch).item()
    lavin.train()
    assert lavin(batch).item() != lavin(batch).item()
