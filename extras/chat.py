"""A conversation, with or without a picture. It keeps the KV cache from one turn to the next.

    python generate.py --chat [--image x.png]
    python generate.py --serve                  the same on a web page

Each turn is an instruction in the authors' form, its response and EOS, as in training with
--multi-turn.
"""

import io
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

import data
from data import Sample
from extras.instructions import instruction_prompt
from fast.engine import Engine
from fast.fold import fold
from files import LavinError, write_atomically
from model import LaVIN, pick

HELP = """\
/image FILE   show a picture and start over
/reset        start over
/save FILE    write the conversation to a file
/quit         end
Ctrl-C        stop an answer"""


Picture = str | Path | Image.Image | torch.Tensor       # a tensor holds pixels (3, R, R)


@dataclass
class Turn:
    question: str
    prompt: list[int]                                       # from "Instruction:" to "Response:"
    answer: list[int] = field(default_factory=list)         # tokens of the answer, without EOS

    def length(self):
        """The number of its tokens, including EOS."""
        return len(self.prompt) + len(self.answer) + 1


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


class Conversation:
    """A LaVIN, the turns so far, and the state of its cache.

    start: the Encoded before the first turn: BOS, "Image: " and the picture's features, or "N/A".
    cached: the tokens whose keys and values are in the engine's cache.
    dropped: how many of the oldest turns were dropped to make room for the newest question.
    """

    def __init__(self, lavin: LaVIN, image: Picture | None = None, compiled: bool = False):
        self.lavin = lavin
        self.compiled = compiled
        self.engines = {}                                   # {modality: Engine}, made when needed
        self.dropped = 0
        self.show(image)

    def show(self, image: Picture | None) -> None:
        """Start over with this picture, or without one.

        Raises LavinError if the picture cannot be read. The conversation then does not change.
        """
        start = self.lavin.encode(Sample("", image=image), prompt_only=True)
        start = data.with_pixels(start, self.lavin.resolution)
        modality = 0 if image is None else 1
        if modality not in self.engines:
            folded = fold(self.lavin, modality)
            self.engines[modality] = Engine(folded, 1, self.lavin.context, self.compiled)
        self.engine = self.engines[modality]
        self.image = image
        self.start = start
        self.turns = []
        self.cached = []

    def text(self, turn: Turn) -> str:
        """The text of a turn's answer."""
        return data.decode(self.lavin.tokenizer, turn.answer)

    def prompt(self, question: str) -> str:
        return instruction_prompt(question, has_picture=self.start.image is not None)

    def recall(self, turns: Iterable[tuple[str, str]]) -> None:
        """Replace the turns of the conversation by these, [(question, answer)]."""
        tokenizer = self.lavin.tokenizer
        self.turns = []
        for question, answer in turns:
            prompt = self.prompt(question)
            prompt_ids = tokenizer.encode(prompt)
            # As in training, the answer's tokens come from prompt and answer as one string. The
            # prompt keeps the tokens with which it was asked, so that the cache still fits.
            both = tokenizer.encode(prompt + answer)
            self.turns.append(Turn(question, prompt_ids, both[len(prompt_ids):]))

    def open_turn(self, question, room):
        """Append a turn, and drop old ones until `room` tokens are left for its answer.

        -> the number of turns dropped. Raises LavinError if the question alone is too long.
        """
        sample = Sample(self.prompt(question), image=self.start.image)
        alone = self.lavin.encode(sample, prompt_only=True).tokens.tolist()
        free = self.lavin.context - len(alone) - room
        dropped = 0
        while self.turns and sum(turn.length() for turn in self.turns) > free:
            del self.turns[0]
            dropped += 1
        self.turns.append(Turn(question, alone[len(self.start.tokens):]))
        return dropped

    def sequence(self):
        """The tokens up to where the newest answer begins."""
        ids = self.start.tokens.tolist()
        for turn in self.turns[:-1]:
            ids += [*turn.prompt, *turn.answer, self.lavin.tokenizer.eos_id()]
        return ids + self.turns[-1].prompt

    def next_logits(self):
        """The logits (1, vocabulary) of the newest answer's first token.

        Only tokens that are not in the cache yet go through the model. The last token always does:
        its keys and values may be in the cache, but its logits are not.
        """
        ids = self.sequence()
        known = common_prefix_length(self.cached, ids[:-1])
        # Cut the cache back to the common prefix. The rest of it is overwritten.
        self.cached = ids[:known]
        if known:
            self.engine.lengths[:] = [known]
            logits = self.engine.extend(ids[known:])
        else:
            self.engine.lengths.clear()
            whole = data.append_tokens(self.start, ids[len(self.start.tokens):])
            logits = self.engine.prefill(data.collate([whole], self.lavin.resolution))
        self.cached = ids
        return logits

    def say(self, question: str, max_new_tokens: int = 256, temperature: float = 0.0,
            top_p: float = 1.0) -> Iterator[str]:
        """Ask a question. Yields the text of the answer piece by piece.

        If the context is too small, the oldest turns are dropped. self.dropped is their number. If
        the caller stops early, the turn keeps the answer generated so far. Raises LavinError if
        the question alone does not fit.
        """
        context = self.lavin.context
        ends = data.answer_ends(self.lavin.tokenizer)
        self.dropped = self.open_turn(question, room=min(max_new_tokens, context // 4))
        turn = self.turns[-1]
        shown = 0                                           # characters of the answer
        logits = self.next_logits()
        while True:
            token = int(pick(logits, temperature, top_p))
            if token in ends:
                break
            turn.answer.append(token)
            text = self.text(turn)
            # A character may take several tokens. Until it is complete, it decodes to U+FFFD.
            if not text.endswith("\ufffd"):
                yield text[shown:]
                shown = len(text)
            if len(turn.answer) == max_new_tokens or len(self.cached) + 1 >= context:
                break
            logits = self.engine.step([token])
            self.cached.append(token)
        yield self.text(turn)[shown:]


# In the terminal


def save(conversation: Conversation, path: str) -> None:
    """Write the conversation as text. Raises LavinError if the file cannot be written."""
    text = f"Image: {conversation.image or 'N/A'}\n"
    for turn in conversation.turns:
        answer = conversation.text(turn)
        text += f"\nInstruction: {turn.question}\nResponse: {answer}\n"

    def write(temporary):
        # The picture's file name might not be valid Unicode.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    write_atomically(path, write)
    print(f"written: {path}")


def print_answer(conversation, question, sampling):
    """Print the answer as it is generated. Ctrl-C stops it."""
    is_first = True
    try:
        for piece in conversation.say(question, **sampling):
            if is_first and conversation.dropped:
                print(f"(the first {conversation.dropped} turn(s) no longer fit the context of "
                      f"{conversation.lavin.max_seq_len} tokens and were dropped)")
            is_first = False
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" (stopped)")


def answer_line(conversation, line, sampling):
    """Carry out one line of input: a command or a question."""
    command, _, path = line.partition(" ")
    path = path.strip()
    if "\0" not in path:                                    # expanduser raises ValueError for NUL
        path = os.path.expanduser(path)
    if command == "/image" and path:
        conversation.show(path)
    elif command == "/reset":
        conversation.show(conversation.image)
    elif command == "/save" and path:
        save(conversation, path)
    elif line.startswith("/"):
        print(HELP)
    elif line:
        print_answer(conversation, line, sampling)


def talk(lavin: LaVIN, image: str | None, sampling: dict, compiled: bool = False) -> None:
    """The loop of --chat, until /quit or the end of the input.

    sampling: keyword arguments for Conversation.say. Raises LavinError if there is no standard
    input or if standard output cannot be written.
    """
    if sys.stdin is None:
        raise LavinError("--chat: there is no standard input to read questions from")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")     # file names might not be valid Unicode
    conversation = Conversation(lavin, image, compiled)
    print(HELP)
    while not getattr(sys.stdout, "is_broken", False):
        try:
            line = input("> ").strip()
            if line.split(" ")[0] == "/quit":
                return
            answer_line(conversation, line, sampling)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(type /quit to end)")
        except LavinError as error:
            print(f"error: {error}")
    raise LavinError("standard output cannot be written")   # the loop hid this error
