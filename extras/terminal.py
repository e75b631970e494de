"""What a script says and how it ends: one line for an error, and only text that can be shown.

Every script calls its `main` through `run`. Whatever goes wrong outside of this code, from a wrong
flag to a full disk, ends in one line on stderr and exit code 2. All output passes through
`Terminal`: file names, data and the model's answers may hold escape sequences, which would act on
the person's terminal, and characters that it cannot show.
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

# Control characters but tab, newline and carriage return (progress bars need it), and the marks
# that make text run in the other direction.
UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST_MESSAGE = 600           # characters


class Terminal:
    """A text stream that replaces what the stream cannot show or should not be sent.

    The first write that fails raises LavinError. What is written after that is dropped.
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
        except OSError as error:            # a full disk, or `| head`, which has read enough
            self.is_broken = True
            # At its end, Python flushes what the stream still holds, and would complain once more.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            raise LavinError(f"{self.name} cannot be written ({error.strerror})") from error

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


@contextlib.contextmanager
def terminals() -> Iterator[None]:
    """In a `with`, stdout and stderr pass through `Terminal`."""
    stdout = sys.stdout
    stderr = sys.stderr
    nothing = open(os.devnull, "w")         # where a shell has closed a stream, it is None
    sys.stdout = Terminal(stdout or nothing, "standard output")
    sys.stderr = Terminal(stderr or nothing, "standard error")
    try:
        yield
    finally:
        sys.stdout = stdout
        sys.stderr = stderr
        nothing.close()


class Parser(argparse.ArgumentParser):
    """argparse's parser, which takes a wrong flag as any other error: one line."""

    def error(self, message: str) -> None:
        raise LavinError(f"{message}; {self.prog} --help lists the flags")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            if value == []:                 # argparse's reading of --name=--
                self.error(f"argument --{name.replace('_', '-')}: expected a value")
        return parsed


def explain(error: Exception) -> str | None:
    """The line for an error that comes from outside of this code. None for our own mistakes."""
    if isinstance(error, LavinError):
        return str(error)
    # What a CPU or Apple's GPU says when it has no memory left is a RuntimeError like any other.
    too_little = (MemoryError, torch.OutOfMemoryError)
    words = ("can't allocate memory", "MPS backend out of memory")
    if isinstance(error, too_little) or any(part in str(error) for part in words):
        return ("there is too little memory for this; --bits 8 or 4, or a lower --batch-size "
                "or --max-seq-len, would help")
    if "probability tensor contains" in str(error):         # torch.multinomial's words
        return ("the model's logits are not finite, so no token can be drawn; "
                "--dtype bf16 or fp32 has a wider range than fp16")
    # Wherever this process is when a worker dies, PyTorch raises it there.
    if "DataLoader worker" in str(error):
        return ("a process that decodes pictures was killed, perhaps for want of memory; "
                "--workers 0 does without such processes")
    if isinstance(error, OSError):
        return f"the system refused: {error}"
    return None


def end_with(message: str) -> None:
    """Print the one line, and exit with code 2."""
    line = " ".join(message.split())
    if len(line) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        line = f"{line[:half]} … {line[-half:]}"
    rank = ""
    if "RANK" in os.environ:                # under torchrun
        rank = f"rank {os.environ['RANK']}: "
    with contextlib.suppress(LavinError):   # stderr cannot be written: there is nobody to tell
        print(f"{rank}error: {line}", file=sys.stderr)
        sys.stderr.flush()
    sys.exit(2)


def run(main: Callable[[], None]) -> None:
    """Call a script's `main()`. What goes wrong outside of this code becomes one line on stderr."""
    warnings.simplefilter("ignore")     # libraries advise their programmers; stderr is for errors
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
