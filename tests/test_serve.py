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

import serve
from chat import Conversation
from conftest import ADAPTER, GOLDEN, LLAMA, VIT
from decode import Decoder
from model import LaVIN

PICTURE = next((GOLDEN / "images").glob("*.png"))
HOW = {"max_new_tokens": 6}


@pytest.fixture
def server():
    lavin = LaVIN.load(LLAMA, VIT, ADAPTER)
    with serve.Server(("127.0.0.1", 0), serve.Desk(lavin, HOW, False), "tiny") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        server.lavin = lavin
        yield server
        server.shutdown()


def post(server, body, kind="application/json", path="/ask"):
    """-> (status, the events)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), {"Content-Type": kind})
    response = connection.getresponse()
    return response.status, [json.loads(line) for line in response.read().splitlines()]


def text(events):
    return "".join(event.get("text", "") for event in events)


def encoded(picture):
    return base64.b64encode(picture).decode()


def said(server, image=None, questions=("Name a metal.",)):
    """What a conversation in the terminal says to the last of the questions."""
    conversation = Conversation(server.lavin, image)
    return ["".join(conversation.say(question, **HOW)) for question in questions][-1]


def test_the_page_and_what_it_says_about_the_model(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert response.status == 200 and b"<title>LaVIN</title>" in response.read()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", "/about")
    about = json.loads(connection.getresponse().read())
    assert about["model"] == "tiny" and about["context"] == 128 and about["route"] == server.lavin.route().tolist()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", "/../serve.py")
    assert connection.getresponse().status == 404


@pytest.mark.parametrize("image", [None, PICTURE])
def test_a_question_streams_its_answer(server, image):
    status, events = post(server, {"question": "Name a metal.", "image": image and encoded(image.read_bytes())})
    assert status == 200 and events[-1] == {"end": True} and len(events) > 3
    assert text(events) == said(server, image)


def test_a_follow_up_computes_no_more_than_itself(server, monkeypatch):
    counts, extend, read = [], Decoder.extend, Decoder.read
    monkeypatch.setattr(Decoder, "extend", lambda d, ids: counts.append(len(ids)) or extend(d, ids))
    monkeypatch.setattr(Decoder, "read", lambda d, batch: counts.append(len(batch.tokens)) or read(d, batch))
    answer = "Iron."
    post(server, {"question": "Why?", "turns": [["Name a metal.", answer]]})
    post(server, {"question": "Why not?", "turns": [["Name a metal.", answer]]})
    assert counts[1] < counts[0] / 2


def test_two_conversations_take_turns_and_do_not_mix(server):
    metal, why = said(server), said(server, PICTURE, ("Why?",))
    for _ in range(2):
        assert text(post(server, {"question": "Name a metal."})[1]) == metal
        assert text(post(server, {"question": "Why?", "image": encoded(PICTURE.read_bytes())})[1]) == why


def test_who_comes_later_waits_and_is_told_so(server, monkeypatch):
    go_on, step = threading.Event(), Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda d, ids: go_on.wait(20) and step(d, ids))
    answers = [None] * 3

    def ask(i):
        answers[i] = post(server, {"question": "Name a metal."})[1]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for i, thread in enumerate(threads):
        thread.start()
        while len(server.desk.queue.waiting) <= i:
            time.sleep(0.01)
    time.sleep(0.1)
    go_on.set()
    for thread in threads:
        thread.join()
    assert [[e["waiting"] for e in events if "waiting" in e][:1] for events in answers] == [[], [1], [2]]
    assert len({text(events) for events in answers}) == 1 and not server.desk.queue.waiting


def test_a_full_queue_is_said(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 0)
    assert "waiting already" in post(server, {"question": "Name a metal."})[1][-1]["error"]


def bomb():
    """A small file of a picture of 64 million pixels."""
    file = io.BytesIO()
    Image.new("1", (8_000, 8_000)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("body, why", [
    (b"{", "form"), (b"\xff\xfe", "form"), (b"[" * 100_000, "form"), ([1], "form"), ({"question": 1}, "form"), ({"question": " "}, "no question"),
    ({"question": "x", "turns": [["a"]]}, "form"), ({"question": "x", "turns": {"ab": "c"}}, "form"),
    ({"question": "x", "turns": ["ab"]}, "form"), ({"question": "x", "turns": [["a", 1]]}, "form"), ({"question": "x", "turns": 7}, "form"), ({"question": "\ud800"}, "form"),
    ({"question": "x", "image": encoded(b"no picture")}, "not a picture"), ({"question": "x", "image": "äöü"}, "not a picture"),
    ({"question": "x", "image": 5}, "not a picture"), ({"question": "x", "image": encoded(PICTURE.read_bytes()[:60])}, "not a picture"),
    ({"question": "x", "image": encoded(bomb())}, "million pixels"), ({"question": "x" * 30_000}, "longer than 20,000"),
    (b" " * 20_000_001, "larger than 20 MB")])
def test_a_bad_request_is_refused_in_a_line_and_harms_nobody(server, body, why):
    status, events = post(server, body)
    assert status in (400, 413) and why in events[0]["error"]
    assert text(post(server, {"question": "Name a metal."})[1]) == said(server)


def test_a_question_too_long_for_the_context(server):
    assert "a context of 128 has room for 126" in post(server, {"question": "why " * 300})[1][-1]["error"]


@pytest.mark.parametrize("length", ["²", "9" * 5000, "-1", ""])
def test_a_length_that_is_none(server, length):
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(f"POST /ask HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode())
        assert b" 400 " in connection.recv(100)


def test_another_site_cannot_post(server):
    assert post(server, {"question": "x"}, kind="text/plain")[0] == 400 and post(server, {"question": "x"}, path="/")[0] == 400


def test_a_closed_connection_stops_its_answer_and_nobody_elses(server, monkeypatch):
    steps, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda d, ids: steps.append(1) or time.sleep(0.02) or step(d, ids))
    monkeypatch.setitem(server.desk.how, "max_new_tokens", 90)
    body = json.dumps({"question": "Name a metal."}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(b"POST /ask HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        connection.recv(1)
    while server.desk.queue.waiting:
        time.sleep(0.01)
    assert len(steps) < 60
    monkeypatch.setitem(server.desk.how, "max_new_tokens", 6)
    assert text(post(server, {"question": "Name a metal."})[1]) == said(server)


def test_half_a_request_keeps_nobody_waiting(server):
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(b"POST /ask HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
        assert text(post(server, {"question": "Name a metal."})[1]) == said(server)


def test_a_taken_port(call):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, stderr = call(serve, "--port", taken.getsockname()[1], "--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)
    assert code == 2 and "cannot listen there" in stderr
