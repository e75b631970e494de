"""Conversations: what the cache keeps, what does not fit the context, what a person types."""

import builtins
import io
import os
import sys

import pytest
from PIL import Image

import data
import generate
from conftest import ADAPTER, GOLDEN, LLAMA, VIT, difference
from extras import chat
from extras.chat import Conversation, common_prefix_length
from extras.instructions import instruction_prompt
from fast.engine import Engine
from files import LavinError

PICTURE = GOLDEN / "images" / "0.png"
MODEL = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)


@pytest.fixture
def computed(monkeypatch):
    """The number of tokens that went through the model in each call."""
    counts = []
    prefill = Engine.prefill
    extend = Engine.extend
    step = Engine.step

    def counted_prefill(engine, batch):
        counts.append(len(batch.tokens))
        return prefill(engine, batch)

    def counted_extend(engine, ids):
        counts.append(len(ids))
        return extend(engine, ids)

    def counted_step(engine, ids):
        counts.append(len(ids))
        return step(engine, ids)

    monkeypatch.setattr(Engine, "prefill", counted_prefill)
    monkeypatch.setattr(Engine, "extend", counted_extend)
    monkeypatch.setattr(Engine, "step", counted_step)
    return counts


def say(conversation, question, n=5):
    return "".join(conversation.say(question, n))


@pytest.mark.parametrize("a, b, n", [
    ([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2, 3], [1, 4, 3], 1)])
def test_common_prefix_length(a, b, n):
    assert common_prefix_length(a, b) == common_prefix_length(b, a) == n


@pytest.mark.parametrize("image", [None, PICTURE], ids=["words", "picture"])
def test_a_follow_up_never_recomputes_the_past(lavin, computed, image):
    """Each token goes through the model once. The logits equal those of the whole sequence."""
    conversation = Conversation(lavin, image)
    for question in ("Name a metal.", "Why?", "And then?"):
        say(conversation, question)
    sequence = list(conversation.cached)
    assert sum(computed) == len(sequence)
    start = conversation.start
    whole = data.append_tokens(start, sequence[len(start.tokens):])
    logits = lavin.logits(data.collate([whole], lavin.resolution)).detach()[0]
    answer = conversation.turns[-1].answer
    last = len(sequence) - len(answer)                  # before the answer's first token
    assert logits[last].argmax() == answer[0]
    assert difference(conversation.next_logits(), logits[last]) < 1e-4
    assert computed[-1] == 1                            # only the prompt's last token


def test_a_turn_says_what_generate_says(lavin):
    sample = data.Sample("Instruction: Name a metal. \nResponse:")
    assert say(Conversation(lavin), "Name a metal.", 9) == lavin.generate([sample], 9)[0]


def test_whole_turns_are_dropped_from_the_front(lavin):
    conversation = Conversation(lavin)
    dropped = 0
    for number in range(8):
        say(conversation, f"Question number {number}?", 10)
        dropped += conversation.dropped
        assert len(conversation.cached) < lavin.max_seq_len
    assert dropped > 0 and len(conversation.turns) + dropped == 8
    questions = [turn.question for turn in conversation.turns]
    assert questions == [f"Question number {n}?" for n in range(dropped, 8)]
    again = Conversation(lavin)                         # without the dropped turns
    again.turns = list(conversation.turns)
    assert difference(again.next_logits(), conversation.next_logits()) < 1e-4


def test_a_question_that_never_fits(lavin):
    conversation = Conversation(lavin)
    say(conversation, "Name a metal.")
    with pytest.raises(LavinError, match="a context of 128 has room for 126"):
        say(conversation, "why " * 200)
    with pytest.raises(LavinError, match="not Unicode"):
        say(conversation, "caf\udce9")
    assert len(conversation.turns) == 1
    assert say(conversation, "Why?")


def test_a_stopped_answer_keeps_what_has_come(lavin, computed):
    conversation = Conversation(lavin)
    answer = conversation.say("Name a metal.", 50)
    pieces = next(answer) + next(answer)
    answer.close()
    assert conversation.text(conversation.turns[0]).startswith(pieces)
    say(conversation, "Why?")
    assert sum(computed) == len(conversation.cached)


def test_recalled_turns_are_the_same_conversation(lavin):
    conversation = Conversation(lavin)
    conversation.recall([("Name a metal.", "Iron."), ("Why?", "So.")])
    first, second = conversation.turns
    assert (first.question, second.question) == ("Name a metal.", "Why?")
    together = lavin.tokenizer.encode(instruction_prompt("Name a metal.") + "Iron.")
    assert first.prompt + first.answer == together
    other = Conversation(lavin)
    say(other, "Name a metal.")
    assert other.turns[0].prompt == first.prompt


# In the terminal


@pytest.fixture
def terminal(monkeypatch, call):
    """terminal(line, …) -> what --chat prints. An exception among the lines is raised instead."""
    def terminal(*lines):
        typed = iter(lines)

        def type_line(prompt):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", type_line)
        code, stdout, stderr = call(generate, "--chat", *MODEL, "--max-new-tokens", 5)
        assert (code, stderr) == (0, "")
        return stdout
    return terminal


def test_commands(terminal, tmp_path, lavin):
    answer = say(Conversation(lavin), "Name a metal.")
    first = tmp_path / "a.txt"
    second = tmp_path / "b.txt"
    stdout = terminal(
        "Name a metal.", KeyboardInterrupt(), "/foo", f"/save {first}",
        "/reset", "Name a metal.",
        f"/image {PICTURE}", "What is it?", f"/save {second}",
        "/save", "", "/quit", "never read")
    assert stdout.count(answer) == 2
    assert stdout.count(chat.HELP) == 3                 # at the start, for /foo, for /save alone
    assert "(type /quit to end)" in stdout
    turn = f"Instruction: Name a metal.\nResponse: {answer}\n"
    assert first.read_text() == f"Image: N/A\n\n{turn}"
    start = f"Image: {PICTURE}\n\nInstruction: What is it?\nResponse: "
    assert second.read_text().startswith(start)


def test_what_cannot_be_done_is_one_line_and_the_chat_goes_on(terminal, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    file = tmp_path / "file"
    file.write_text("in the way")
    table = {
        "/image nowhere.png": "nowhere.png: no such picture",
        "/image ~nobody/x.png": "no such picture",
        "/image ~\0x": "no such picture",
        "/image " + "x" * 100_000: "no such picture",
        "/image /dev/zero": "a pipe or a device, where a file is needed",
        f"/image {pipe}": "a pipe or a device, where a file is needed",
        f"/image {tmp_path}": "a folder, where a file is needed",
        f"/save {tmp_path}": "cannot be written",
        f"/save {file / 'c'}": "cannot be written",
        f"/save {pipe}": "cannot be written",
        "/save \0x": "cannot be written",
        "/save ~\0x": "cannot be written",
        "why " * 200: "a context of 128 has room",
    }
    stdout = terminal(*table, "Are ~5 red?")
    errors = [line for line in stdout.splitlines() if line.startswith("error: ")]
    for error, (line, message) in zip(errors, table.items(), strict=True):
        assert message in error, line
    assert not stdout.rstrip().splitlines()[-1].startswith("error: ")       # it still answers


def test_dropped_turns_are_reported_and_the_end_of_input_ends_it(terminal):
    notice = "no longer fit the context of 128 tokens and were dropped"
    assert notice in terminal(*["Name a metal."] * 9)


def test_ctrl_c_stops_an_answer_and_not_the_program(terminal, monkeypatch):
    step = Engine.step
    calls = []

    def interrupted(engine, ids):
        calls.append(ids)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(engine, ids)

    monkeypatch.setattr(Engine, "step", interrupted)
    stdout = terminal("Name a metal.", "Why?")
    assert "(stopped)" in stdout
    assert len(stdout.splitlines()[-2]) > 0 and len(calls) > 4          # "Why?" was answered


def test_chat_flags(fails):
    fails(generate, "--chat", "--prompt", "x", *MODEL, says=["give one of --prompt, --chat"])
    fails(generate, "--chat", "--image", "nowhere.png", *MODEL,
          says=["nowhere.png: no such picture"])


def test_bytes_that_are_no_text(tmp_path, monkeypatch, call):
    """They are refused as a question, but they may be the name of a picture."""
    folder = os.fsencode(tmp_path)
    Image.new("RGB", (8, 8)).save(os.path.join(tmp_path, "caf\udce9.png"))
    lines = [b"caf\xe9", b"/image %s/caf\xe9.png" % folder, b"/save %s/x.txt" % folder, b"\xff"]
    stdin = io.TextIOWrapper(io.BytesIO(b"\n".join(lines) + b"\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    code, stdout, stderr = call(generate, "--chat", *MODEL)
    assert (code, stderr) == (0, "")
    assert stdout.count("error: the prompt: not Unicode text") == 2
    assert (tmp_path / "x.txt").read_text().endswith("caf\\udce9.png\n")


def test_without_input_or_output_it_ends(monkeypatch, call):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, stderr = call(generate, "--chat", *MODEL)
    assert code == 2 and "--chat: there is no standard input" in stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a metal.\n" * 20))
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    code, _, stderr = call(generate, "--chat", *MODEL)
    assert (code, stderr) == (2, "error: standard output cannot be written\n")
