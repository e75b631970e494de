"""The server of the page: answers, the queue, and bad requests, which harm nobody else."""

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time

import pytest
import torch
from PIL import EpsImagePlugin, Image

import checkpoints
import generate
from conftest import ADAPTER, GOLDEN, LLAMA, VIT, wait_until
from extras import serve
from extras.chat import Conversation
from fast.engine import Engine
from tiny import shelf, world

PICTURE = GOLDEN / "images" / "0.png"
MODEL = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)
SMALL_WORLD = ("--llama", world.PATHS["llama"], "--vit", world.PATHS["vit"], "--adapter", "none")
HOW = {"max_new_tokens": 6}
METAL = {"question": "Name a metal."}


def has_ipv6():
    """Can a server listen at an address of IPv6 here? In some containers it cannot."""
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def server(capsys, lavin):
    """The golden model, served by a thread. The test fails if a thread of the server fails."""
    with serve.listen("127.0.0.1", 0, "tiny") as server:
        server.desk = serve.Desk(lavin, dict(HOW), compiled=False)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
    assert capsys.readouterr().err == ""


def get(server, path):
    """GET -> (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


def post(server, body, kind="application/json", path="/ask"):
    """POST -> (status, the events)."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("POST", path, body, {"Content-Type": kind})
    response = connection.getresponse()
    return response.status, [json.loads(line) for line in response.read().splitlines()]


def connect(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=30)


def receive_until(connection, content):
    """Receive until these bytes have come. The test fails if the server closes before."""
    received = b""
    while content not in received:
        piece = connection.recv(2**16)
        assert piece, received
        received += piece


def header(length):
    """The start of a raw request, for cases that http.client would not send."""
    return (f"POST /ask HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n").encode()


def exchange(server, request):
    """Send exactly these bytes -> (status, headers, body)."""
    answered = b""
    with connect(server) as connection, contextlib.suppress(ConnectionError):
        # If the server closes before it has read everything, the connection is reset.
        connection.settimeout(20)
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(2**16):
            answered += piece
    head, _, body = answered.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    version, status, _ = first.split(" ", 2)
    assert version.startswith("HTTP/1.")
    return int(status), dict(line.split(": ", 1) for line in lines), body


def get_from(server, path, *headers):
    """The status of a GET with exactly these headers."""
    lines = [f"GET {path} HTTP/1.1", *headers, "", ""]
    return exchange(server, "\r\n".join(lines).encode())[0]


def text(events):
    return "".join(event.get("text", "") for event in events)


def answer(server, body):
    """The text of the server's answer."""
    _, events = post(server, body)
    return text(events)


def to_base64(picture):
    return base64.b64encode(picture).decode()


def said(server, question="Name a metal.", image=None):
    """The answer of a conversation in the terminal."""
    conversation = Conversation(server.desk.lavin, image)
    return "".join(conversation.say(question, **HOW))


# Answers


def test_the_page_and_what_it_says_about_the_model(server):
    status, page = get(server, "/")
    assert status == 200 and b"<title>LaVIN</title>" in page
    about = json.loads(get(server, "/about")[1])
    assert about["model"] == "tiny" and about["context"] == 128
    assert about["route"] == server.desk.lavin.route().tolist()
    assert about["colours"] == {} and about["examples"] == []
    assert get(server, "/../serve.py")[0] == 404


def test_colours_to_draw_in_and_examples_are_passed_on(server):
    server.colours = {"red": (220, 40, 40)}
    server.examples = [{"question": "Why?", "picture": "iVBORw0KGgo="}]
    about = json.loads(get(server, "/about")[1])
    assert about["colours"] == {"red": [220, 40, 40]} and about["examples"] == server.examples


def test_the_examples_are_pictures_with_questions():
    examples = shelf.examples()
    assert 6 <= len(examples) <= 8
    for example in examples:
        picture = Image.open(io.BytesIO(base64.b64decode(example["picture"])))
        assert picture.format == "PNG" and picture.size == (128, 128)
        assert len(picture.getcolors(128 * 128)) > 1            # not an empty picture
        assert example["question"].endswith("?")
    assert len({example["picture"] for example in examples}) == len(examples)
    assert shelf.examples() == examples                         # the same every time


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


def test_turns_that_do_not_fit_are_reported(server):
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


def test_who_comes_later_waits_and_is_told_so(server, held_steps, monkeypatch):
    answers = [None] * 3
    told = set()                        # the tickets of those who have their first notice
    wait = serve.Queue.wait

    def wait_when_told(queue, ticket, n):
        told.add(ticket)
        wait(queue, ticket, n)

    monkeypatch.setattr(serve.Queue, "wait", wait_when_told)

    def ask(i):
        _, answers[i] = post(server, METAL)

    threads = []
    for i in range(3):
        thread = threading.Thread(target=ask, args=(i,))
        thread.start()
        threads.append(thread)
        wait_until(lambda: len(server.desk.queue.waiting) == i + 1)
    wait_until(lambda: len(told) == 2)
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


def test_a_full_queue_is_reported(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 0)
    _, events = post(server, METAL)
    assert "already waiting" in events[-1]["error"]


def test_a_closed_connection_stops_its_answer_and_nobody_elses(server, monkeypatch):
    """The fifth step waits until the connection is closed. Undisturbed, there are over 60."""
    steps = []
    step = Engine.step
    closed = threading.Event()
    closed.set()

    def counted_step(engine, ids):
        steps.append(1)
        if len(steps) == 5:
            closed.wait(20)
        return step(engine, ids)

    monkeypatch.setattr(Engine, "step", counted_step)
    server.desk.sampling["max_new_tokens"] = 90
    answer(server, METAL)
    assert len(steps) > 60
    steps.clear()
    closed.clear()
    with connect(server) as connection:
        connection.sendall(header(len(QUESTION)) + QUESTION)
        receive_until(connection, b'"text"')
    closed.set()
    wait_until(lambda: not server.desk.queue.waiting)
    assert len(steps) < 30
    server.desk.sampling["max_new_tokens"] = 6
    assert answer(server, METAL) == said(server)


def test_one_who_leaves_while_waiting_makes_room(server, held_steps):
    asking = threading.Thread(target=post, args=(server, METAL))
    asking.start()
    wait_until(lambda: server.desk.queue.waiting)
    with connect(server) as connection:
        connection.sendall(header(len(QUESTION)) + QUESTION)
        wait_until(lambda: len(server.desk.queue.waiting) == 2)
    # The next notice reaches nobody.
    wait_until(lambda: len(server.desk.queue.waiting) < 2)
    held_steps.set()
    asking.join()
    assert not server.desk.queue.waiting


# Bad requests


def bomb():
    """A small file that holds a picture of 64 million pixels."""
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


def test_a_lack_of_memory_is_reported_and_the_server_goes_on(server, monkeypatch):
    def lack(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(server.desk, "answer", lack)
        _, events = post(server, METAL)
    assert "too little memory" in events[-1]["error"]
    assert answer(server, METAL) == said(server)


def test_a_question_too_long_for_the_context(server):
    _, events = post(server, {"question": "why " * 300})
    assert "a context of 128 has room for 126" in events[-1]["error"]


@pytest.mark.parametrize("length", ["²", "9" * 5000, "-1", ""])
def test_a_length_that_is_not_a_plain_number(server, length):
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


ASK = b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
QUESTION = json.dumps(METAL).encode()
LENGTH = b"Content-Length: %d\r\n" % len(QUESTION)


@pytest.mark.parametrize("request_bytes, status", [
    (b"GET /\r\n\r\n", 421),                            # HTTP/0.9 has no Host
    (b"GET http://localhost/about HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    (b"GET / HTTP/9.9\r\n\r\n", 505),
    (b"GET / HTTP/\xb2.1\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\r\n", 400),             # the start of TLS
    (b"\xff \xfe \xfd \xfc\r\n\r\n", 400),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    (GET + b"X: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    (GET + b"X: x\r\n" * 200 + b"\r\n", 431),
    (GET + b"\xff\x00: \x00\r\n: x\r\nno colon\r\n\r\n", 200),
    (GET + b"Content-Type: multipart/mixed; boundary\r\n\r\n", 200),
    (ASK + LENGTH + LENGTH + b"\r\n" + QUESTION, 400),
    (ASK + LENGTH + b"Content-Length: 5\r\n\r\n" + QUESTION, 400),
    (ASK + b"Content-Length: -5\r\n\r\n" + QUESTION, 400),
    (ASK + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + QUESTION, 400),
    (ASK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (ASK + b"Content-Length: 500\r\n\r\n" + QUESTION[:9], 400),
    (ASK + b"\r\n" + QUESTION, 400),
])
def test_a_malformed_request_is_answered_with_a_status(server, request_bytes, status):
    found, headers, body = exchange(server, request_bytes)
    assert found == status
    if status in (400, 404, 421, 501, 505):         # of 414 and 431, the body may be lost
        assert headers["Content-Type"] == "application/json"
        assert json.loads(body)["error"]
    assert answer(server, METAL) == said(server)


@pytest.mark.parametrize("body, status", [
    (b'{"question": "x", "n": ' + b"9" * 5000 + b"}", 400),
    (b'{"question": "x", "turns": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
    (b'{"question": "x", "turns": [["\\udfff", "y"]]}', 400),
    ('{"question": "\ud800"}'.encode("utf-16-le", "surrogatepass"), 400),
    (b'{"question": 1, "question": "x"}', 200),             # JSON parsers take the last one
    (b'{"question": "x", "n": NaN, "image": null}', 200),
])
def test_peculiar_json(server, body, status):
    assert post(server, body)[0] == status


@pytest.mark.parametrize("question", [
    "\0", "\x1b[31mred\x07", "a\r\n\tb", "\u202eabc", "<s></s><unk>",
])
def test_control_characters_are_asked_like_any_others(server, question):
    assert answer(server, {"question": question}) == said(server, question)


def test_an_eps_file_starts_no_program(server, monkeypatch):
    started = []

    def ghostscript(*args, **_):
        started.append(args)
        return Image.new("RGB", (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "eps")
    status, events = post(server, {"question": "x", "image": to_base64(eps.getvalue())})
    assert status == 400 and "not a picture" in events[0]["error"]
    assert not started


# Other sites


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:9000", "LOCALHOST"])
def test_the_server_is_asked_by_its_names_at_any_port(server, host):
    """The port may differ: `ssh -L 9000:127.0.0.1:8000` changes it."""
    assert get_from(server, "/", f"Host: {host}") == 200
    assert get_from(server, "/about", f"Host: {host}", f"Origin: http://{host}") == 200


@pytest.mark.parametrize("headers", [
    [],
    ["Host:"],
    ["Host: evil.test"],
    ["Host: evil.test:8000"],
    ["Host: localhost.evil.test"],
    ["Host: localhost@evil.test"],
    ["Host: evil.test:127.0.0.1"],
    ["Host: 192.0.2.7"],
    ["Host: [::1]:8000"],
    ["Host: localhost", "Host: evil.test"],
    ["Host: localhost", "Host: localhost"],
    ["Host : localhost"],
])
def test_a_name_that_is_not_the_servers_is_refused(server, headers):
    assert get_from(server, "/", *headers) == 421
    assert get_from(server, "/about", *headers) == 421
    lines = [b"POST /ask HTTP/1.1", b"Content-Type: application/json",
             b"Content-Length: 0", *[header.encode() for header in headers]]
    assert exchange(server, b"\r\n".join(lines) + b"\r\n\r\n")[0] == 421


def test_who_asks_by_a_wrong_name_learns_the_right_ones(server):
    _, _, body = exchange(server, b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n")
    assert "goes by 127.0.0.1 or localhost, not by 'evil.test'" in json.loads(body)["error"]


@pytest.mark.parametrize("origin", [
    "null", "", "http://evil.test", "http://localhost:8000.evil.test", "http://localhost",
    "http://localhost:9000", "https://localhost:8000", "http://127.0.0.1:8000",
])
def test_a_page_of_another_site_is_refused(server, origin):
    headers = ["Host: localhost:8000", f"Origin: {origin}"]
    assert get_from(server, "/about", *headers) == 403
    assert get_from(server, "/about", *headers, "Origin: http://localhost:8000") == 403
    lines = ["POST /ask HTTP/1.1", *headers, "Content-Type: application/json"]
    request_bytes = "\r\n".join(lines).encode() + b"\r\n" + LENGTH + b"\r\n" + QUESTION
    assert exchange(server, request_bytes)[0] == 403


@pytest.mark.parametrize("request_bytes, status", [
    (GET + b"\r\n", 200),
    (GET.replace(b"/ ", b"/nowhere ") + b"\r\n", 404),
    (GET.replace(b"localhost", b"evil.test") + b"\r\n", 421),
    (b"nonsense\r\n", 400),
    (ASK + LENGTH + b"\r\n" + QUESTION, 200),
])
def test_no_answer_can_be_framed_loaded_or_guessed_at(server, request_bytes, status):
    answered, headers, _ = exchange(server, request_bytes)
    assert answered == status
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.fixture
def listening():
    """listening(host): a server at this host that does not run, to ask it about names."""
    servers = []

    def listen(host):
        server = serve.listen(host, 0, "tiny")
        servers.append(server)
        return server

    yield listen
    for server in servers:
        server.server_close()


@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=needs_ipv6), "0"])
def test_at_all_addresses_the_server_goes_by_any_address_but_not_by_any_name(listening, host):
    server = listening(host)
    known = ["192.0.2.7:8000", "[2001:db8::7]:8000", "[::1]", "localhost", socket.gethostname()]
    for name in known:
        assert server.goes_by(name), name
    for name in ["evil.test", "192.0.2.7.evil.test", "", ":8000", "[evil.test]"]:
        assert not server.goes_by(name), name


def test_the_server_goes_by_the_name_and_the_address_of_host(listening):
    server = listening("LOCALHOST")
    assert server.goes_by("localhost:8000") and server.goes_by(server.server_address[0])
    server = listening("127.0.0.2")
    assert server.goes_by("127.0.0.2:8000") and server.goes_by("localhost")
    assert not server.goes_by("127.0.0.3")


@needs_ipv6
def test_an_address_of_ipv6_may_be_written_in_another_way(listening):
    server = listening("0:0:0:0:0:0:0:1")
    assert server.goes_by("[::1]:8000") and not server.goes_by("[::2]")


# Slow clients


def test_connections_are_limited_in_number(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(server))
        for _ in range(5):
            status, _, body = exchange(server, b"")
            assert status == 503 and b"too many connections" in body
    wait_until(lambda: not server.connections)
    assert answer(server, METAL) == said(server)


def drip(connection, content):
    """Send a byte of `content` every 0.1 seconds -> does the server close before it has all?"""
    for i in range(len(content)):
        try:
            connection.sendall(content[i:i + 1])
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("start, rest", [
    (b"", b"GET /" + b"a" * 300),
    (GET, b"X: x\r\n" * 50),
    (ASK + b"Content-Length: 500\r\n\r\n", b" " * 300),
    (ASK + b"Content-Length: 30000000\r\n\r\n", b" " * 300),
], ids=["first line", "headers", "body", "a body too large"])
def test_a_request_that_drips_is_given_up(server, monkeypatch, start, rest):
    """The bytes never stop for long, but all of them would take 30 seconds."""
    monkeypatch.setattr(serve, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(serve, "SLOWEST", 1e9)
    with connect(server) as connection:
        connection.sendall(start)
        assert drip(connection, rest)
    wait_until(lambda: not server.connections)


def test_a_large_picture_may_take_longer_to_come(server, monkeypatch):
    """The headers must be there in two seconds. For 1000 bytes there are 100 seconds more."""
    monkeypatch.setattr(serve, "MAX_SECONDS", 2)
    monkeypatch.setattr(serve, "SLOWEST", 10)
    body = QUESTION + b" " * 1000
    with connect(server) as connection:
        connection.sendall(header(len(body)))
        time.sleep(2.5)
        connection.sendall(body)
        assert b" 200 " in connection.recv(100)


def test_a_client_that_reads_too_slowly_frees_the_desk(server, monkeypatch):
    """The connection is never idle, but its 20 MB would take ten seconds."""
    sent = []
    say = serve.Desk.say

    def say_much(desk, question, turns, pixels):
        if question != "much":
            yield from say(desk, question, turns, pixels)
            return
        for i in range(200):
            sent.append(i)
            yield {"text": "x" * 100_000}

    def read_slowly(connection):
        with contextlib.suppress(OSError):
            while connection.recv(100_000):
                time.sleep(0.05)

    monkeypatch.setattr(serve.Desk, "say", say_much)
    monkeypatch.setattr(serve, "MAX_SECONDS", 1)
    body = b'{"question": "much"}'
    with connect(server) as connection:
        connection.sendall(header(len(body)) + body)
        reading = threading.Thread(target=read_slowly, args=(connection,))
        reading.start()
        wait_until(lambda: sent)
        monkeypatch.setattr(serve, "MAX_SECONDS", 30)
        assert answer(server, METAL) == said(server)
        assert len(sent) < 200
        reading.join()


# From the command line


def test_a_taken_port_is_reported_before_the_model_is_loaded(call, monkeypatch):
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


def test_a_host_that_does_not_exist(call):
    code, _, stderr = call(generate, "--serve", 0, "--host", "no such host", *MODEL)
    assert code == 2 and "cannot listen there" in stderr


@pytest.mark.parametrize("host", ["a" * 70, "..", " ", "[::1]", "\udcff", "::1::", "1.2.3.4.5"])
def test_names_that_no_host_can_have(fails, host):
    fails(generate, "--serve", 0, "--host", host, *MODEL, says=["cannot listen there"])


def test_an_empty_host_is_not_everybody(fails):
    fails(generate, "--serve", 0, "--host", "", *MODEL, says=["--host is empty"])


@pytest.fixture
def served(call, monkeypatch):
    """served("--flag", value, …) -> the output of `generate.py --serve 0`, and its server."""
    servers = []

    def serve_forever(server):
        servers.append(server)
        raise KeyboardInterrupt

    def served(*args):
        code, stdout, _ = call(generate, "--serve", 0, *args)
        assert code == 130
        return stdout, servers[-1]

    monkeypatch.setattr(serve.Server, "serve_forever", serve_forever)
    return served


def test_serve_prints_its_address_and_ends_with_ctrl_c(served):
    stdout, server = served(*MODEL)
    assert "http://127.0.0.1:" in stdout and "Ctrl-C to stop" in stdout
    assert "everybody" not in stdout
    assert server.model_name == "tiny · checkpoint-19.pth"


def test_only_the_small_world_has_a_drawing_pad_and_a_shelf(served):
    _, server = served(*SMALL_WORLD)
    assert server.colours == world.COLOURS and server.examples == shelf.examples()
    _, server = served(*MODEL)
    assert server.colours == {} and server.examples == []


def test_a_model_that_is_the_small_worlds_by_half_has_neither(served):
    _, server = served("--llama", world.PATHS["llama"], "--vit", VIT, "--adapter", "none")
    assert server.colours == {} and server.examples == []


@needs_ipv6
def test_an_address_of_ipv6_has_brackets(served):
    stdout, _ = served("--host", "::1", *MODEL)
    assert "http://[::1]:" in stdout and "everybody" not in stdout


@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
def test_at_all_addresses_it_says_who_can_ask(served, host):
    stdout, _ = served("--host", host, *MODEL)
    assert f"listening on {host}: everybody in the network can ask" in stdout
    assert "http://localhost:" in stdout
