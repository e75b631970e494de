"""The page's server: answers, a queue, and requests that harm nobody else."""

import base64
import http.client
import io
import json
import socket
import threading
import time

import pytest
from PIL import Image

import checkpoints
import generate
from conftest import ADAPTER, GOLDEN, LLAMA, VIT
from extras import serve
from extras.chat import Conversation
from fast.engine import Engine

PICTURE = next((GOLDEN / "images").glob("*.png"))
MODEL = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)
HOW = {"max_new_tokens": 6}
METAL = {"question": "Name a metal."}


@pytest.fixture
def server():
    """The golden model, served by a thread."""
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER)
    with serve.listen("127.0.0.1", 0, "tiny") as server:
        server.desk = serve.Desk(lavin, dict(HOW), compiled=False)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def get(server, path):
    """-> (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


def post(server, body, kind="application/json", path="/ask"):
    """-> (status, the events)."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("POST", path, body, {"Content-Type": kind})
    response = connection.getresponse()
    return response.status, [json.loads(line) for line in response.read().splitlines()]


def connect(server):
    return socket.create_connection(("127.0.0.1", server.server_port))


def header(length):
    """The start of a request, for what http.client would not send."""
    return (f"POST /ask HTTP/1.0\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n").encode()


def text(events):
    return "".join(event.get("text", "") for event in events)


def answer(server, body):
    """The text that the server answers."""
    _, events = post(server, body)
    return text(events)


def to_base64(picture):
    return base64.b64encode(picture).decode()


def said(server, question="Name a metal.", image=None):
    """What a conversation in the terminal says."""
    conversation = Conversation(server.desk.lavin, image)
    return "".join(conversation.say(question, **HOW))


# Answers


def test_the_page_and_what_it_says_about_the_model(server):
    status, page = get(server, "/")
    assert status == 200 and b"<title>LaVIN</title>" in page
    about = json.loads(get(server, "/about")[1])
    assert about["model"] == "tiny" and about["context"] == 128
    assert about["route"] == server.desk.lavin.route().tolist()
    assert get(server, "/../serve.py")[0] == 404


@pytest.mark.parametrize("image", [None, PICTURE], ids=["words", "picture"])
def test_a_question_streams_its_answer(server, image):
    body = dict(METAL)
    if image:
        body["image"] = to_base64(image.read_bytes())
    status, events = post(server, body)
    assert status == 200 and events[-1] == {"end": True} and len(events) > 3
    assert text(events) == said(server, image=image)


def test_a_follow_up_computes_no_more_than_itself(server, monkeypatch):
    counts = []
    extend = Engine.extend
    prefill = Engine.prefill

    def counted_extend(engine, ids):
        counts.append(len(ids))
        return extend(engine, ids)

    def counted_prefill(engine, batch):
        counts.append(len(batch.tokens))
        return prefill(engine, batch)

    monkeypatch.setattr(Engine, "extend", counted_extend)
    monkeypatch.setattr(Engine, "prefill", counted_prefill)
    turns = [["Name a metal.", "Iron."]]
    post(server, {"question": "Why?", "turns": turns})
    post(server, {"question": "Why not?", "turns": turns})
    assert counts[1] < counts[0] / 2


def test_turns_that_do_not_fit_are_told(server):
    turns = [["Name a metal.", "Iron. " * 10]] * 4
    _, events = post(server, {"question": "Why?", "turns": turns})
    assert events[0]["forgotten"] > 0 and events[-1] == {"end": True}


def test_two_conversations_take_turns_and_do_not_mix(server):
    metal = said(server)
    why = said(server, "Why?", PICTURE)
    about_picture = {"question": "Why?", "image": to_base64(PICTURE.read_bytes())}
    for _ in range(2):
        assert answer(server, METAL) == metal
        assert answer(server, about_picture) == why


# The queue


def test_who_comes_later_waits_and_is_told_so(server, held_steps):
    answers = [None] * 3

    def ask(i):
        _, answers[i] = post(server, METAL)

    threads = []
    for i in range(3):
        thread = threading.Thread(target=ask, args=(i,))
        thread.start()
        threads.append(thread)
        while len(server.desk.queue.waiting) <= i:
            time.sleep(0.01)
    time.sleep(0.1)
    held_steps.set()
    for thread in threads:
        thread.join()
    first_notices = []
    for events in answers:
        notices = [event["waiting"] for event in events if "waiting" in event]
        first_notices.append(notices[:1])
    assert first_notices == [[], [1], [2]]
    assert len({text(events) for events in answers}) == 1
    assert not server.desk.queue.waiting


def test_a_full_queue_is_told(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 0)
    _, events = post(server, METAL)
    assert "waiting already" in events[-1]["error"]


def test_a_closed_connection_stops_its_answer_and_nobody_elses(server, monkeypatch):
    steps = []
    step = Engine.step

    def slow_step(engine, ids):
        steps.append(1)
        time.sleep(0.02)
        return step(engine, ids)

    monkeypatch.setattr(Engine, "step", slow_step)
    server.desk.how["max_new_tokens"] = 90
    body = json.dumps(METAL).encode()
    with connect(server) as connection:
        connection.sendall(header(len(body)) + body)
        connection.recv(1)
    while server.desk.queue.waiting:
        time.sleep(0.01)
    assert len(steps) < 60
    server.desk.how["max_new_tokens"] = 6
    assert answer(server, METAL) == said(server)


def test_one_who_leaves_while_waiting_makes_room(server, held_steps):
    asking = threading.Thread(target=post, args=(server, METAL))
    asking.start()
    while not server.desk.queue.waiting:
        time.sleep(0.01)
    body = json.dumps(METAL).encode()
    with connect(server) as connection:
        connection.sendall(header(len(body)) + body)
        while len(server.desk.queue.waiting) < 2:
            time.sleep(0.01)
    while len(server.desk.queue.waiting) == 2:          # the next notice finds nobody
        time.sleep(0.01)
    held_steps.set()
    asking.join()
    assert not server.desk.queue.waiting


# Bad requests


def bomb():
    """A small file of a picture of 64 million pixels."""
    file = io.BytesIO()
    Image.new("1", (8_000, 8_000)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("body, reason", [
    (b"{", "form"),
    (b"\xff\xfe", "form"),
    (b"[" * 100_000, "form"),
    ([1], "form"),
    ({"question": 1}, "form"),
    ({"question": "\ud800"}, "form"),
    ({"question": " "}, "no question"),
    ({"question": "x", "turns": 7}, "form"),
    ({"question": "x", "turns": {"ab": "c"}}, "form"),
    ({"question": "x", "turns": ["ab"]}, "form"),
    ({"question": "x", "turns": [["a"]]}, "form"),
    ({"question": "x", "turns": [["a", 1]]}, "form"),
    ({"question": "x", "image": 5}, "not a picture"),
    ({"question": "x", "image": "äöü"}, "not a picture"),
    ({"question": "x", "image": to_base64(b"no picture")}, "not a picture"),
    ({"question": "x", "image": to_base64(PICTURE.read_bytes()[:60])}, "not a picture"),
    ({"question": "x", "image": to_base64(bomb())}, "million pixels"),
    ({"question": "x" * 30_000}, "longer than 20,000"),
    (b" " * 20_000_001, "larger than 20 MB"),
])
def test_a_bad_request_is_refused_in_a_line_and_harms_nobody(server, body, reason):
    status, events = post(server, body)
    assert status in (400, 413) and reason in events[0]["error"]
    assert answer(server, METAL) == said(server)


def test_a_question_too_long_for_the_context(server):
    _, events = post(server, {"question": "why " * 300})
    assert "a context of 128 has room for 126" in events[-1]["error"]


@pytest.mark.parametrize("length", ["²", "9" * 5000, "-1", ""])
def test_a_length_that_is_none(server, length):
    with connect(server) as connection:
        connection.sendall(header(length))
        assert b" 400 " in connection.recv(100)


def test_another_site_cannot_post(server):
    assert post(server, METAL, kind="text/plain")[0] == 400
    assert post(server, METAL, path="/")[0] == 400


def test_half_a_request_keeps_nobody_waiting(server):
    with connect(server) as connection:
        connection.sendall(header(500) + b"{")
        assert answer(server, METAL) == said(server)


# From the command line


def test_a_taken_port_is_told_before_the_model_is_loaded(call, monkeypatch):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoints, "load", load)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, stderr = call(generate, "--serve", port, *MODEL)
    assert code == 2 and len(stderr.splitlines()) == 1
    assert f"--serve {port} --host 127.0.0.1: cannot listen there" in stderr


def test_a_host_that_is_none(call):
    code, _, stderr = call(generate, "--serve", 0, "--host", "no such host", *MODEL)
    assert code == 2 and "cannot listen there" in stderr


def test_serve_prints_its_address_and_ends_with_ctrl_c(call, monkeypatch):
    names = []

    def serve_forever(server):
        names.append(server.model_name)
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.Server, "serve_forever", serve_forever)
    code, stdout, _ = call(generate, "--serve", 0, *MODEL)
    assert code == 130
    assert "http://127.0.0.1:" in stdout and "Ctrl-C ends it" in stdout
    assert names == ["tiny · checkpoint-19.pth"]
