"""--resume: what a run restores from its checkpoint. Everything is checked before it is used.

A resumed run must have the same settings, data and base models as before. Otherwise it would
produce adapters that no command line describes.
"""

import os
from pathlib import Path

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from adapters import AdapterConfig
from extras.values import SETTINGS, Kind, check_values
from files import LavinError, check_tensor, fingerprint, is_finite, read_checkpoint

# The settings that define a run. --resume refuses to change them.
FIXED = ("data", "weights", "multi_turn", "val_fraction", "format", "captions", "images",
         "max_seq_len", "epochs", "warmup", "batch_size", "lr", "weight_decay", "clip", "tau",
         "dropout", "rank", "scale", "hidden", "experts", "adapters", "routing", "seed", "dtype",
         "bits", "delta_unpermuted")
# The settings that a resumed run does not take from the checkpoint.
ONCE = ("out", "adapter", "resume", "max_steps", "device", "compile", "fsdp", "dry_run",
        "tflops", "check")
# Hashes of a run's data and models, and what the checkpoint was trained with if one differs.
HASHES = {
    "data_hash": "other data: the same number of samples, but different ones",
    "llama_hash": "another LLaMA or another --delta",
    "vit_hash": "another CLIP",
}
MOMENTS = ("exp_avg", "exp_avg_sq")         # AdamW's names
SCALER = {
    "scale": Kind(float, above=0, high=1e30),
    "_growth_tracker": Kind(int, low=0, high=10**9),
}


def checkpoint_path(out: str) -> Path:
    return Path(out, "checkpoint.pth")


def read_resumed(out: str, names: list[str]) -> dict:
    """Read OUT/checkpoint.pth for --resume. Of its config, only `names` are kept."""
    path = checkpoint_path(out)
    if not os.path.exists(path):
        raise LavinError(f"--resume: there is no {path} to continue from; "
                         "leave out --resume to start a new run")
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
    if isinstance(config.get("data"), str):         # older checkpoints have a single source
        config["data"] = [config["data"]]
    check_values(f"--resume: {path}", config, SETTINGS)
    resumed["config"] = config
    return resumed


def check_unchanged(settings, before: dict, defaults) -> None:
    """Raises LavinError if a resumed run is given a setting that would make it a different run.

    before: the settings in the checkpoint. Older checkpoints do not have every setting.
    """
    for name in FIXED:
        now = getattr(settings, name)
        then = before.get(name, getattr(defaults, name))
        if then != now:
            raise LavinError(f"--resume: {checkpoint_path(settings.out)} was trained with {name} "
                             f"{then}, not {now}; leave the flag out")


def hash_llama(llama: str, delta: str | None) -> str:
    """The hash of LLaMA's files, and of those of its delta."""
    return fingerprint(llama) + (fingerprint(delta) if delta else "")


def hash_models(settings) -> None:
    """Store the hashes of the run's LLaMA and CLIP in its settings."""
    settings.llama_hash = hash_llama(settings.llama, settings.delta)
    settings.vit_hash = fingerprint(settings.vit)


def note_other_models(llama: str, vit: str, delta: str | None, remembered: dict) -> None:
    """Print a note if adapters were trained with other files of LLaMA or CLIP than these.

    remembered: the settings in the adapters' checkpoint, {} without one.
    """
    llama_then = remembered.get("llama_hash")
    if llama_then and llama_then != hash_llama(llama, delta):
        print(f"note     the adapters were trained with other files than {llama}")
    vit_then = remembered.get("vit_hash")
    if vit_then and vit_then != fingerprint(vit):
        print(f"note     the adapters were trained with other files than {vit}")


def check_inputs(settings, before: dict) -> None:
    """Raises LavinError if a resumed run has other data or models than the run before it.

    A value that one of the two runs does not have is not compared.
    """
    path = checkpoint_path(settings.out)
    n_before = before.get("n_samples")
    if settings.n_samples and n_before and settings.n_samples != n_before:
        raise LavinError(f"--resume: {path} was trained on {n_before} samples, "
                         f"not {settings.n_samples}")
    for name, what in HASHES.items():
        now = getattr(settings, name)
        then = before.get(name)
        if now and then and now != then:
            raise LavinError(f"--resume: {path} was trained with {what}; "
                             f"to start from its adapters, use --adapter {path} and another --out")


def check_sizes(config: AdapterConfig, settings) -> None:
    """Raises LavinError if the checkpoint's adapters differ from the settings in a size or in τ."""
    sizes = {"rank": config.rank, "hidden": config.projector_dim, "tau": config.tau,
             "scale": config.scale, "experts": config.experts}
    for name, size in sizes.items():
        wanted = getattr(settings, name)
        if wanted != size:
            raise LavinError(f"--{name} {wanted:g}: the adapters of the checkpoint have {size:g}; "
                             "use that value")


def check_step(step: int, n_steps: int, out: str) -> None:
    """Raises LavinError for a step that a run of n_steps does not have."""
    if not 1 <= step <= n_steps:
        raise LavinError(f"--resume: {checkpoint_path(out)} says that it was written after step "
                         f"{step}, but the run has steps 1 to {n_steps}")


def restore(optimizer: Optimizer, scaler: GradScaler, resumed: dict, out: str) -> None:
    """Load a checkpoint's state into optimizer and scaler. Raises LavinError if it does not fit
    them.

    The fused AdamW does not check the sizes of its moments. If they were too small, it would write
    out of bounds. So each moment is checked against its parameter and copied.
    """
    path = checkpoint_path(out)
    state = resumed["optimizer"].get("state")
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    if not isinstance(state, dict) or set(state) != set(range(len(parameters))):
        raise LavinError(f"--resume: {path} has no optimizer state for this model")
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
    """A checked copy of AdamW's state for parameter i, which has this shape."""
    if not isinstance(state, dict) or set(state) != {"step", *MOMENTS}:
        raise LavinError(f"--resume: {path} has no optimizer state for this model")
    check_tensor(path, f"the step of parameter {i}", state["step"], torch.Size())
    for name in MOMENTS:
        check_tensor(path, f"{name} of parameter {i}", state[name], shape)
    copied = {}
    for name, tensor in state.items():
        copied[name] = tensor.float().clone(memory_format=torch.contiguous_format)
    # The step is 0 if every step so far overflowed in fp16.
    if copied["step"] < 0 or (copied["exp_avg_sq"] < 0).any():
        raise LavinError(f"--resume: {path} holds an impossible optimizer state for parameter {i}")
    return copied


def check_sound(checkpoint: dict) -> None:
    """Raises LavinError if the weights or moments in a new checkpoint are not finite.

    Such a checkpoint would be useless, and it would replace a usable one.
    """
    tensors = dict(checkpoint["model"])
    for i, state in checkpoint["optimizer"]["state"].items():
        for name in MOMENTS:
            tensors[f"{name} of parameter {i}"] = state[name]
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise LavinError(f"{name} is not finite after step {checkpoint['step']}; stopped "
                             "without saving. Try a lower --lr")
