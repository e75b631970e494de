"""Read TorchScript archives, such as OpenAI's CLIP, as data. None of their code runs.

torch.jit.load compiles the code/ of an archive. Some of this code runs in unexpected places: in a
class's `__setstate__`, or in a submodule's own `values()` when state_dict() looks for hooks. This
file reads only two kinds of entries: data.pkl, the tree of modules, and data/0, data/1, …, the
bytes of their tensors. data.pkl is a pickle, so it is a program as well. But TorchScript uses few
instructions in it, and `unpickle` executes them without importing or calling anything.
"""

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from files import LavinError, check_not_packed, check_regular, is_zip

LARGEST_PICKLE = 2**20      # bytes; ViT-L/14's data.pkl has a twentieth of this
MOST_ATTRIBUTES = 10_000    # modules and tensors of an archive
LONGEST_NAME = 300          # characters in a tensor's name, including the names of its modules

# The names of the dtypes in data.pkl.
STORAGE_DTYPES = {
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
    """The name of something that a pickle imports: "torch HalfStorage". We do not import it."""


class Module(dict):
    """{name: attribute} of a module in the archive."""


class Tensor(NamedTuple):
    """The place of a tensor in the archive. Its bytes are not read yet."""
    storage: tuple      # "storage", a key of STORAGE_DTYPES, its entry in data/, a device, its size
    offset: int         # of the first number; counts numbers, as the strides do
    shape: tuple
    strides: tuple


# data.pkl


def unpickle(pickled: bytes) -> object:
    """The content of a data.pkl that TorchScript wrote: a `Module`.

    Raises UnpicklingError for anything that TorchScript does not write. Damaged bytes may raise any
    exception.
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
            raise pickle.UnpicklingError(f"its data.pkl has {name}, which TorchScript never writes")
    return stack.pop()


def gather(stack: list, start: int) -> None:
    """Replace the items from `start` on with a tuple of them."""
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
        if type(key) is str:            # hashing nested tuples can take forever
            stack[-1][key] = value


def build(name: str, stack: list) -> None:
    """Make a module, fill it, or make a tensor. A pickle would call classes and functions."""
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
    """Yield (name, tensor) of all modules. UnpicklingError for too many modules, or a cycle."""
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
                raise pickle.UnpicklingError("holds too many modules, or one inside itself")
            if isinstance(value, Module):
                waiting.append((f"{name}.", value))
            else:
                yield name, value


def find_root(archive: zipfile.ZipFile) -> str | None:
    """The root folder inside a TorchScript archive. None for any other zip file."""
    for name in archive.namelist():
        root, _, entry = name.partition("/")
        if entry == "constants.pkl":    # torch.save does not write it
            return root
    return None


def read_tensor(archive: zipfile.ZipFile, root: str, tensor: Tensor,
                contents: dict[str, bytearray]) -> torch.Tensor:
    """Read a tensor. If it does not lie within its storage, this may raise any exception.

    contents: the storages read so far. Tensors may share them.
    """
    _, kind, key, _, n_numbers = tensor.storage
    if type(key) is not str or type(n_numbers) is not int or not isinstance(kind, Global):
        raise ValueError("its tensors have no storages")
    if key not in contents:
        contents[key] = bytearray(archive.read(f"{root}/data/{key}"))
    content = contents[key]
    dtype = STORAGE_DTYPES[kind]
    if len(content) != n_numbers * dtype.itemsize:
        raise ValueError(f"data/{key} has {len(content)} bytes, not {n_numbers} {dtype}")
    numbers = torch.frombuffer(content, dtype=dtype)
    return numbers.as_strided(tensor.shape, tensor.strides, tensor.offset)


def read_archive(path: str | Path, prefix: str) -> dict[str, torch.Tensor] | None:
    """What `read_tensors` returns. A damaged archive may raise any exception."""
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
    """{name: tensor} for names that start with `prefix`. None if this is no TorchScript archive.

    The names are those of torch.jit.load(path).state_dict(). Tensors that are plain attributes,
    neither parameters nor buffers, are included. Raises LavinError if the file cannot be read.
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
    except Exception as error:          # on damaged bytes, the reader may raise any exception
        raise LavinError(f"{path}: not a readable CLIP archive ({error}); truncated? fetch it again"
                         ) from error
