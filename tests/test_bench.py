"""The scripts in bench/ start, and bad flags are refused. What they measure is not tested."""

import importlib

import pytest

from conftest import ROOT

NAMES = sorted(path.stem for path in ROOT.glob("bench/*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_measured(name, call):
    script = importlib.import_module(f"bench.{name}")
    code, stdout, _ = call(script, "--help")
    assert code == 0
    assert script.__doc__.splitlines()[0] in " ".join(stdout.split())      # it may be wrapped


@pytest.mark.parametrize("name, flags", [
    ("speed", ["train", "--dtype", "fp33"]),
    ("speed", ["train", "--steps", 0]),
    ("speed", ["train", "--micro-batch", 0]),
    ("reference", [".", "--turns", 0]),
    ("reference", ["nowhere"]),
    ("peak_memory", ["bf16", "cpu", 16, 64]),
    ("ablations", ["x", "--seeds", 0]),
])
def test_bad_flags_are_one_line(name, flags, fails):
    fails(importlib.import_module(f"bench.{name}"), *flags, says=[flags[-1]])


def test_a_flag_for_one_row_needs_shape(fails):
    fails(importlib.import_module("bench.speed"), "train", "--bits", 4, says=["--bits", "--shape"])
