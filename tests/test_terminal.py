"""What reaches the user's terminal: only text that it can show, and one line for an error."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints
import generate
from conftest import ADAPTER, LLAMA, ROOT, VIT
from extras import terminal
from extras.chat import Conversation
from extras.terminal import LONGEST_MESSAGE, Terminal
from files import LavinError

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f\0\u202e\u2066"


def written(text, encoding="utf-8"):
    """The text that a Terminal with this encoding writes for a text."""
    raw = io.BytesIO()
    stream = Terminal(io.TextIOWrapper(raw, encoding=encoding, newline=""), "standard output")
    assert stream.write(text) == len(text)
    stream.flush()
    return raw.getvalue().decode(encoding)


# Text


@pytest.mark.parametrize("text", ["Plain · text.\n", "\tcafé → 😀\r 50%", "שלום"])
def test_text_that_can_be_shown_is_left_alone(text):
    assert written(text) == text


@pytest.mark.parametrize("character", "\0\x07\x08\x0b\x1b\x7f\x85\x9b\u202e\u2066")
def test_control_characters_are_replaced(character):
    assert written(f"a{character}b") == "a\ufffdb"


def test_half_a_pair_of_surrogates_is_replaced():
    assert written("caf\udce9 \ud800.") == "caf? ?."


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_what_the_terminal_cannot_show_is_replaced(encoding):
    assert written("a → 😀 b\n", encoding) == "a ? ? b\n"


# Errors


@pytest.fixture
def error_line(capsys):
    """error_line(exception): the line on stderr if a script raises it. The exit code must be 2."""
    def error_line(exception):
        def main():
            raise exception

        with pytest.raises(SystemExit) as end:
            terminal.run(main)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line
    return error_line


def test_an_error_is_one_line_whatever_it_quotes(error_line):
    line = error_line(LavinError(f"a\nb\r\nc\u2028d {HOSTILE} \ud800"))
    assert line.startswith("error: a b c d ")
    assert not set(line) & {"\x1b", "\x07", "\x9b", "\x7f", "\0", "\u202e"}


def test_an_error_is_no_longer_than_a_person_reads(error_line):
    line = error_line(LavinError("start " + "x" * 10**6 + " end"))
    assert len(line) < LONGEST_MESSAGE + 20
    assert line.startswith("error: start") and line.endswith(" end")


# Streams that fail


class Full(io.StringIO):
    """A stream whose disk is full after a number of writes."""

    def __init__(self, n_writes):
        super().__init__()
        self.n_writes = n_writes

    def write(self, text):
        if self.n_writes == 0:
            raise OSError(28, "No space left on device")
        self.n_writes -= 1
        return super().write(text)

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


def test_only_the_first_write_that_fails_raises():
    """Text that is printed during the exit must not raise again and hide the first error."""
    stream = Full(1)
    shown = Terminal(stream, "standard output")
    shown.write("a")
    with pytest.raises(LavinError, match="standard output cannot be written .No space left"):
        shown.write("b")
    shown.write("c")
    shown.flush()
    assert stream.getvalue() == "a"


# The scripts


def test_the_models_words_are_not_sent_raw(call, monkeypatch):
    monkeypatch.setattr(Conversation, "say", lambda *_, **how: iter([f"Red {HOSTILE}", "!"]))
    code, stdout, _ = call(generate, "--prompt", "x", "--llama", LLAMA, "--vit", VIT,
                           "--adapter", ADAPTER)
    assert code == 0
    assert stdout.splitlines()[-1].startswith("Red ") and "\x1b" not in stdout


def start(script, *args):
    """Run a script in a terminal that shows only ASCII -> (code, stdout, stderr)."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, ROOT / script, *map(str, args)]
    result = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    return result.returncode, result.stdout.decode("ascii"), result.stderr.decode("ascii")


def test_train_checks_any_text_in_any_terminal(tmp_path):
    row = {"prompt": f"Say → {HOSTILE}", "answer": f"😀 · {HOSTILE}", "image": None}
    bad = {"prompt": "x", "answer": "y", "image": f"{HOSTILE}.png"}
    path = tmp_path / "caf\udce9 \x1b[31m.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(bad))
    code, stdout, stderr = start("train.py", "--data", f"jsonl:{path}", "--check", "--llama",
                                 LLAMA, "--vit", VIT)
    assert (code, stderr) == (1, "")
    assert "line 2: " in stdout and "1 samples" in stdout and "\x1b" not in stdout


def test_generate_says_what_is_wrong_in_any_terminal():
    code, stdout, stderr = start(
        "generate.py", "--prompt", "café → 😀?", "--llama", LLAMA, "--vit", VIT,
        "--adapter", ADAPTER, "--image", "\udce9\x1b[2J.png")
    assert code == 2 and len(stderr.splitlines()) == 1
    assert "no such picture" in stderr and "\x1b" not in stderr
    assert " ? CLIP " in stdout             # instead of a middle dot


@pytest.mark.parametrize("flags", [
    ["--prompt", "What?"],
    ["--prompt", "What?", "--temperature", 1],
    ["--data", "sqa", "--score", "letters"],
    ["--data", "sqa", "--max-new-tokens", 2],
    ["--data", "jsonl:rows.jsonl", "--score", "choices"],
], ids=["greedy", "sampled", "letters", "texts", "choices"])
def test_logits_that_are_not_finite_are_one_line(flags, fails, monkeypatch, sqa, tmp_path):
    """fp16 may overflow. The largest of NaN logits would be the first token."""
    monkeypatch.chdir(tmp_path)
    rows = ['{"prompt": "x", "answer": "yes"}', '{"prompt": "y", "answer": "no"}']
    Path("rows.jsonl").write_text("\n".join(rows))
    load = checkpoints.load

    def load_broken(*args, **how):
        lavin = load(*args, **how)
        lavin.llama.output.weight.fill_(float("nan"))
        return lavin

    monkeypatch.setattr(checkpoints, "load", load_broken)
    fails(generate, *flags, "--adapter", ADAPTER, "--llama", LLAMA, "--vit", VIT,
          "--data-root", sqa, says=["the model's logits are not finite"])
