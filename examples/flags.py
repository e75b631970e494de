"""The flags of train.py, generate.py and checkpoints.py as Markdown, with --help's texts.

    python -m examples.flags docs/flags.md
"""

import argparse
from pathlib import Path

import checkpoints
from extras import flags
from extras.terminal import Parser, run
from files import write_atomically
from tiny import world

BEGINNING = """# Every flag

`python -m examples.flags docs/flags.md` writes this page. `--help` says the same.
"""


def shown(action: argparse.Action) -> str:
    """A flag and its value, as --help shows them: "--weights W [W ...]"."""
    names = ", ".join(action.option_strings)
    value = action.metavar or action.dest.upper()
    if not names:                           # a positional argument
        return action.metavar or action.dest
    if action.nargs == 0:                   # a switch
        return names
    if action.nargs == "?":
        return f"{names} [{value}]"
    if action.nargs == "+":
        return f"{names} {value} [{value} ...]"
    return f"{names} {value}"


def section(script: str, parser: argparse.ArgumentParser) -> list[str]:
    """The lines of a script's section: a table for each group of flags."""
    lines = [f"## {script}", ""]
    # Only argparse's private attributes list the groups. Its own help text depends on the width of
    # the terminal and on the version of Python.
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        lines += [f"| {group.title} | |", "|---|---|"]
        for action in actions:
            meaning = action.help.replace("%%", "%").replace("|", "\\|")
            lines.append(f"| `{shown(action)}` | {meaning} |")
        lines.append("")
    return lines


def small_world() -> list[str]:
    """The lines about train.py's defaults for the small world."""
    defaults = []
    for name, value in world.DEFAULTS.items():
        defaults.append(f"`--{name.replace('_', '-')} {value}`")
    *first, last = defaults
    return [f"For the small world the defaults are {', '.join(first)} and {last}.", ""]


def page() -> str:
    lines = [BEGINNING]
    lines += section("train.py", flags.train_parser(""))
    lines += small_world()
    lines += section("generate.py", flags.generate_parser(""))
    lines += section("checkpoints.py", checkpoints.flag_parser())
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    file = parser.parse_args().file
    write_atomically(file, lambda temporary: temporary.write_text(page(), encoding="utf-8"))
    print(f"written: {file}")


if __name__ == "__main__":
    run(main)
