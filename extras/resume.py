"""--resume: what a run takes over from its checkpoint, all of it checked before it is used.

A run that goes on must be the same run: the same settings, data and base models. Otherwise it would
end in adapters that no command line describes.
"""

import os
from pathlib import Path

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from adapters import AdapterConfig
from extras.values import SETTINGS, Kind, check_values
from files import LavinError, check_tensor, fingerprint, is_finite, read_checkpoint

# What makes a run what it is. --resume refuses to change these.
FIXED = ("data", "weights", "multi_turn", "val_fraction", "format", "captions", "images",
         "max_seq_len", "epochs", "warmup", "batch_size", "lr", "weight_decay", "clip", "tau",
         "dropout", "rank", "scale", "hidden", "experts", "adapters", "routing", "seed", "dtype",
         "bits", "delta_unpermuted")
# What a resumed run does not take over from the one before.
ONCE = ("out", "adapter", "resume", "max_steps", "device", "compile", "fsdp", "dry_run",
        "tflops", "check")
# What a run finds out about its data and models, and what has changed if it finds something else.
FOUND = {
    "data_hash": "data: there are as many samples, but not the same",
    "llama_hash": "LLaMA, or another --delta",
    "vit_hash": "CLIP",
}
MOMENTS = ("exp_avg", "exp_avg_sq")         # AdamW's names
SCALER = {
    "scale": Kind(float, above=0, high=1e30),
    "_growth_tracker": Kind(int, low=0, high=10**9),
}


def checkpoint_path(out: str) -> Path:
    return Path(out, "checkpoint.pth")


def read_resumed(out: str, names: list[str]) -> dict:
    """OUT/checkpoint.pth, with all that --resume needs. Of its config, only `names` are kept."""
    path = checkpoint_path(out)
    if not os.path.exists(path):
        raise LavinError(f"--resume: there is no {path} to go on from; "
                         "leave --resume out to start")
    resumed = read_checkpoint(path)
    types = {"config": dict, "step": int, "optimizer": dict, "scaler": dict}
    if not isinstance(resumed, dict):
        resumed = {}
    for name, kind in types.items():
        if type(resumed.get(name)) is not kind:
            raise LavinError(f"--resume: {path} was not written by train.py")
    config = {}
    for name in names:
        if name in resumed["config"]:
            config[name] = resumed["config"][name]
    if isinstance(config.get("data"), str):         # older checkpoints knew a single source
        config["data"] = [config["data"]]
    check_values(f"--resume: {path}", config, SETTINGS)
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
            raise LavinError(f"--resume: {checkpoint_path(settings.out)} was trained with {name} "
                             f"{then}, not {now}; leave the flag out")


def find_models(settings) -> None:
    """Note in the settings which LLaMA and which CLIP a run has."""
    settings.llama_hash = fingerprint(settings.llama)
    if settings.delta:
        settings.llama_hash += fingerprint(settings.delta)
    settings.vit_hash = fingerprint(settings.vit)


def check_found(settings, before: dict) -> None:
    """LavinError if a resumed run finds other data or models than the run before it.

    What either of the two does not know is left alone.
    """
    path = checkpoint_path(settings.out)
    n_before = before.get("n_samples")
    if settings.n_samples and n_before and settings.n_samples != n_before:
        raise LavinError(f"--resume: {path} was trained on {n_before} samples, "
                         f"not {settings.n_samples}")
    for name, what in FOUND.items():
        now = getattr(settings, name)
        then = before.get(name)
        if now and then and now != then:
            raise LavinError(f"--resume: {path} was trained with another {what}; "
                             f"--adapter {path} with another --out would begin with its adapters")


def check_sizes(config: AdapterConfig, settings) -> None:
    """LavinError if the adapters of a checkpoint have other sizes than the settings say."""
    sizes = {"rank": config.rank, "hidden": config.projector_dim, "scale": config.scale,
             "experts": config.experts}
    for name, size in sizes.items():
        wanted = getattr(settings, name)
        if wanted != size:
            raise LavinError(f"--{name} {wanted:g}: the adapters of the checkpoint have {size:g}; "
                             "give that")


def check_step(step: int, n_steps: int, out: str) -> None:
    """LavinError for a step that a run of n_steps does not have."""
    if not 1 <= step <= n_steps:
        raise LavinError(f"--resume: {checkpoint_path(out)} says that it was written after step "
                         f"{step}, but the run has steps 1 to {n_steps}")


def restore(optimizer: Optimizer, scaler: GradScaler, resumed: dict, out: str) -> None:
    """Give optimizer and scaler the state that a checkpoint holds. LavinError if it is not theirs.

    The fused AdamW does not look at the moments that it is given. With too small ones it would
    write to memory that is not its own. So each is checked against its parameter and copied.
    """
    path = checkpoint_path(out)
    state = resumed["optimizer"].get("state")
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    if not isinstance(state, dict) or set(state) != set(range(len(parameters))):
        raise LavinError(f"--resume: {path} holds no optimizer of this model")
    checked = {}
    for i, p in enumerate(parameters):
        checked[i] = checked_state(state[i], p.shape, i, path)
    groups = optimizer.state_dict()["param_groups"]         # ours: they follow from the settings
    optimizer.load_state_dict({"state": checked, "param_groups": groups})
    if scaler.is_enabled():
        check_values(path, resumed["scaler"], SCALER, needed=SCALER)
        known = {name: resumed["scaler"][name] for name in SCALER}
        scaler.load_state_dict(scaler.state_dict() | known)


def checked_state(state, shape: torch.Size, i: int, path: Path) -> dict[str, torch.Tensor]:
    """AdamW's state of parameter i, of this shape, in memory of its own."""
    if not isinstance(state, dict) or set(state) != {"step", *MOMENTS}:
        raise LavinError(f"--resume: {path} holds no optimizer of this model")
    check_tensor(path, f"the step of parameter {i}", state["step"], torch.Size())
    for name in MOMENTS:
        check_tensor(path, f"{name} of parameter {i}", state[name], shape)
    copied = {}
    for name, tensor in state.items():
        copied[name] = tensor.float().clone(memory_format=torch.contiguous_format)
    if copied["step"] < 1 or (copied["exp_avg_sq"] < 0).any():
        raise LavinError(f"--resume: {path} holds a state of parameter {i} that no step leaves")
    return copied


def check_sound(checkpoint: dict) -> None:
    """LavinError if weights or moments that are to be saved are not finite.

    Nobody could use such a checkpoint, and it would replace one that can be used.
    """
    tensors = dict(checkpoint["model"])
    for i, state in checkpoint["optimizer"]["state"].items():
        for name in MOMENTS:
            tensors[f"{name} of parameter {i}"] = state[name]
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise LavinError(f"{name} is not finite after step {checkpoint['step']}; stopped "
                             "without saving. Try a lower --lr")
