"""Files: find them, open them safely, check them, write them atomically.

Scripts and loaders check their files with this module. So a wrong, truncated or malicious input
ends in one sentence on stderr and exit code 2. It never ends in a traceback, an executed pickle or
a half-written result.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch


class LavinError(Exception):
    """One line for the person at the terminal: what is wrong with which file, and what to do."""


# The default paths of train.py and generate.py, and where to get these files.
DEFAULT_PATHS = {"llama": "weights/7B", "vit": "weights/ViT-L-14.pt", "data_root": "data/scienceqa"}
ORIGINS = {
    "adapter": "LaVIN's adapters: python train.py --data sqa trains them; or pass --adapter FILE",
    "llama": "LLaMA in Meta's layout, from https://llama.meta.com, or Hugging Face's with "
             "config.json (--llama DIR), or a llama.cpp file (--llama FILE.gguf)",
    "tokenizer": "LLaMA's tokenizer, in the folder of --llama or the one above it",
    "vit": "CLIP's image encoder ViT-L-14.pt, linked from https://github.com/openai/CLIP; "
           "--vit FILE",
    "data_root": "ScienceQA, from https://github.com/lupantech/ScienceQA; --data-root DIR",
}
SCIENCEQA = ("problems.json", "pid_splits.json", "images")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def tokenizer_path(llama: str | Path) -> Path:
    """LLaMA's tokenizer.model or tokenizer.json, or the GGUF file that holds its tokenizer.

    In Meta's download, tokenizer.model is in the folder above. If none of these exists, the result
    is the path of tokenizer.model in the folder itself.
    """
    folder = Path(llama)
    if is_gguf(llama):
        return folder
    above = folder.absolute().parent
    for path in (folder / "tokenizer.model", folder / "tokenizer.json", above / "tokenizer.model"):
        if os.path.exists(path):
            return path
    return folder / "tokenizer.model"


def is_gguf(path: str | Path) -> bool:
    """Is this a LLaMA in a single file, in llama.cpp's format?"""
    return str(path).endswith(".gguf")


def is_hf_folder(path: str | Path) -> bool:
    """Is this a LLaMA in Hugging Face's layout, and not in Meta's?"""
    has_meta = os.path.exists(f"{path}/params.json")
    return os.path.isfile(f"{path}/config.json") and not has_meta


def asks_sqa(args: object) -> bool:
    """Is ScienceQA in --data? train.py has a list of sources there, generate.py one or None."""
    if isinstance(args.data, list):
        return "sqa" in args.data
    return args.data == "sqa"


def choose_paths(args: object, remembered: dict, adapter: str | None = None,
                 weights: bool = True) -> None:
    """Set args.llama, .vit and .data_root, and print them.

    Each is taken from the flags, else from the checkpoint, else from DEFAULT_PATHS.
    A LavinError lists all missing files and where to get them. With weights False only the models'
    shapes are needed, so the files with their weights may be missing.
    """
    for name, default in DEFAULT_PATHS.items():
        path = getattr(args, name) or remembered.get(name) or default
        setattr(args, name, path)
    taken = f"LLaMA {args.llama} · CLIP {args.vit}"
    if asks_sqa(args):
        taken += f" · data {args.data_root}"
    print(taken)

    wanted = {}
    if adapter:
        wanted["adapter"] = [adapter]
    if is_gguf(args.llama):
        wanted["llama"] = [args.llama]
    else:
        wanted["tokenizer"] = [tokenizer_path(args.llama)]
    if not is_hf_folder(args.llama) and not is_gguf(args.llama):
        wanted["llama"] = [f"{args.llama}/params.json"]
        if weights:
            wanted["llama"].append(f"{args.llama}/consolidated.00.pth")
    if weights:
        wanted["vit"] = [args.vit]
    if asks_sqa(args):
        wanted["data_root"] = [f"{args.data_root}/{name}" for name in SCIENCEQA]
    missing = []
    for origin in ORIGINS:              # fixes the order
        paths = [str(path) for path in wanted.get(origin, []) if not os.path.exists(path)]
        if paths:
            missing.append(f"{', '.join(paths)} ({ORIGINS[origin]})")
    if missing:
        raise LavinError(f"missing: {'; '.join(missing)}")


def pick_device(device: str, dtype: str) -> tuple[torch.device, str]:
    """--device and --dtype -> (torch.device, key of DTYPES).

    "auto" takes a GPU if there is one, with bf16, or fp16 if the GPU does not support bf16;
    else Apple's GPU (mps) if there is one, else the CPU, both in fp32.
    """
    try:
        if device == "auto" and torch.cuda.is_available():
            device = "cuda"
        elif device == "auto":
            device = "mps" if torch.backends.mps.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"      # torchrun's number
        device = torch.device(device)
        torch.empty(1, device=device)
        torch.autocast(device.type)     # rejects devices without data, like "meta"
    except (RuntimeError, AssertionError, ImportError) as error:
        raise LavinError(f"--device {device}: not available here; use --device cpu") from error
    if dtype != "auto":
        return device, dtype
    if device.type in ("cpu", "mps"):
        return device, "fp32"
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, "bf16" if has_bf16 else "fp16"


def check_compiler(wanted: bool, device: torch.device) -> None:
    """Raises LavinError if --compile is wanted on a CPU, but there is no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if wanted and device.type == "cpu" and not shutil.which(compiler):
        raise LavinError(f"--compile: on a CPU it needs {compiler}, which is not installed; "
                         "apt install g++, or leave out --compile")


# Reading


def check_regular(path: str | Path) -> None:
    """Raises LavinError unless it is a file. Reading a pipe or a device might never end."""
    if os.path.isdir(path):
        raise LavinError(f"{path}: a folder, where a file is needed")
    try:
        os.stat(path)
    except FileNotFoundError as error:
        raise LavinError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:          # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise LavinError(f"{path}: cannot be read ({reason})") from error
    if not os.path.isfile(path):
        raise LavinError(f"{path}: a pipe or a device, where a file is needed")


def inside(folder: str | Path, name: str) -> Path:
    """folder/name, for a name that comes from a data set. Raises ValueError if it leaves the
    folder.

    A symbolic link in the folder may point anywhere: we trust whoever made the folder.
    """
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == ".." or "\0" in path:
        raise ValueError(f"{name!r} leads out of {folder}")
    return Path(folder, path)


def read_json(path: str | Path) -> object:
    """The contents of a JSON file. Raises LavinError if it is missing, unreadable or not JSON."""
    check_regular(path)
    try:
        # "-sig" skips the byte-order mark that some Windows programs write.
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise LavinError(f"{path}: not JSON ({error})") from error


def is_zip(path: str | Path) -> bool:
    """Does the file begin like a zip file, so that torch would read it as one?"""
    with open(path, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def check_not_packed(path: str | Path, entries: list[zipfile.ZipInfo]) -> None:
    """Raises LavinError for entries of a zip file that are compressed or overlap.

    torch never writes such entries. Unpacked, a small file could exceed the machine's memory.
    """
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise LavinError(f"{path}: its entry {entry.filename} is compressed, "
                             "unlike those of torch files; not loaded")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise LavinError(f"{path}: its entries have more bytes than the file; not loaded")


def check_archive(path: str | Path) -> None:
    """Raises LavinError for a TorchScript archive, or for entries that torch.save never writes."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise LavinError(f"{path}: a TorchScript archive, like CLIP's; "
                             "a file that torch.save wrote is needed here")
        check_not_packed(path, archive.infolist())


def read_checkpoint(path: str | Path, mmap: bool = False) -> object:
    """Load a torch file to the CPU: only tensors, containers and argparse.Namespace, no code.

    mmap=True leaves the tensors on disk until they are read. Raises LavinError if the file is
    missing, truncated, or holds anything except data.
    """
    check_regular(path)
    try:
        if is_zip(path):
            check_archive(path)
        elif mmap:
            raise LavinError(f"{path}: not in the format of torch 1.6 and later; truncated? "
                             "fetch it again, or load and save it with torch")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except LavinError:
        raise
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeEncodeError as error:
        raise LavinError(f"{path}: torch cannot map a file with this name; rename it") from error
    except pickle.UnpicklingError as error:
        raise LavinError(f"{path}: not a checkpoint of tensors, or one that would run code; "
                         "not loaded") from error
    except Exception as error:      # damaged bytes can raise any exception
        raise LavinError(f"{path}: not a readable torch file; truncated? fetch it again"
                         ) from error


def tensors_of(state: object, path: str | Path) -> dict[str, torch.Tensor]:
    """`state`, if it is {name: plain tensor}; otherwise a LavinError about `path`."""
    if not isinstance(state, dict):
        raise LavinError(f"{path}: not a checkpoint of the expected kind: "
                         "it does not hold named tensors")
    for name, tensor in state.items():
        check_plain(path, name, tensor)
    return {str(name): tensor for name, tensor in state.items()}


def check_names(path: str | Path, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises LavinError with the first name that is in only one of `expected` and `found`."""
    different = sorted(set(expected) ^ set(found))
    if different:
        name = different[0]
        fault = "is missing" if name in expected else "has no place in this model"
        raise LavinError(f"{path}: {name} {fault}")


def check_plain(path: str | Path, name: object, tensor: object) -> None:
    """Raises LavinError unless it is a strided tensor whose storage holds all of its elements.

    A file may also contain sparse, quantized, nested and meta tensors, or a single element that is
    expanded to a million.
    """
    fault = None
    if not isinstance(tensor, torch.Tensor):
        fault = f"is {type(tensor).__name__}, not a tensor"
    elif tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
        fault = "is not a plain tensor"
    elif tensor.is_quantized:
        fault = "is quantized"
    elif tensor.nbytes > tensor.untyped_storage().nbytes():
        fault = "has more elements than its storage"
    if fault:
        raise LavinError(f"{path}: {name} {fault}")


def check_tensor(path: str | Path, name: str, tensor: object, shape: torch.Size | None = None,
                 dtype: torch.dtype | None = None) -> None:
    """Raises LavinError unless it is a plain floating-point tensor of this shape.

    Its values must be finite, also after a cast to `dtype` if that is given.
    """
    check_plain(path, name, tensor)
    fault = None
    if not tensor.is_floating_point():
        fault = f"holds {tensor.dtype}, not floating-point numbers"
    elif shape is not None and tensor.shape != shape:
        fault = (f"is {tuple(tensor.shape)}, but this model's is {tuple(shape)}: "
                 "these files do not belong together")
    elif not is_finite(tensor, dtype):
        fault = f"holds values that are not finite in {dtype or tensor.dtype}"
    if fault:
        raise LavinError(f"{path}: {name} {fault}")


def is_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Is the tensor free of NaN and infinity after a cast to `dtype`? (Default: its own.)

    Checking only the minimum and the maximum is faster than isfinite.
    """
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:      # aminmax does not support 8-bit floats
        tensor = tensor.float()
    smallest, largest = tensor.detach().aminmax()
    dtype = dtype or tensor.dtype
    return math.isfinite(smallest.to(dtype)) and math.isfinite(largest.to(dtype))


@torch.no_grad()
def fill(parameters: dict, state: dict, path: str | Path) -> None:
    """Copy `state` into `parameters`, both {name: tensor}. Names and shapes must be equal."""
    check_names(path, parameters, state)
    for name, parameter in parameters.items():
        check_tensor(path, name, state[name], parameter.shape, parameter.dtype)
        parameter.copy_(state[name])


def fingerprint(path: str | Path) -> str:
    """A hash of a file, or of all weights in a folder, to tell models apart.

    It covers the size of every file and 64 KB at each of 16 places in it. So it takes milliseconds,
    while hashing 13 GB takes a minute. Two models of one architecture get different hashes.
    """
    n_places = 16
    n_bytes = 2**16
    files = [Path(path)]
    if os.path.isdir(path):
        weights = (".pth", ".safetensors", ".bin")
        files = sorted(file for file in Path(path).iterdir() if file.suffix in weights)
    key = hashlib.sha256()
    for file in files:
        check_regular(file)
        size = file.stat().st_size
        key.update(str(size).encode())
        with open(file, "rb") as opened:
            for i in range(n_places):
                opened.seek(size * i // n_places)
                key.update(opened.read(n_bytes))
    return key.hexdigest()[:16]


# Writing


def check_replaceable(path: str | Path) -> None:
    """OSError for a folder or a device: renaming a file to this path would replace the device."""
    if os.path.isdir(path):
        raise OSError(errno.EINVAL, "it is a directory")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is not a regular file")


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path)`, then rename. Readers never see a half-written file.

    The temporary name contains the process id, so that two processes do not write to one file. The
    folder is made if it does not exist. Raises LavinError if the file cannot be written.
    """
    temporary = None
    try:
        target = Path(os.path.realpath(path))       # keep a link, write its target
        check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        write(temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError, ValueError) as error:
        raise LavinError(f"{path}: cannot be written ({why_not(error)})") from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()


def why_not(error: Exception) -> str:
    """Why writing failed, in the system's words if it has any."""
    cause = error.__context__               # torch.save itself only says "unexpected pos"
    if isinstance(error, RuntimeError) and isinstance(cause, OSError):
        error = cause
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def save_tensors(path: str | Path, content: object) -> None:
    """torch.save, atomically. Raises LavinError if the file cannot be written."""
    def write(temporary):
        with open(temporary, "wb") as file:     # a path would hide "disk full"
            torch.save(content, file)

    write_atomically(path, write)


def check_writable(path: str | Path, flag: str) -> None:
    """Make the directory of `path`. Raises LavinError if nothing can be written there.

    So a run ends now and not after hours.
    """
    path = Path(path)
    try:
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LavinError(f"{flag}: {path} cannot be written ({error.strerror}); "
                         "choose another place") from error


def remove_temporaries(folder: str | Path) -> None:
    """Remove the temporary files that a killed process's `write_atomically` left in a folder."""
    for temporary in Path(folder).glob("*.tmp"):
        if re.fullmatch(r".+\.\d+\.tmp", temporary.name) and temporary.is_file():
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str | Path, otherwise: str | None) -> Iterator[None]:
    """A context manager: only one process at a time can hold the lock of a folder.

    If another one holds it: LavinError(otherwise), or wait if that is None. The system releases the
    lock when the process ends in any way. On a file system without locks, nothing is locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    how = fcntl.LOCK_EX | fcntl.LOCK_NB if otherwise else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError as error:
        os.close(descriptor)
        raise LavinError(otherwise) from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)
