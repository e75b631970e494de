"""README, CONTRIBUTING and docs/: every command line parses, every name of the source is there,
docs/paper.md shows what its code prints, and docs/flags.md lists the flags as they are.
"""

import argparse
import ast
import contextlib
import io
import re
import shlex
import sys

import pytest

from conftest import ROOT
from examples import flags as flags_page
from extras import flags
from files import LavinError
from train import Settings

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = ("train.py", "generate.py")
CALL = re.compile(r"\s*(\$ )?(\w+=\S+ )*(\S*python |(srun )?torchrun .*)?(train|generate)\.py -")


def code_of(text):
    """The code in a page of Markdown: the lines of its fenced blocks, and each `span`."""
    code = []
    is_fenced = False
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced:
            code.append(line)
        else:
            code.extend(re.findall(r"`([^`]+)`", line))
    return code


def commands_of(text):
    """["python", "train.py", "--data", …] for each call of train.py or generate.py with flags."""
    commands = []
    for code in code_of(text):
        for part in code.split("&&"):
            if CALL.match(part):
                commands.append(shlex.split(part.removeprefix("$ "), comments=True))
    return commands


def check_command(command):
    """LavinError for an unknown flag, a value out of range, or conflicting flags."""
    for script in SCRIPTS:
        if script in command:
            values = command[command.index(script) + 1:]
            if "--help" in values:
                return
            if script == "train.py":
                parser = flags.train_parser("")
                flags.check_settings(parser.parse_args(values, Settings()))
            else:
                parser = flags.generate_parser("")
                flags.check_args(parser.parse_args(values))


@pytest.fixture
def check_as_started(monkeypatch):
    """check_command, with the variables that torchrun sets if the command begins with it."""
    def check(command):
        with monkeypatch.context() as patch:
            if "torchrun" in command:
                patch.setenv("RANK", "0")
                patch.setenv("WORLD_SIZE", "8")
            check_command(command)

    return check


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_command_parses(page, check_as_started):
    for command in commands_of(page.read_text(encoding="utf-8")):
        try:
            check_as_started(command)
        except LavinError as error:
            raise AssertionError(f"{page.name}: {shlex.join(command)}: {error}") from error


def test_the_counts_of_the_paper_page():
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    script, shown = re.search(r"```python\n(.*?)```\n```\n(.*?)```", page, re.DOTALL).groups()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(script, {})
    assert printed.getvalue() == shown
    for count in re.findall(r"[\d,]{9}", shown):
        millions = int(count.replace(",", "")) / 1e6
        assert f"| {millions:.2f} |" in page, f"{count} is in no table"


def test_the_page_of_flags_is_up_to_date(tmp_path, monkeypatch):
    file = tmp_path / "flags.md"
    monkeypatch.setenv("COLUMNS", "20")         # the terminal's width does not matter
    monkeypatch.setattr(sys, "argv", ["flags.py", str(file)])
    flags_page.main()
    committed = ROOT / "docs" / "flags.md"
    assert file.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8"), (
        "run python -m examples.flags docs/flags.md")


def test_every_flag_is_on_its_page_and_says_what_it_is_for():
    page = flags_page.page()
    for parser in (flags.train_parser(""), flags.generate_parser("")):
        for line in parser.format_help().splitlines():
            for name in re.findall(r"^  (--[a-z-]+)", line):
                assert re.search(rf"^\| `{name}\b.*` \| \w", page, re.MULTILINE), name


# What README says about the source


def names_in(path):
    """All names that a module defines: "LaVIN", "LaVIN.forward", "FIXED"."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    names.add(f"{node.name}.{inner.name}")
    return names


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_name_that_a_page_mentions_is_in_its_file(page):
    for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", page.read_text(encoding="utf-8")):
        assert name in names_in(ROOT / file), f"{page.name}: {file}: {name}"


def test_the_files_are_as_long_as_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    counts = re.findall(r"`(\w+\.py)`(?: \| | \()(\d+)", readme)
    assert len(counts) == 9
    for file, count in counts:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert len(lines) == int(count), file


def test_the_lines_to_read_are_where_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, last = map(int, re.search(r"\(lines (\d+)–(\d+)\)", readme).groups())
    lines = (ROOT / "data.py").read_text(encoding="utf-8").splitlines()
    assert lines[first - 1] == "# Samples, tokens, batches"
    assert lines[last + 2].startswith("# Which samples")        # two blank lines, the next section
    end = int(re.search(r"the end of `train` \(line (\d+)\)", readme).group(1))
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    ends = {node.name: node.end_lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert end == ends["train"]


# The checks themselves can fail


def test_a_flag_is_shown_with_its_values():
    parser = argparse.ArgumentParser()
    group = parser.add_argument_group("all kinds")
    group.add_argument("file", help="a place")
    group.add_argument("--many", nargs="+", help="100 %% of them")
    group.add_argument("--perhaps", nargs="?", metavar="P", help="one | none")
    group.add_argument("--yes", action=argparse.BooleanOptionalAction, help="a switch")
    assert flags_page.section("x.py", parser) == [
        "## x.py", "",
        "| all kinds | |", "|---|---|",
        "| `file` | a place |",
        "| `--many MANY [MANY ...]` | 100 % of them |",
        r"| `--perhaps [P]` | one \| none |",
        "| `--yes, --no-yes` | a switch |", ""]


def test_commands_are_found():
    page = """
Run `python train.py --data sqa`, or `generate.py` (see `train.py: train`), as in

```
python3 -m venv .venv && .venv/bin/python train.py --out a     # a comment
torchrun --nproc-per-node 8 train.py --data sqa
python generate.py --prompt "two words" \\
    --image x.png && generate.py --serve
$ .venv/bin/python generate.py --chat
OMP_NUM_THREADS=1 srun torchrun --nnodes 2 train.py --fsdp
saved    out/checkpoint.pth
```
"""
    assert commands_of(page) == [
        ["python", "train.py", "--data", "sqa"],
        [".venv/bin/python", "train.py", "--out", "a"],
        ["torchrun", "--nproc-per-node", "8", "train.py", "--data", "sqa"],
        ["python", "generate.py", "--prompt", "two words", "--image", "x.png"],
        ["generate.py", "--serve"],
        [".venv/bin/python", "generate.py", "--chat"],
        ["OMP_NUM_THREADS=1", "srun", "torchrun", "--nnodes", "2", "train.py", "--fsdp"]]


@pytest.mark.parametrize("command", [
    "python train.py --no-pictures",
    "python train.py --experts 3",
    "python train.py --rank 5",
    "python generate.py --data sqa --split",
    "python generate.py --data sqa --chat",
    "python train.py --fsdp",
    "torchrun --nproc-per-node 8 train.py --fsdp --bits 8",
    "torchrun --nproc-per-node 8 generate.py --chat"])
def test_a_wrong_command_is_found(command, check_as_started):
    with pytest.raises(LavinError):
        check_as_started(command.split())
