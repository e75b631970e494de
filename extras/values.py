"""The types and ranges of values from outside. Flags, checkpoints and JSON share them.

`meta_name` is also here: extras/hf.py and extras/gguf.py share it to translate tensors' names.

    EPOCHS = Kind(int, low=1, high=100_000)
    parser.add_argument("--epochs", type=EPOCHS.parse)          # text from the command line
    EPOCHS.fault(content["epochs"])                             # a value from a file
"""

import argparse
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass

from data import FORMATS
from files import DTYPES, LavinError

LONGEST_TEXT = 4096             # characters of a text in a flag or a checkpoint


@dataclass(frozen=True)
class Kind:
    """The type of a value, and its range or its choices. `fault` names what is wrong."""
    type: type                      # bool, int, float or str
    low: float | None = None        # the smallest allowed value
    above: float | None = None      # allowed values are greater than this
    high: float | None = None       # the largest allowed value
    below: float | None = None      # allowed values are smaller than this
    choices: tuple = ()
    is_list: bool = False           # a non-empty list of such values
    length: int | None = None       # of that list
    optional: bool = False          # None is allowed too

    def describe(self) -> str:
        """The kind in words: "a whole number that is at least 1"."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        names = {bool: "true or false", int: "a whole number", float: "a number",
                 str: f"text of at most {LONGEST_TEXT:,} characters"}
        bounds = []
        if self.low is not None:
            bounds.append(f"at least {self.low:,}")
        if self.above is not None:
            bounds.append(f"above {self.above:,}")
        if self.high is not None:
            bounds.append(f"at most {self.high:,}")
        if self.below is not None:
            bounds.append(f"below {self.below:,}")
        if not bounds:
            return names[self.type]
        return f"{names[self.type]} that is {' and '.join(bounds)}"

    def allows(self, value: object) -> bool:
        """Is this single value allowed? An int counts as a float, but True is not a number."""
        types = (int, float) if self.type is float else (self.type,)
        if type(value) not in types:
            return False
        if self.choices:
            return value in self.choices
        if self.type is str:
            return is_text(value)
        return self.is_within(value)

    def is_within(self, value) -> bool:
        """Is a number within the bounds? NaN, infinity and floats beyond 1e300 never are."""
        if self.type is float and not abs(value) <= 1e300:
            return False
        return ((self.low is None or value >= self.low)
                and (self.above is None or value > self.above)
                and (self.high is None or value <= self.high)
                and (self.below is None or value < self.below))

    def fault(self, value: object) -> str | None:
        """What is wrong with a value that comes from a file, or None."""
        if value is None and self.optional:
            return None
        if not self.is_list:
            return None if self.allows(value) else f"is {short(value)}, not {self.describe()}"
        if not isinstance(value, list | tuple) or not value:
            return f"is {short(value)}, not a list whose items are each {self.describe()}"
        if self.length is not None and len(value) != self.length:
            return f"has {len(value)} values, not {self.length}"
        for item in value:
            if not self.allows(item):
                return f"holds {short(item)}, not {self.describe()}"
        return None

    def parse(self, text: str) -> object:
        """A value from the command line, for argparse's type=."""
        try:
            value = text if self.type is str else self.type(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not self.allows(value):
            raise argparse.ArgumentTypeError(f"{short(text)} is not {self.describe()}")
        return value


def is_text(value: str) -> bool:
    """Can files and checkpoints hold this text? It must have no NUL and not be too long."""
    return "\0" not in value and len(value) <= LONGEST_TEXT


def short(value: object) -> str:
    """repr, shortened in length and depth to fit into a message."""
    try:
        text = reprlib.repr(value)
    except ValueError:                          # an int of more than 4,300 digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 60 else f"{text[:57]}…"


def check_values(path: object, values: dict, kinds: dict[str, Kind],
                 needed: Iterable[str] = ()) -> None:
    """Raises LavinError for the first of `values` that is not of its kind, or that is missing.

    Values whose name has no kind are not checked.
    """
    for name in needed:
        if name not in values:
            raise LavinError(f"{path}: {name} is missing")
    for name, kind in kinds.items():
        if name in values:
            fault = kind.fault(values[name])
            if fault:
                raise LavinError(f"{path}: {name} {fault}")


def check_supported(path: object, config: dict, supported: dict[str, tuple]) -> None:
    """Raises LavinError for the first setting of a model's file that our model does not support.

    supported: {name: the values we support}. If the file lacks a setting, it counts as the first of
    these values.
    """
    for name, values in supported.items():
        value = config.get(name, values[0])
        if value not in values:
            allowed = " or ".join(repr(v) for v in values)
            raise LavinError(f"{path}: {name} {short(value)} is not supported, only {allowed}")


def meta_name(name: str, layer: str, names: dict[str, str]) -> str | None:
    """Meta's name for a tensor of LLaMA, or None if Meta has no such tensor.

    layer: a pattern with two groups, the number of the layer and the module's name in the layer.
    names: {the module's name, in a layer or outside the layers: Meta's name for it}.
    """
    part, _, kind = name.rpartition(".")                    # kind: "weight" or "bias"
    prefix = ""
    found = re.fullmatch(layer, part)
    if found:
        number, part = found.groups()
        prefix = f"layers.{number}."
    if part not in names:
        return None
    return f"{prefix}{names[part]}.{kind}"


# By default, a training run answers this many rows of each held-out part after an epoch.
HELD_OUT_ROWS = 100
# The fields of ScienceQA's problems by which the scores can be broken down (--by).
SQA_FIELDS = ("skill", "topic", "category", "subject", "grade", "task")

# The settings of a training run (train.Settings): its flags, and a checkpoint's "config".

PATH = Kind(str, optional=True)
COUNT = Kind(int, low=1, high=1_000_000, optional=True)
SETTINGS = {
    "data": Kind(str, is_list=True),
    "weights": Kind(float, above=0, high=1e6, is_list=True, optional=True),
    "format": Kind(str, choices=FORMATS),
    "captions": Kind(bool),
    "images": Kind(bool),
    "multi_turn": Kind(bool),
    "skip_bad": Kind(bool),
    "val_fraction": Kind(float, low=0, below=1),
    "max_seq_len": Kind(int, low=1, high=1_000_000),
    "epochs": COUNT,
    "warmup": Kind(float, low=0, high=1e6, optional=True),
    "batch_size": Kind(int, low=1, high=1_000_000),
    "micro_batch": Kind(int, low=1, high=1_000_000),
    "lr": Kind(float, above=0, high=1e30, optional=True),
    "weight_decay": Kind(float, low=0, high=1000),
    "clip": Kind(float, above=0, high=1e30, optional=True),
    "betas": Kind(float, low=0, below=1, is_list=True, length=2),
    "tau": Kind(float, above=0, high=1e6),
    "dropout": Kind(float, low=0, below=1),
    "rank": Kind(int, low=2, high=2**12),
    "scale": Kind(float, low=-1e6, high=1e6),
    "hidden": Kind(int, low=1, high=2**16),
    "experts": Kind(int, choices=(1, 2)),
    "adapters": Kind(str, choices=("all", "llama", "none")),
    "routing": Kind(bool),
    "seed": Kind(int, low=-2**63, below=2**63),
    "llama": PATH,
    "vit": PATH,
    "delta": PATH,
    "delta_unpermuted": Kind(bool),
    "data_root": PATH,
    "adapter": PATH,
    "out": Kind(str),
    "device": Kind(str),
    "dtype": Kind(str, choices=("auto", *DTYPES)),
    "bits": Kind(int, choices=(16, 8, 4)),
    "compile": Kind(bool, optional=True),
    "checkpointing": Kind(bool),
    "fsdp": Kind(bool),
    "workers": Kind(int, low=0, high=256, optional=True),
    "resume": Kind(bool),
    "check": Kind(bool),
    "dry_run": Kind(bool),
    "tflops": Kind(float, above=0, high=1e9, optional=True),
    "max_steps": COUNT,
    "save_every": COUNT,
    "keep_epochs": Kind(bool),
    "tensorboard": Kind(bool),
    "eval_limit": Kind(int, low=0, high=10_000_000, optional=True),
    "n_samples": Kind(int, low=1, high=10**12, optional=True),
    "data_hash": Kind(str, optional=True),
    "llama_hash": Kind(str, optional=True),
    "vit_hash": Kind(str, optional=True),
}

# The flags of generate.py. Its seed, paths and device are the same as in training.
QUESTION = SETTINGS | {
    "prompt": Kind(str),
    "image": Kind(str),
    "serve": Kind(int, low=0, high=65535),
    "host": Kind(str),
    "data": Kind(str),
    "show_routing": Kind(str),
    "split": Kind(str),
    "score": Kind(str, choices=("letters", "choices")),
    "by": Kind(str),
    "predictions": Kind(str),
    "batch_size": Kind(int, low=1, high=100_000),
    "max_new_tokens": COUNT,
    "temperature": Kind(float, low=0, high=1e6),
    "top_p": Kind(float, above=0, high=1),
}

# The `args` of a LaVIN checkpoint, named like the authors' flags. Their files hold many more.
ADAPTER_ARGS = {
    "temperature": Kind(float, above=0, high=1e6),
    "adapter_scale": Kind(float, low=-1e6, high=1e6),
    "dropout": Kind(float, low=0, below=1),
    "max_seq_len": Kind(int, low=1, high=1_000_000, optional=True),
    "prompt_format": Kind(str, choices=FORMATS, optional=True),
}

# What the same checkpoint holds besides the weights.
PROGRESS = {
    "step": Kind(int, low=0, high=10**12, optional=True),
    "epoch": Kind(int, low=0, high=10**12, optional=True),
}

# LLaMA's sizes, the fields of LLaMAConfig. LLaMA-3 405B has 126 layers of width 16,384.
LLAMA_PARAMS = {
    "dim": Kind(int, low=2, high=2**17),
    "n_layers": Kind(int, low=1, high=1000),
    "n_heads": Kind(int, low=1, high=2**12),
    "n_kv_heads": Kind(int, low=1, high=2**12, optional=True),
    "vocab_size": Kind(int, low=1, high=2**22),
    "multiple_of": Kind(int, low=1, high=2**17),
    "ffn_dim_multiplier": Kind(float, above=0, high=100, optional=True),
    "hidden_dim": Kind(int, low=1, high=2**20, optional=True),
    "norm_eps": Kind(float, above=0, high=0.1),
    "rope_theta": Kind(float, low=1, high=1e12),
    "rope_factor": Kind(float, low=1, high=1e6),
    "rope_low": Kind(float, above=0, high=1e6),
    "rope_high": Kind(float, above=0, high=1e6),
    "rope_context": Kind(int, low=1, high=2**30),
    "head_dim": Kind(int, low=1, high=2**14, optional=True),
    "attention_bias": Kind(bool),
    "tied_embeddings": Kind(bool),
    "folded": Kind(bool),
}
