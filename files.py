"""Files and flags that people hand us: found, opened safely, written atomically.

All scripts and loaders read and write through this file. So a wrong, truncated or hostile input
ends in one sentence on stderr and exit code 2, never in a traceback, an executed pickle or a
half-written result.
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
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


class LavinError(Exception):
    """One line for the person at the terminal: what is wrong with which file, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Call a script's `main()`. A LavinError, or too little memory, becomes one line on stderr."""
    warnings.simplefilter("ignore")     # libraries advise their programmers; stderr is for errors
    try:
        main()
    except LavinError as error:
        rank = ""
        if "RANK" in os.environ:        # under torchrun
            rank = f"rank {os.environ['RANK']}: "
        message = " ".join(str(error).split())
        print(f"{rank}error: {message}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):     # said of a CPU's
            raise
        print("error: there is too little memory for this; --bits 8 or 4, or a lower --batch-size "
              "or --max-seq-len, would help", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# What both scripts take when no path is given, and where a person gets it.
DEFAULTS = {"llama": "weights/7B", "vit": "weights/ViT-L-14.pt", "data_root": "data/scienceqa"}
ORIGINS = {
    "adapter": "LaVIN's adapters; python train.py --data sqa makes them, or --adapter FILE",
    "llama": "LLaMA in Meta's layout, from https://llama.meta.com, or in Hugging Face's with "
             "config.json; --llama DIR",
    "tokenizer": "comes with LLaMA; in the folder of --llama or the one above it",
    "vit": "CLIP's image encoder ViT-L-14.pt, linked from https://github.com/openai/CLIP; "
           "--vit FILE",
    "data_root": "ScienceQA, from https://github.com/lupantech/ScienceQA; --data-root DIR",
}
SCIENCEQA = ("problems.json", "pid_splits.json", "images")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def tokenizer_path(llama: str | Path) -> Path:
    """`tokenizer.model` is in LLaMA's folder or, as in Meta's download, in the one above it."""
    inside = Path(llama) / "tokenizer.model"
    above = Path(llama).absolute().parent / "tokenizer.model"
    if above.exists() and not inside.exists():
        return above
    return inside


def is_hf_folder(path: str | Path) -> bool:
    """Is this a LLaMA in Hugging Face's layout, and not in Meta's?"""
    return Path(path, "config.json").is_file() and not Path(path, "params.json").exists()


def asks_sqa(args: object) -> bool:
    """Is ScienceQA among --data? train.py has a list there, generate.py one source or None."""
    if isinstance(args.data, list):
        return "sqa" in args.data
    return args.data == "sqa"


def choose_paths(args: object, remembered: dict, adapter: str | None = None) -> None:
    """Set args.llama, .vit and .data_root: as given, else as the checkpoint remembers, else the
    default.

    Says what it took. Raises one LavinError that lists all that is missing and where to get it.
    """
    for name, default in DEFAULTS.items():
        path = getattr(args, name) or remembered.get(name) or default
        setattr(args, name, path)
    taken = f"LLaMA {args.llama} · CLIP {args.vit}"
    if asks_sqa(args):
        taken += f" · data {args.data_root}"
    print(taken)

    wanted = {"tokenizer": [tokenizer_path(args.llama)], "vit": [args.vit]}
    if adapter:
        wanted["adapter"] = [adapter]
    if not is_hf_folder(args.llama):
        wanted["llama"] = [f"{args.llama}/params.json", f"{args.llama}/consolidated.00.pth"]
    if asks_sqa(args):
        wanted["data_root"] = [f"{args.data_root}/{name}" for name in SCIENCEQA]
    missing = []
    for origin in ORIGINS:              # in this order
        paths = [str(path) for path in wanted.get(origin, []) if not os.path.exists(path)]
        if paths:
            missing.append(f"{', '.join(paths)} ({ORIGINS[origin]})")
    if missing:
        raise LavinError(f"missing: {'; '.join(missing)}")


def pick_device(device: str, dtype: str) -> tuple[torch.device, str]:
    """--device and --dtype -> (torch.device, key of DTYPES).

    "auto" takes a GPU if there is one, in bf16, or in fp16 if the GPU is too old for that.
    """
    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"      # torchrun's number
        device = torch.device(device)
        torch.empty(1, device=device)
        torch.autocast(device.type)     # refuses a device that cannot compute, like "meta"
    except (RuntimeError, AssertionError) as error:
        raise LavinError(f"--device {device}: not available here; cpu always is") from error
    if dtype != "auto":
        return device, dtype
    if device.type == "cpu":
        return device, "fp32"
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, "bf16" if has_bf16 else "fp16"


def check_compiler(wanted: bool, device: torch.device) -> None:
    """LavinError if --compile is wanted on a CPU that has no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if wanted and device.type == "cpu" and not shutil.which(compiler):
        raise LavinError(f"--compile: on a CPU it needs {compiler}, which is not installed; "
                         "apt install g++, or leave --compile out")


def at_least(minimum: int) -> Callable[[str], int]:
    """A type for argparse: a whole number that is not below `minimum`."""
    def parse(text):
        try:
            if int(text) >= minimum:
                return int(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
    return parse


def read_json(path: str | Path) -> object:
    """The contents of a JSON file. LavinError if it is missing, unreadable or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LavinError(f"{path}: not JSON ({error})") from error


def read_checkpoint(path: str | Path, mmap: bool = False) -> object:
    """A torch file on the CPU. No code is unpickled: only tensors, containers, argparse.Namespace.

    mmap=True leaves the tensors on disk until they are touched. Raises LavinError if the file is
    missing, truncated, or holds anything else than data.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise LavinError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise LavinError(f"{path}: not a checkpoint of tensors, or one that would run code; "
                         "not loaded") from error
    except Exception as error:      # damaged bytes make the reader raise anything
        raise LavinError(f"{path}: not a readable torch file; truncated? fetch it again"
                         ) from error


def tensors_of(state: object, path: str | Path) -> dict[str, torch.Tensor]:
    """`state` itself if it is {name: tensor}, else a LavinError about `path`."""
    valid = isinstance(state, dict)
    if not valid or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise LavinError(f"{path}: not a checkpoint of the expected kind: "
                         "it does not hold named tensors")
    return {str(name): tensor for name, tensor in state.items()}


def check_names(path: str | Path, expected: Iterable[str], found: Iterable[str]) -> None:
    """LavinError that names the first name that only one of the two holds."""
    different = sorted(set(expected) ^ set(found))
    if different:
        name = different[0]
        fault = "is missing" if name in expected else "has no place in this model"
        raise LavinError(f"{path}: {name} {fault}")


@torch.no_grad()
def fill(parameters: dict, state: dict, path: str | Path) -> None:
    """Copy `state` into `parameters`, both {name: tensor}: the same names, the same shapes."""
    check_names(path, parameters, state)
    for name, parameter in parameters.items():
        found = tuple(state[name].shape)
        wanted = tuple(parameter.shape)
        if found != wanted:
            raise LavinError(f"{path}: {name} is {found}, but this model's is {wanted}: "
                             "these files do not belong together")
        parameter.copy_(state[name])


def check_is_file(path: str | Path) -> None:
    """OSError for what is there and no file: a folder, or a device that renaming would replace."""
    if os.path.isdir(path):
        raise OSError(errno.EINVAL, "it is a directory")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is no regular file")


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path)`, then rename. Readers see the old file or the new one whole."""
    temporary = None
    try:
        target = Path(os.path.realpath(path))       # a link stays, and what it names is written
        check_is_file(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        write(temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError, ValueError) as error:    # torch.save: RuntimeError if disk full
        raise LavinError(f"{path}: cannot be written ({error})") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, flag: str) -> None:
    """Make the directory of `path`. LavinError if nothing can be written there: better now than
    after hours of work.
    """
    path = Path(path)
    try:
        check_is_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LavinError(f"{flag}: {path} cannot be written ({error.strerror}); "
                         "choose another place") from error
