"""--resume checks everything: a run goes on as before, or ends in one line and loses nothing."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import checkpoints
import train
from adapters import AdapterConfig
from conftest import ADAPTER, LLAMA, ROOT, VIT, flags, wait_for_torch
from extras import resume, runs
from files import LavinError, tokenizer_path
from helpers import checkpoint_of, edit
from model import LLaMA


@pytest.fixture
def finished_run(trained):
    """The folder of a run of one step."""
    return trained(1)


def test_nothing_to_resume(fails, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "none", "--resume"), says=[
        "--resume", "none/checkpoint.pth"])


def test_a_resumed_run_cannot_become_another(fails, sqa, finished_run):
    before = (finished_run / "checkpoint.pth").read_bytes()
    for flag, value in [
        ("--batch-size", 4), ("--epochs", 5), ("--lr", 0.5), ("--format", "QCM-A"),
        ("--max-seq-len", 99), ("--tau", 5.0), ("--dtype", "bf16"),
    ]:
        name = flag.removeprefix("--").replace("-", "_")
        fails(train, "--resume", "--out", finished_run, flag, value, says=[
            "--resume", f"was trained with {name} ", f", not {value}; leave the flag out"])
    edit(sqa / "pid_splits.json", lambda splits: splits["train"].pop())
    fails(train, "--resume", "--out", finished_run, says=[
        "--resume", "was trained on 24 samples, not 23"])
    assert (finished_run / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("name", resume.FIXED)
def test_every_fixed_setting_refuses_another_value(name):
    before = vars(train.Settings())
    resume.check_unchanged(train.Settings(), before, train.Settings())
    changed = train.Settings(**{name: "another"})
    with pytest.raises(LavinError, match=f"was trained with {name} .*, not another; leave"):
        resume.check_unchanged(changed, before, train.Settings())


def test_the_hash_of_the_data_is_that_of_older_checkpoints(lavin, samples):
    """In older checkpoints, a label without loss is 0."""
    encoded = [lavin.encode(sample) for sample in samples]
    assert runs.TrainingSet(encoded, [4], {}).hash() == "8b0705faf8be406d"


def write_narrow_llama(directory):
    """Write a LLaMA of half the width, cut out of LLAMA."""
    directory.mkdir()
    params = json.loads((LLAMA / "params.json").read_text()) | {"dim": 32}
    (directory / "params.json").write_text(json.dumps(params))
    whole = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
    with torch.device("meta"):
        narrow = LLaMA(checkpoints.read_params(directory, 512), AdapterConfig())
    tensors = {}
    for name, p in narrow.named_parameters():
        if name in whole:
            corner = tuple(slice(size) for size in p.shape)
            tensors[name] = whole[name][corner].clone()
    torch.save(tensors, directory / "consolidated.00.pth")
    shutil.copy(tokenizer_path(LLAMA), directory)


def test_a_run_does_not_resume_on_another_llama(fails, tmp_path, finished_run):
    write_narrow_llama(tmp_path / "other")
    fails(train, "--resume", "--out", finished_run, "--llama", tmp_path / "other", says=[
        "checkpoint.pth was trained with another LLaMA"])


def test_what_train_did_not_write_is_not_resumed(fails, finished_run):
    path = finished_run / "checkpoint.pth"
    checkpoint = torch.load(path, weights_only=False)
    for change, says in [
        ({"optimizer": {}}, "no optimizer state for this model"),
        ({"config": [1]}, "was not written by train.py"),
        ({"step": "x"}, "was not written by train.py"),
        ({"step": True}, "was not written by train.py"),
        ({"step": 0}, "after step 0, but the run has steps 1 to 12"),
        ({"step": 13}, "after step 13, but the run has steps 1 to 12"),
    ]:
        torch.save(checkpoint | change, path)
        fails(train, "--resume", "--out", finished_run, says=["checkpoint.pth", says])
    shutil.copy(ADAPTER, path)
    fails(train, "--resume", "--out", finished_run, says=["was not written by train.py"])


# Data and models that changed


def test_other_questions_in_the_same_number_are_not_trained_on(fails, sqa, finished_run):
    def ask_another(problems):
        problems["3"]["question"] = "How does a mole move?"

    edit(sqa / "problems.json", ask_another)
    fails(train, "--resume", "--out", finished_run, says=["other data", "but different ones"])


def test_another_model_of_the_same_shape_is_not_trained_on(call, fails, sqa, tmp_path):
    llama = tmp_path / "llama"
    shutil.copytree(LLAMA, llama)
    shutil.copy(tokenizer_path(LLAMA), llama)
    clip = tmp_path / "clip.pt"
    torch.save(checkpoints.read_clip_state(VIT), clip)
    out = tmp_path / "run"
    assert call(train, *flags(sqa, out, "--max-steps", 1, "--llama", llama, "--vit", clip))[0] == 0

    state = torch.load(clip)
    torch.save({name: -tensor for name, tensor in state.items()}, clip)
    fails(train, "--resume", "--out", out, says=["was trained with another CLIP"])
    torch.save(state, clip)
    path = llama / "consolidated.00.pth"
    state = torch.load(path)
    torch.save({name: -tensor for name, tensor in state.items()}, path)
    fails(train, "--resume", "--out", out, says=["was trained with another LLaMA"])
    torch.save(state, path)
    assert call(train, "--resume", "--out", out, "--max-steps", 2)[0] == 0


# AdamW's state


def change_moments(change):
    """A function that changes exp_avg of the first parameter in a checkpoint."""
    def apply(checkpoint):
        state = checkpoint["optimizer"]["state"][0]
        state["exp_avg"] = change(state["exp_avg"])

    return apply


def empty_state(checkpoint):
    checkpoint["optimizer"]["state"] = {}


def state_of_one_parameter_less(checkpoint):
    del checkpoint["optimizer"]["state"][0]


def state_without_a_moment(checkpoint):
    del checkpoint["optimizer"]["state"][0]["exp_avg_sq"]


def negative_square(checkpoint):
    checkpoint["optimizer"]["state"][0]["exp_avg_sq"].fill_(-1)


def step_that_is_not_a_number(checkpoint):
    checkpoint["optimizer"]["state"][0]["step"].fill_(float("nan"))


def to_nan(moment):
    return moment * float("nan")


def to_whole_numbers(moment):
    return moment.int()


def to_one_row(moment):
    return moment[:1]


def to_a_number(moment):
    return 0.0


@pytest.mark.parametrize("damage, says", [
    (change_moments(to_one_row), "exp_avg of parameter 0 is"),
    (change_moments(torch.Tensor.flatten), "exp_avg of parameter 0 is"),
    (change_moments(to_nan), "exp_avg of parameter 0 holds values that are not finite"),
    (change_moments(to_whole_numbers), "exp_avg of parameter 0 holds torch.int32"),
    (change_moments(torch.Tensor.to_sparse), "exp_avg of parameter 0 is not a plain tensor"),
    (change_moments(to_a_number), "exp_avg of parameter 0 is float, not a tensor"),
    (step_that_is_not_a_number, "the step of parameter 0"),
    (negative_square, "an impossible optimizer state"),
    (empty_state, "no optimizer state for this model"),
    (state_of_one_parameter_less, "no optimizer state for this model"),
    (state_without_a_moment, "no optimizer state for this model")])
def test_a_state_of_the_optimizer_that_is_not_the_models(fails, finished_run, damage, says):
    """With moments of the wrong shape, the fused AdamW wrote out of bounds and crashed."""
    path = finished_run / "checkpoint.pth"
    checkpoint = checkpoint_of(finished_run)
    damage(checkpoint)
    torch.save(checkpoint, path)
    before = path.read_bytes()
    fails(train, "--resume", "--out", finished_run, says=["checkpoint.pth", says])
    assert path.read_bytes() == before


def test_a_state_without_a_step_is_sound(call, finished_run):
    """In fp16, the first steps may all overflow. Then AdamW has counted none of them."""
    path = finished_run / "checkpoint.pth"
    checkpoint = checkpoint_of(finished_run)
    for state in checkpoint["optimizer"]["state"].values():
        state["step"].zero_()
    torch.save(checkpoint, path)
    code, stdout, stderr = call(train, "--resume", "--out", finished_run, "--max-steps", 1)
    assert (code, stderr) == (0, "")
    assert "saved" not in stdout            # the step was taken before


def test_a_state_in_odd_memory_is_copied(call, trained, tmp_path):
    """Moments that share a storage or have other strides give the same run as plain ones."""
    run = trained(2)
    other = tmp_path / "other"
    checkpoint = checkpoint_of(run)
    for state in checkpoint["optimizer"]["state"].values():
        both = torch.stack([state["exp_avg"], state["exp_avg_sq"]], dim=-1)
        state["exp_avg"] = both[..., 0]
        state["exp_avg_sq"] = both[..., 1]
    shutil.copytree(run, other)
    torch.save(checkpoint, other / "checkpoint.pth")
    for out in (run, other):
        assert call(train, "--resume", "--out", out, "--max-steps", 4)[0] == 0
    left = checkpoint_of(run)["model"]
    right = checkpoint_of(other)["model"]
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_scaler_that_is_not_one(call, fails, sqa, tmp_path):
    run = tmp_path / "run"
    assert call(train, *flags(sqa, run, "--max-steps", 1, "--dtype", "fp16"))[0] == 0
    checkpoint = checkpoint_of(run)
    for scaler in (
            {},
            {"scale": float("inf"), "_growth_tracker": 0},
            {"scale": 2.0, "_growth_tracker": "x"},
            {"scale": torch.ones(3), "_growth_tracker": 0}):
        torch.save(checkpoint | {"scaler": scaler}, run / "checkpoint.pth")
        fails(train, "--resume", "--out", run, says=["checkpoint.pth"])


# A good checkpoint is never lost


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_replace_no_checkpoint(
        call, sqa, tmp_path, monkeypatch, value):
    train_step = train.train_step

    def spoiling_step(lavin, optimizer, *args):
        result = train_step(lavin, optimizer, *args)
        if optimizer.state[lavin.modality_embedding]["step"] == 2:
            with torch.no_grad():
                lavin.modality_embedding[0, 0] = value
        return result

    monkeypatch.setattr(train, "train_step", spoiling_step)
    out = tmp_path / "run"
    code, _, stderr = call(train, *flags(sqa, out, "--save-every", 1))
    assert code == 2
    assert len(stderr.splitlines()) == 1
    assert "is not finite after step 2; stopped without saving" in stderr
    assert checkpoint_of(out)["step"] == 1


def test_a_nan_in_a_resumed_state_is_refused(fails, finished_run):
    checkpoint = checkpoint_of(finished_run)
    checkpoint["model"]["adapter_modality_embedding.weight"][0, 0] = float("nan")
    torch.save(checkpoint, finished_run / "checkpoint.pth")
    fails(train, "--resume", "--out", finished_run, says=[
        "adapter_modality_embedding.weight", "not finite"])


def test_two_runs_do_not_share_a_folder(call, fails, sqa, finished_run):
    before = (finished_run / "metrics.jsonl").read_bytes()
    with runs.alone_in(train.Settings(out=str(finished_run))):
        code, _, stderr = call(train, *flags(sqa, finished_run))
    assert code == 2
    assert stderr.count("\n") == 1
    assert "another run is writing there" in stderr
    assert (finished_run / "metrics.jsonl").read_bytes() == before
    assert call(train, "--resume", "--out", finished_run, "--max-steps", 2)[0] == 0


def test_the_system_releases_the_folder_of_a_killed_run(sqa, tmp_path):
    (tmp_path / "checkpoint.pth.123.tmp").write_text("what a killed run has left")
    code = f"""
import time, train
from extras import runs
with runs.alone_in(train.Settings(out={str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    process.kill()
    process.wait()
    with runs.alone_in(train.Settings(out=str(tmp_path))):
        assert not list(tmp_path.glob("*.tmp"))


# The environment of a run


def open_full_disk(out, first_step):
    return open("/dev/full", "w", buffering=1)


def test_a_full_disk_for_the_log_stops_the_run_after_saving(call, sqa, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "open_metrics", open_full_disk)
    out = tmp_path / "run"
    code, _, stderr = call(train, *flags(sqa, out))
    assert code == 2
    assert stderr == (f"error: {out}/metrics.jsonl cannot be written (No space left on device); "
                      "stopped after step 2 and saved it\n")
    assert checkpoint_of(out)["step"] == 2


def test_a_terminal_that_is_gone_stops_the_run_after_saving(call, sqa, tmp_path, monkeypatch):
    log_step = runs.Log.step

    def close_terminal(log, step, *args):
        if step == 2:
            monkeypatch.setattr(sys.stdout, "stream", open("/dev/full", "w", buffering=1))
        log_step(log, step, *args)

    monkeypatch.setattr(runs.Log, "step", close_terminal)
    monkeypatch.setattr(runs.tqdm, "update", lambda bar: print("step"))
    out = tmp_path / "run"
    code, _, stderr = call(train, *flags(sqa, out))
    assert code == 2
    assert stderr == ("error: standard output cannot be written (No space left on device); "
                      "stopped after step 3 and saved it\n")
    assert checkpoint_of(out)["step"] == 3


def test_a_folder_that_is_deleted_in_the_run(call, sqa, tmp_path, monkeypatch):
    log_step = runs.Log.step
    out = tmp_path / "run"

    def delete_folder(log, step, *args):
        if step == 2:
            shutil.rmtree(out)
        log_step(log, step, *args)

    monkeypatch.setattr(runs.Log, "step", delete_folder)
    code, _, stderr = call(train, *flags(sqa, out))
    assert code == 2
    assert stderr == (f"error: {out}/metrics.jsonl was deleted; stopped after step 3 "
                      "and saved it\n")
    assert checkpoint_of(out)["step"] == 3
    assert call(train, "--resume", "--out", out, "--max-steps", 4)[0] == 0


def test_a_full_disk_for_the_checkpoint(call, finished_run):
    """A limit on the file size has the same effect on a write as a full disk."""
    before = checkpoint_of(finished_run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code, _, stderr = call(train, "--resume", "--out", finished_run, "--max-steps", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert stderr == (f"error: {finished_run}/checkpoint.pth: cannot be written "
                      "(File too large)\n")
    assert checkpoint_of(finished_run)["step"] == before["step"]
    assert not list(finished_run.glob("*.tmp"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_before_the_first_step_is_done_ends_the_run(sqa, tmp_path, number, code):
    """If the first step hangs, there is nothing to save and nothing to wait for."""
    hanging = """
import sys, time, train
def hang(*args):
    print("hanging", flush=True)
    time.sleep(60)
train.train_step = hang
train.run(train.main)
"""
    command = [sys.executable, "-c", hanging, *map(str, flags(sqa, tmp_path / "out"))]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "hanging" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr


def test_ctrl_c_while_pytorch_is_imported_prints_nothing(tmp_path):
    """If the signal came too late, train.py would still train nothing: there is no LLaMA."""
    command = [sys.executable, ROOT / "train.py", "--llama", tmp_path]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_torch(process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert stderr == ""
