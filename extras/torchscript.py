"""TorchScript archives, as OpenAI's of CLIP are, read as data: none of their code runs.

torch.jit.load compiles the archive's code/, and some of it runs where nobody expects code: in a
class's `__setstate__`, or in a submodule's own `values()` when state_dict() looks for hooks. Here
only two kinds of entries are read: data.pkl, the tree of modules, and data/0, data/1, …, the bytes
of their tensors. data.pkl is a pickle, and so a program as well. But TorchScript writes it with few
instructions, and `unpickle` carries them out without importing or calling anything.
"""

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from files import LavinError, check_not_packed, check_regular, is_zip

LARGEST_PICKLE = 2**20      # bytes; ViT-L/14's data.pkl has a twentieth of that
MOST_ATTRIBUTES = 10_000    # modules and tensors of an archive
LONGEST_NAME = 300          # characters of a tensor's name, its modules' names included

# What data.pkl calls a dtype.
DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch ComplexFloatStorage": torch.complex64,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Global(str):
    """What a pickle would import: "torch HalfStorage". Here it stays a name."""


class Module(dict):
    """{name: attribute} of a module of the archive."""


class Tensor(NamedTuple):
    """Where a tensor of the archive lies. Its bytes are not read yet."""
    storage: tuple      # "storage", a key of DTYPES, the entry below data/, a device, its size
    offset: int         # of the first number; like the strides, counted in numbers
    shape: tuple
    strides: tuple


# data.pkl


def unpickle(pickled: bytes) -> object:
    """What a pickle of TorchScript's holds: a `Module`.

    Raises UnpicklingError for what TorchScript does not write, and anything for damaged bytes.
    """
    stack = []
    marks = []              # where on the stack the items of a list or tuple begin
    memo = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in LITERALS:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(Global(argument))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in TUPLES:
            gather(stack, len(stack) - TUPLES[name])
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            gather(stack, marks.pop())
            if name != "TUPLE":
                extend(stack)
        elif name in ("NEWOBJ", "BUILD", "REDUCE"):
            build(name, stack)
        elif name not in ("PROTO", "BINPERSID", "STOP"):    # BINPERSID: a storage stays a tuple
            raise pickle.UnpicklingError(f"its data.pkl holds {name}, as TorchScript's never do")
    return stack.pop()


def gather(stack: list, start: int) -> None:
    """Make the items from `start` on a tuple."""
    items = tuple(stack[start:])
    del stack[start:]
    stack.append(items)


def extend(stack: list) -> None:
    """Add the tuple on the stack to the list or dictionary below it."""
    items = stack.pop()
    if isinstance(stack[-1], list):
        stack[-1].extend(items)
        return
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is str:            # a hash of nested tuples can take for ever
            stack[-1][key] = value


def build(name: str, stack: list) -> None:
    """Make a module, fill it, or make a tensor: what a pickle has classes and functions for."""
    argument = stack.pop()
    if name == "NEWOBJ":
        stack[-1] = Module()
    elif name == "BUILD":
        if type(argument) is not dict:  # its class has a __setstate__
            raise pickle.UnpicklingError("would run code when it is read")
        stack[-1].update(argument)
    elif stack[-1] == "torch._utils _rebuild_tensor_v2":
        stack[-1] = Tensor(*argument[:4])
    else:                               # no other function makes a weight
        stack[-1] = argument


# The archive


def named_tensors(root: Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all modules. UnpicklingError for too many, as of a module within itself."""
    waiting = [("", root)]
    n_attributes = 0
    while waiting:
        prefix, module = waiting.pop()
        for key, value in module.items():
            if not isinstance(value, Module | Tensor):
                continue
            name = prefix + key
            n_attributes += 1
            if n_attributes > MOST_ATTRIBUTES or len(name) > LONGEST_NAME:
                raise pickle.UnpicklingError("holds too many modules, or one within itself")
            if isinstance(value, Module):
                waiting.append((f"{name}.", value))
            else:
                yield name, value


def find_root(archive: zipfile.ZipFile) -> str | None:
    """The folder of a TorchScript archive's entries. None for a zip file that is none."""
    for name in archive.namelist():
        root, _, entry = name.partition("/")
        if entry == "constants.pkl":    # torch.save writes none
            return root
    return None


def read_tensor(archive: zipfile.ZipFile, root: str, tensor: Tensor,
                contents: dict[str, bytearray]) -> torch.Tensor:
    """The tensor itself. Raises anything if it does not lie within its storage.

    contents: the storages read so far, since tensors may share them.
    """
    _, kind, key, _, n_numbers = tensor.storage
    if type(key) is not str or type(n_numbers) is not int or not isinstance(kind, Global):
        raise ValueError("its tensors have no storages")
    if key not in contents:
        contents[key] = bytearray(archive.read(f"{root}/data/{key}"))
    content = contents[key]
    dtype = DTYPES[kind]
    if len(content) != n_numbers * dtype.itemsize:
        raise ValueError(f"data/{key} has {len(content)} bytes, not {n_numbers} {dtype}")
    numbers = torch.frombuffer(content, dtype=dtype)
    return numbers.as_strided(tensor.shape, tensor.strides, tensor.offset)


def read_archive(path: str | Path, prefix: str) -> dict[str, torch.Tensor] | None:
    """What `read_tensors` returns; raises anything for a damaged archive."""
    with zipfile.ZipFile(path) as archive:
        root = find_root(archive)
        if root is None:
            return None
        tree = archive.getinfo(f"{root}/data.pkl")
        entries = [entry for entry in archive.infolist()
                   if entry.filename.startswith(f"{root}/data/")]
        check_not_packed(path, [tree, *entries])
        if tree.file_size > LARGEST_PICKLE:
            raise pickle.UnpicklingError(f"its data.pkl has {tree.file_size:,} bytes")
        tensors = {}
        contents = {}
        for name, tensor in named_tensors(unpickle(archive.read(tree))):
            if name.startswith(prefix):
                tensors[name] = read_tensor(archive, root, tensor, contents)
        return tensors


def read_tensors(path: str | Path, prefix: str = "") -> dict[str, torch.Tensor] | None:
    """{name: tensor} of the names that begin with `prefix`; None if it is no TorchScript archive.

    The names are those of torch.jit.load(path).state_dict(). A tensor that is a mere attribute,
    neither parameter nor buffer, is among them too. Raises LavinError for what cannot be read.
    """
    check_regular(path)
    try:
        return read_archive(path, prefix) if is_zip(path) else None
    except LavinError:
        raise
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise LavinError(f"{path}: {error}; not loaded") from error
    except Exception as error:          # damaged bytes make the reader raise anything
        raise LavinError(f"{path}: not a readable CLIP archive ({error}); truncated? fetch it again"
                         ) from error
