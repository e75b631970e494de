"""Helpers that several test modules share. Fixtures are in conftest.py."""

import copy
import json
import math
import shutil
import threading
import zipfile

import torch

from conftest import ADAPTER, LLAMA, VIT
from files import LavinError, read_checkpoint, tokenizer_path

# Flags


def ask(*more, prompt="Name a metal.", adapter=ADAPTER, llama=LLAMA, vit=VIT):
    """The flags of generate.py that ask a question."""
    return [
        "--prompt", prompt, "--adapter", adapter, "--llama", llama, "--vit", vit,
        "--max-new-tokens", 2, *more]


# Files


def edit(path, change):
    """Apply change(content) to a JSON file, in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_config(folder, **changes):
    """Change or add settings in a config.json."""
    edit(folder / "config.json", lambda config: config.update(changes))


# Runs


def checkpoint_of(out):
    """The content of a run's checkpoint."""
    return read_checkpoint(out / "checkpoint.pth")


def read_metrics(out):
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Two runs have exactly the same weights, optimizer state and losses."""
    left = checkpoint_of(a)
    right = checkpoint_of(b)
    assert left["step"] == right["step"]
    for name, weight in left["model"].items():
        assert torch.equal(weight, right["model"][name]), name
    for i, state in left["optimizer"]["state"].items():
        for name, value in state.items():
            other = right["optimizer"]["state"][i][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (i, name)
    for line, other in zip(read_metrics(a), read_metrics(b), strict=True):
        for name in ("step", "loss", "lr"):
            assert line[name] == other[name], name


# Calls


def outcome(action, seconds=30):
    """What `action()` returns, or the LavinError that it raises. It must end within `seconds`."""
    results = []

    def act():
        try:
            results.append(action())
        except LavinError as error:
            results.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it hangs, or raised an error other than LavinError"
    return results[0]


# Zip files


def read_entries(path):
    """{name: bytes} of a zip file."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def list_again(path, name, more):
    """Change a zip file: its directory lists the entry `name` under the names `more`, too."""
    with zipfile.ZipFile(path, "a") as archive:
        for another in more:
            entry = copy.copy(archive.getinfo(name))
            entry.filename = another
            archive.filelist.append(entry)
        archive.comment = b"changed"                # so the directory is rewritten


# Damaged weights


def copy_llama(directory):
    """A copy of LLAMA and its tokenizer, which a test may damage -> its directory."""
    directory.mkdir()
    for path in (LLAMA / "params.json", LLAMA / "consolidated.00.pth", tokenizer_path(LLAMA)):
        shutil.copy(path, directory)
        (directory / path.name).chmod(0o644)
    return directory


def with_one(value):
    """A function that copies a tensor and puts `value` into its middle."""
    def change(tensor):
        changed = tensor.float().clone()
        changed.flatten()[changed.numel() // 2] = value
        return changed
    return change


def nested(tensor):
    return torch.nested.nested_tensor([tensor.float(), tensor.float()])


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


# Faulty tensors: {fault: (how to make it, what the error says)}
FAULTS = {
    "NaN": (with_one(math.nan), "not finite"),
    "infinity": (with_one(-math.inf), "not finite"),
    "int8": (lambda tensor: tensor.to(torch.int8), "torch.int8, not floating-point"),
    "bool": (lambda tensor: tensor > 0, "torch.bool, not floating-point"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "torch.complex64, not floating-point"),
    "sparse": (lambda tensor: tensor.to_sparse(), "is not a plain tensor"),
    "nested": (nested, "is not a plain tensor"),
    "meta": (lambda tensor: tensor.to("meta"), "is not a plain tensor"),
    "quantized": (quantized, "is quantized"),
    "expanded": (lambda tensor: torch.zeros(1).expand(2**40), "has more elements than its storage"),
    "0-d": (lambda tensor: tensor.flatten()[0].clone(), r"is \(\)"),
    "another shape": (lambda tensor: tensor[1:].clone(), "ask for|this model's is"),
    "one dimension more": (lambda tensor: tensor[None].clone(), "ask for|this model's is"),
    "no tensor": (lambda tensor: tensor.tolist(), "is list, not a tensor"),
}


# Odd content

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
showpage
%%EOF
"""


AWKWARD = [
    "The capital of France is", "héllo wörld, ñandú", "👩‍👩‍👧 emoji 🎉", "12345 678 3.14",
    "def f(x):\n\treturn x ** 2  # twice\n", "  leading and trailing  ", "漢字かな", "½ ² Ⅷ",
    "don't, I'LL, you're", "a\r\n\r\nb", "Image: ", "", "nul \0 in it", "e\u0301"]
