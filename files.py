"""Files and flags that people hand us: found, opened safely, written atomically, complained about in one line.

Both scripts and all loaders read and write through this file, so that a wrong, truncated or hostile input ends
in one sentence on stderr and exit code 2, never in a traceback, an executed pickle or a half-written result.
"""

import argparse
import errno
import json
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch


class LavinError(Exception):
    """One line for the person at the terminal: what was wrong, with which file or flag, what to do."""


def run(main):
    """Call a script's `main()`; a LavinError, or too little memory, becomes one line on stderr and exit code 2."""
    warnings.simplefilter("ignore")     # libraries advise their programmers; stderr is for errors
    try:
        main()
    except LavinError as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""           # under torchrun
        print(f"{rank}error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):     # the CPU says it so
            raise
        print("error: there is too little memory for this; --bits 8 or 4, or a lower --batch-size or --max-seq-len, would help",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# What both scripts take when no path is given, and where a person gets it.
DEFAULTS = {"llama": "weights/7B", "vit": "weights/ViT-L-14.pt", "data_root": "data/scienceqa"}
ORIGINS = {
    "adapter": "LaVIN's adapters; made by python train.py --data sqa, or --adapter FILE",
    "llama": "LLaMA in Meta's layout, from https://llama.meta.com, or in Hugging Face's with config.json; --llama DIR",
    "tokenizer": "comes with LLaMA; in the folder of --llama or in its parent",
    "vit": "CLIP's image encoder ViT-L-14.pt, linked from https://github.com/openai/CLIP; --vit FILE",
    "data_root": "ScienceQA, from https://github.com/lupantech/ScienceQA; --data-root DIR",
}
SCIENCEQA = ("problems.json", "pid_splits.json", "images")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def tokenizer_path(llama):
    """`tokenizer.model` lies in LLaMA's folder or, as in Meta's download, beside it."""
    inside, beside = Path(llama) / "tokenizer.model", Path(llama).absolute().parent / "tokenizer.model"
    return beside if beside.exists() and not inside.exists() else inside


def is_hf_folder(path):
    """A LLaMA of Hugging Face's, not one of Meta's?"""
    return Path(path, "config.json").is_file() and not Path(path, "params.json").exists()


def asks_sqa(args):
    """Is ScienceQA among --data? train.py has a list there, generate.py one or None."""
    return "sqa" in (args.data if isinstance(args.data, list) else [args.data])


def choose_paths(args, remembered, adapter=None):
    """Set args.llama, .vit and .data_root: what was given, else what the checkpoint remembers, else the default.

    Says what it took, and raises one LavinError that lists everything missing with where it comes from.
    """
    has_sqa = asks_sqa(args)
    for name, default in DEFAULTS.items():
        setattr(args, name, getattr(args, name) or remembered.get(name) or default)
    print(f"LLaMA {args.llama} · CLIP {args.vit}" + (f" · data {args.data_root}" if has_sqa else ""))
    wanted = {
        "adapter": [adapter] if adapter else [],
        "llama": [f"{args.llama}/params.json", f"{args.llama}/consolidated.00.pth"] if not is_hf_folder(args.llama) else [],
        "tokenizer": [tokenizer_path(args.llama)],
        "vit": [args.vit],
        "data_root": [f"{args.data_root}/{name}" for name in SCIENCEQA] if has_sqa else [],
    }
    missing = {origin: [str(path) for path in paths if not os.path.exists(path)] for origin, paths in wanted.items()}
    if any(missing.values()):
        parts = [f"{', '.join(paths)} ({ORIGINS[origin]})" for origin, paths in missing.items() if paths]
        raise LavinError(f"missing: {'; '.join(parts)}")


def pick_device(device, dtype):
    """--device and --dtype -> (torch.device, key of DTYPES). "auto": a GPU if there is one, in bf16 or, if old, fp16."""
    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
        torch.empty(1, device=device)
        torch.autocast(device.type)             # knows no meta device
    except (RuntimeError, AssertionError) as error:
        raise LavinError(f"--device {device}: not available here; cpu always is") from error
    if dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "fp32" if device.type == "cpu" else "bf16" if bf16 else "fp16"
    return device, dtype


def check_compiler(wanted, device):
    """LavinError if --compile is wanted on a CPU that has no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if wanted and device.type == "cpu" and not shutil.which(compiler):
        raise LavinError(f"--compile: on a CPU it needs {compiler}, which is not installed; apt install g++, or leave --compile out")


def at_least(minimum):
    """For argparse: a whole number that is not below `minimum`."""
    def parse(text):
        try:
            if int(text) >= minimum:
                return int(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
    return parse


def read_json(path):
    """The contents of a JSON file; LavinError if it is missing, unreadable or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LavinError(f"{path}: not JSON ({error})") from error


def read_checkpoint(path, mmap=False):
    """A torch file on the CPU. Never unpickles code: tensors, containers and argparse.Namespace alone.

    mmap=True leaves the tensors on disk until they are touched. Raises LavinError if the file is
    missing, truncated, or holds anything else than data.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise LavinError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise LavinError(f"{path}: not a checkpoint of tensors, or one that would run code; not loaded") from error
    except Exception as error:      # damaged bytes make the reader raise anything
        raise LavinError(f"{path}: not a readable torch file; truncated? fetch it again") from error


def tensors_of(state, path):
    """`state` itself if it is {name: tensor}, else a LavinError about `path`."""
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise LavinError(f"{path}: not a checkpoint of the kind expected here: it holds no named tensors")
    return {str(name): tensor for name, tensor in state.items()}


def check_names(path, expected, found):
    """LavinError that names the first name that only one of the two holds."""
    if different := sorted(set(expected) ^ set(found)):
        name = different[0]
        raise LavinError(f"{path}: {name} {'is missing' if name in expected else 'has no place in this model'}")


@torch.no_grad()
def fill(parameters, state, path):
    """Copy `state` into `parameters`, both {name: tensor}, strictly: the same names, the same shapes."""
    check_names(path, parameters, state)
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise LavinError(f"{path}: {name} is {tuple(state[name].shape)}, but this model's is "
                             f"{tuple(parameter.shape)}: these files do not belong together")
        parameter.copy_(state[name])


def check_is_file(path):
    """OSError for what is there and no file: a folder, or a device, which renaming would replace."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is a directory" if os.path.isdir(path) else "it is no regular file")


def write_atomically(path, write):
    """Call `write(temporary_path)`, then rename: readers see the old file or the new one, never a part."""
    temporary = None
    try:
        place = Path(os.path.realpath(path))    # of a link its target is written, and the link remains
        check_is_file(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(place.name + ".tmp")
        write(temporary)
        os.replace(temporary, place)
    except (OSError, RuntimeError, ValueError) as error:        # torch.save reports a full disk as a RuntimeError
        raise LavinError(f"{path}: cannot be written ({error})") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def check_writable(path, flag):
    """LavinError now if a file could not be written at `path`, not after hours of work; makes its directory."""
    path = Path(path)
    try:
        check_is_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LavinError(f"{flag}: {path} cannot be written ({error.strerror}); choose another place") from error
