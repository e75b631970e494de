"""A conversation: turns, perhaps about a picture, over one cache that lasts from turn to turn.

    python generate.py --chat [--image x.png]
    python serve.py                                 the same as a page

The turns are the reference's, "Instruction: …\\nResponse: …", and EOS behind every answer, as --multi-turn trains them.
"""

import itertools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import data
from decode import Decoder, pick
from files import LavinError, write_atomically
from instructions import instruction_prompt

HELP = "/image FILE shows a picture and starts over, as /reset does; /save FILE writes the conversation, /quit ends it; Ctrl-C stops an answer"


@dataclass
class Turn:
    question: str
    prompt: list[int]
    answer: list[int] = field(default_factory=list)


class Conversation:
    def __init__(self, lavin, image=None, compiled=False):
        self.lavin, self.compiled, self.decoders = lavin, compiled, {}
        self.show(image)

    def show(self, image):
        """Begin anew: a picture (a path, a PIL picture, or None) stands at the head of the sequence."""
        encoded = data.decoded(self.lavin.encode(data.Sample("", image=image), prompt_only=True), self.lavin.resolution)
        modality = int(image is not None)
        if modality not in self.decoders:
            self.decoders[modality] = Decoder(self.lavin.fold(modality), 1, self.lavin.max_seq_len - 1, self.compiled)
        self.head, self.decoder, self.turns, self.cached = encoded, self.decoders[modality], [], []

    def text(self, turn):
        return self.lavin.tokenizer.decode(turn.answer)

    def recall(self, turns):
        """Go on from these turns, [(question, answer)]."""
        self.turns, encode = [], self.lavin.tokenizer.encode
        for question, answer in turns:
            prompt = encode(instruction_prompt(question))
            self.turns.append(Turn(question, prompt, encode(instruction_prompt(question) + answer)[len(prompt):]))

    def open_turn(self, question, room):
        """Append a turn, drop as many from the front as leave `room` for its answer -> their number."""
        alone = self.lavin.encode(data.Sample(instruction_prompt(question), image=self.head.image), prompt_only=True).tokens
        turn, dropped = Turn(question, alone[len(self.head.tokens):].tolist()), 0
        free = self.lavin.max_seq_len - 1 - len(alone)
        while self.turns and sum(len(t.prompt) + len(t.answer) + 1 for t in self.turns) + room > free:
            del self.turns[0]
            dropped += 1
        self.turns.append(turn)
        return dropped

    def read(self):
        """The logits behind the whole sequence, of which only what the cache does not hold yet is computed."""
        eos = self.lavin.tokenizer.eos_id()
        past = itertools.chain(*([*turn.prompt, *turn.answer, eos] for turn in self.turns[:-1]))
        ids = [*self.head.tokens.tolist(), *past, *self.turns[-1].prompt]
        known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.cached, ids[:-1])))
        self.cached, self.decoder.lengths[:] = ids[:known], [known] if known else []
        if known:
            logits = self.decoder.extend(ids[known:])
        else:
            whole = replace(self.head, tokens=np.array(ids), labels=np.zeros(len(ids), dtype=np.int32))
            logits = self.decoder.read(data.collate([whole], self.lavin.resolution))
        self.cached = ids
        return logits

    def say(self, question, max_new_tokens=256, temperature=0.0, top_p=1.0):
        """Ask. Yields the answer's text, piece by piece; what has come when it is stopped remains in the turn.

        Turns that the context has no room for are forgotten from the front, `self.dropped` of them.
        LavinError if the question alone does not fit.
        """
        context, eos = self.lavin.max_seq_len - 1, self.lavin.tokenizer.eos_id()
        self.dropped = self.open_turn(question, min(max_new_tokens, context // 4))
        turn, shown, logits = self.turns[-1], 0, self.read()
        while (token := int(pick(logits, temperature, top_p))) != eos:
            turn.answer.append(token)
            text = self.text(turn)
            if not text.endswith("\ufffd"):                 # half of a character of several bytes: wait for the rest
                yield text[shown:]
                shown = len(text)
            if len(turn.answer) == max_new_tokens or len(self.cached) + 1 >= context:
                break
            logits = self.decoder.step([token])
            self.cached.append(token)
        yield self.text(turn)[shown:]


def save(conversation, image, path):
    """The conversation as text, in the form in which the model reads it."""
    parts = [f"Image: {image or 'N/A'}\n"]
    parts += [f"Instruction: {turn.question}\nResponse: {conversation.text(turn)}\n" for turn in conversation.turns]
    write_atomically(path, lambda temporary: Path(temporary).write_text("\n".join(parts), encoding="utf-8"))
    print(f"written: {path}")


def answer(conversation, question, how):
    """Print the answer as it comes; Ctrl-C stops it."""
    try:
        for i, piece in enumerate(conversation.say(question, **how)):
            if i == 0 and conversation.dropped:
                print(f"(the first {conversation.dropped} turn(s) no longer fit the context of {conversation.lavin.max_seq_len} "
                      "tokens and are forgotten)")
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" (stopped)")


def talk(lavin, image, how, compiled=False):
    """The loop of --chat, until /quit or the end of the input. how: say's."""
    conversation = Conversation(lavin, image, compiled)
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
            command, _, path = line.partition(" ")
            path = os.path.expanduser(path.strip())
            if command == "/quit":
                return
            if command == "/image" and path:
                conversation.show(path)
                image = path
            elif command == "/reset":
                conversation.show(image)
            elif command == "/save" and path:
                save(conversation, image, path)
            elif line.startswith("/"):
                print(HELP)
            elif line:
                answer(conversation, line, how)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n(/quit ends it)")
        except LavinError as error:
            print(f"error: {error}")
