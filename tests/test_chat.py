"""Conversations: what the cache keeps, what the context forgets, what a person types."""

import builtins

import numpy as np
import pytest

import chat
import data
import generate
from chat import Conversation
from conftest import ADAPTER, GOLDEN, LLAMA, VIT, difference
from decode import Decoder
from files import LavinError

PICTURE = next((GOLDEN / "images").glob("*.png"))
FLAGS = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)


@pytest.fixture
def computed(monkeypatch):
    """How many tokens went through the model, call by call."""
    counts, read, extend, step = [], Decoder.read, Decoder.extend, Decoder.step
    monkeypatch.setattr(Decoder, "read", lambda d, batch: counts.append(len(batch.tokens)) or read(d, batch))
    monkeypatch.setattr(Decoder, "extend", lambda d, ids: counts.append(len(ids)) or extend(d, ids))
    monkeypatch.setattr(Decoder, "step", lambda d, ids: counts.append(len(ids)) or step(d, ids))
    return counts


def say(conversation, question, n=5):
    return "".join(conversation.say(question, n))


@pytest.mark.parametrize("image", [None, PICTURE])
def test_a_follow_up_never_recomputes_the_past(lavin, computed, image):
    """Each token goes through the model once, and what follows is what the whole sequence at once gives."""
    conversation = Conversation(lavin, image)
    for question in ("Name a metal.", "Why?", "And then?"):
        say(conversation, question)
    sequence = list(conversation.cached)
    assert sum(computed) == len(sequence)
    whole = data.replace(conversation.head, tokens=np.array(sequence), labels=np.zeros(len(sequence)))
    logits = lavin.logits(data.collate([whole], lavin.resolution)).detach()[0]
    last = len(sequence) - len(conversation.turns[-1].answer)               # what stands before the answer's first token
    assert logits[last].argmax() == conversation.turns[-1].answer[0]
    assert difference(conversation.read(), logits[last]) < 1e-4             # computes the last prompt token again, no more
    assert computed[-1] == 1


def test_a_turn_says_what_generate_says(lavin):
    assert say(Conversation(lavin), "Name a metal.", 9) == lavin.generate([data.Sample("Instruction: Name a metal.\nResponse:")], 9)[0]


def test_whole_turns_are_forgotten_from_the_front(lavin):
    conversation, dropped = Conversation(lavin), 0
    for number in range(8):
        say(conversation, f"Question number {number}?", 10)
        dropped += conversation.dropped
        assert len(conversation.cached) < lavin.max_seq_len
    assert dropped > 0 and len(conversation.turns) + dropped == 8
    assert [turn.question for turn in conversation.turns] == [f"Question number {n}?" for n in range(dropped, 8)]
    again = Conversation(lavin)                                             # as if the forgotten ones had never been
    again.turns = conversation.turns[:]
    assert difference(again.read(), conversation.read()) < 1e-4


def test_a_question_that_never_fits(lavin):
    conversation = Conversation(lavin)
    say(conversation, "Name a metal.")
    with pytest.raises(LavinError, match="a context of 128 has room for 126"):
        say(conversation, "why " * 200)
    with pytest.raises(LavinError, match="not Unicode"):
        say(conversation, "caf\udce9")
    assert len(conversation.turns) == 1 and say(conversation, "Why?")


def test_a_stopped_answer_stays_as_far_as_it_came(lavin, computed):
    conversation = Conversation(lavin)
    answer = conversation.say("Name a metal.", 50)
    pieces = next(answer) + next(answer)
    answer.close()
    assert conversation.text(conversation.turns[0]).startswith(pieces)
    say(conversation, "Why?")
    assert sum(computed) == len(conversation.cached)


def test_recalled_turns_are_the_same_conversation(lavin):
    conversation, other = Conversation(lavin), Conversation(lavin)
    said = [(question, say(conversation, question)) for question in ("Name a metal.", "Why?")]
    other.recall([("Name a metal.", "Iron."), ("Why?", "So.")])
    assert [t.question for t in other.turns] == [q for q, _ in said]
    assert other.turns[0].answer == lavin.tokenizer.encode("Instruction: Name a metal.\nResponse:Iron.")[len(other.turns[0].prompt):]


@pytest.fixture
def terminal(monkeypatch, call):
    """terminal(*lines) -> what --chat prints; a line may be an exception, raised instead of typed."""
    def terminal(*lines, flags=()):
        typed = iter(lines)

        def type_line(prompt):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", type_line)
        code, stdout, stderr = call(generate, "--chat", *FLAGS, "--max-new-tokens", 5, *flags)
        assert (code, stderr) == (0, "")
        return stdout
    return terminal


def test_commands(terminal, tmp_path, lavin):
    answer = say(Conversation(lavin), "Name a metal.")
    stdout = terminal("Name a metal.", KeyboardInterrupt(), "/foo", f"/save {tmp_path / 'a.txt'}", "/reset", "Name a metal.",
                      f"/image {PICTURE}", "What is it?", f"/save {tmp_path / 'b.txt'}", "/image nowhere.png", f"/save {tmp_path}",
                      "/image ~nobody/x.png", f"/save {tmp_path / 'b.txt' / 'c'}", "/save \0x", "/save", "Are ~5 red?",
                      "why " * 200, "", "/quit", "never read")
    assert stdout.count(answer) == 2 and stdout.count(chat.HELP) == 3 and "(/quit ends it)" in stdout
    assert "error: nowhere.png: no such picture" in stdout and stdout.count("cannot be written") == 3 and "a context of 128 has room" in stdout
    assert (tmp_path / "a.txt").read_text() == f"Image: N/A\n\nInstruction: Name a metal.\nResponse: {answer}\n"
    assert (tmp_path / "b.txt").read_text().startswith(f"Image: {PICTURE}\n\nInstruction: What is it?\nResponse: ")


def test_forgetting_is_said_and_the_end_of_input_ends_it(terminal):
    assert "no longer fit the context of 128 tokens and are forgotten" in terminal(*["Name a metal."] * 9)


def test_ctrl_c_stops_an_answer_and_not_the_program(terminal, monkeypatch):
    step, calls = Decoder.step, []

    def interrupted(decoder, ids):
        calls.append(ids)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(decoder, ids)

    monkeypatch.setattr(Decoder, "step", interrupted)
    stdout = terminal("Name a metal.", "Why?")
    assert "(stopped)" in stdout and len(stdout.splitlines()[-2]) > 0 and len(calls) > 4


def test_chat_flags(call):
    assert call(generate, "--chat", "--prompt", "x", *FLAGS)[0] == 2
    code, _, stderr = call(generate, "--chat", "--image", "nowhere.png", *FLAGS)
    assert code == 2 and "no such picture" in stderr
