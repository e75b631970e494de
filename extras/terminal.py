"""How a script prints and ends: an error is a single line, and all text is safe to show.

Every script calls its `main` through `run`. An error with an outside cause, from a wrong flag to a
full disk, ends the script with one line on stderr and exit code 2. All output passes through
`Terminal`, because file names, data and the model's answers may contain escape sequences, which
would control the user's terminal, and characters that the terminal cannot show.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator

import torch

from files import LavinError

# Control characters except tab, newline and carriage return (which progress bars need), and the
# marks that change the direction of text.
UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST_MESSAGE = 600           # characters


class Terminal:
    """Wraps a text stream. Replaces unsafe characters and those that the stream cannot show.

    The first write that fails raises LavinError. All later writes are dropped.
    """

    def __init__(self, stream, name: str):
        self.stream = stream
        self.name = name
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.errors = "replace"
        self.is_broken = False

    def write(self, text: str) -> int:
        safe = UNSAFE.sub("\ufffd", text)
        safe = safe.encode(self.encoding, "replace").decode(self.encoding)
        self.attempt(lambda: self.stream.write(safe))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable) -> None:
        if self.is_broken:
            return
        try:
            action()
        except OSError as error:            # a full disk, or a closed pipe as with `| head`
            self.is_broken = True
            # Python flushes the stream at exit. With /dev/null, this does not fail a second time.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            raise LavinError(f"{self.name} cannot be written ({error.strerror})") from error

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


@contextlib.contextmanager
def terminals() -> Iterator[None]:
    """A context manager. Inside it, stdout and stderr pass through `Terminal`."""
    stdout = sys.stdout
    stderr = sys.stderr
    nothing = open(os.devnull, "w")         # a stream that the shell closed is None
    sys.stdout = Terminal(stdout or nothing, "standard output")
    sys.stderr = Terminal(stderr or nothing, "standard error")
    try:
        yield
    finally:
        sys.stdout = stdout
        sys.stderr = stderr
        nothing.close()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong flag like any other error, in one line."""

    def error(self, message: str) -> None:
        raise LavinError(f"{message}; {self.prog} --help lists the flags")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            if value == []:                 # how argparse reads --name=--
                self.error(f"argument --{name.replace('_', '-')}: expected a value")
        return parsed


def explain(error: Exception) -> str | None:
    """The message for an error with an outside cause. None for a bug in this code."""
    if isinstance(error, LavinError):
        return str(error)
    # If a CPU or Apple's GPU runs out of memory, PyTorch raises a plain RuntimeError. Only its
    # text shows the cause.
    too_little = (MemoryError, torch.OutOfMemoryError)
    words = ("can't allocate memory", "MPS backend out of memory")
    if isinstance(error, too_little) or any(part in str(error) for part in words):
        return ("there is too little memory for this; try --bits 8 or 4, a lower --max-seq-len, or "
                "fewer samples at a time (train.py: --micro-batch; generate.py: --batch-size)")
    # If a worker dies, PyTorch raises this at whatever line the main process has reached.
    if "DataLoader worker (pid" in str(error):
        return ("a process that decodes pictures was killed, perhaps because memory ran out; "
                "--workers 0 uses no such processes")
    if isinstance(error, OSError):
        return f"system error: {error}"
    return None


def end_with(message: str) -> None:
    """Print the message as one line, and exit with code 2."""
    line = " ".join(message.split())
    if len(line) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        line = f"{line[:half]} … {line[-half:]}"
    rank = ""
    if "RANK" in os.environ:                # under torchrun
        rank = f"rank {os.environ['RANK']}: "
    with contextlib.suppress(LavinError):   # if stderr cannot be written, nobody can be told
        print(f"{rank}error: {line}", file=sys.stderr)
        sys.stderr.flush()
    sys.exit(2)


def run(main: Callable[[], None]) -> None:
    """Call a script's `main()`. An error with an outside cause becomes one line on stderr."""
    warnings.simplefilter("ignore")     # these are for developers; stderr is for errors
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with terminals():
        try:
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            end_with(message)
