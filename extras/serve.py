"""LaVIN as a web page: run python generate.py --serve [PORT], then open http://127.0.0.1:8000.

    GET /           page.html
    GET /about      {"model", "context", "route": [layers, 2 modalities, 2 experts],
                     "colours": {name: [red, green, blue]},
                     "examples": [{"question", "picture": base64}, …]}
                    "route" is [] for adapters with a single expert. The page has a drawing pad if
                    there are colours, and a shelf if there are examples.
    POST /ask       {"question", "turns": [[question, answer], …], "image": base64 or null}

The answer to /ask is a line of JSON for each event:
    {"waiting": n}      n other questions come first
    {"forgotten": n}    the context has no room for the n oldest turns
    {"text": piece}     the next piece of the answer
    {"end": true}       the answer is complete
    {"error": why}      there is no answer

The server stores no conversations: the page sends its whole conversation with every question. The
server answers one question at a time. It keeps the KV cache of the last conversation and reuses the
common prefix, so a follow-up question costs only its own tokens.

A web site that a user visits can make the browser send requests to this server. By DNS rebinding,
the site could even point one of its own names at the server and read the answers. So the Host of a
request must be one of the server's names (`Server.goes_by`). If the request has an Origin, it must
be the same as the Host. Any port is allowed, so that ssh tunnels work. A proxy must send requests
that pass these checks, and must check the Host and Origin of its own clients. For nginx:

    proxy_set_header Host localhost;
    proxy_set_header Origin "";
"""

import base64
import contextlib
import io
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import data
from extras.chat import Conversation
from extras.terminal import explain
from extras.values import short
from files import LavinError
from model import LaVIN

PAGE = Path(__file__).with_name("page.html")
# The page loads nothing from other sites, and shows its pictures from memory. No other site may
# embed the page or load anything from it.
HEADERS = {
    "Content-Security-Policy":
        "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src blob: data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
TOO_MANY = (b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n\r\n"
            b'{"error": "too many connections; try again later"}')
MAX_REQUEST = 20_000_000        # bytes
MAX_PIXELS = 50_000_000
MAX_TEXT = 20_000               # characters
MAX_TURNS = 100                 # the last ones; earlier ones are dropped without a count
MAX_WAITING = 20                # questions
MAX_CONNECTIONS = 64
MAX_SECONDS = 30                # how long we wait for a client, in total
SLOWEST = 100_000               # bytes per second: a large request gets more time
MAX_READERS = 4                 # requests parsed at a time: a picture may take a gigabyte


# A question


def read_picture(text, resolution):
    """base64 -> pixels (3, R, R). Raises LavinError if it is not a picture, or is too large."""
    try:
        image = data.open_picture(io.BytesIO(base64.b64decode(text, validate=True)))
        is_small = image.width * image.height <= MAX_PIXELS     # known before it is decoded
        if is_small:
            return data.load_pixels(image, resolution)
    except Exception as error:      # Pillow may raise any exception
        raise LavinError("this is not a picture that can be read") from error
    millions = MAX_PIXELS // 10**6
    raise LavinError(f"the picture has more than {millions} million pixels; use a smaller one")


def is_turn(turn):
    return isinstance(turn, list) and len(turn) == 2


def parse_question(body: bytes, resolution: int) -> tuple[str, list, torch.Tensor | None]:
    """The body of POST /ask -> (question, turns, pixels or None).

    Control characters are kept: the tokenizer treats them like any other bytes, and the page shows
    an answer as plain text. Raises LavinError, which says what is wrong with the body.
    """
    try:
        asked = json.loads(body)
        question = asked["question"]
        turns = asked.get("turns", [])
        image = asked.get("image")
        if not isinstance(turns, list) or not all(is_turn(turn) for turn in turns):
            raise ValueError("turns are not pairs")
        texts = [question]
        for turn in turns:
            texts += turn
        "".join(texts).encode()     # raises if one is not text, or not Unicode
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LavinError("not a question in the form that extras/serve.py describes") from error
    if not question.strip():
        raise LavinError("there is no question")
    if max(len(text) for text in texts) > MAX_TEXT:
        raise LavinError(f"the text is longer than {MAX_TEXT:,} characters; shorten it")
    pixels = None if image is None else read_picture(image, resolution)
    return question.strip(), turns[-MAX_TURNS:], pixels


# Answers, one at a time


class Queue:
    """First come, first served. Each waiting request holds a ticket. The first one is served."""

    def __init__(self):
        self.waiting = []                                   # tickets
        self.changed = threading.Condition()

    def enter(self) -> object:
        """Return a ticket, the last in the queue. Raises LavinError if the queue is full."""
        ticket = object()
        with self.changed:
            if len(self.waiting) == MAX_WAITING:
                raise LavinError(
                    f"{MAX_WAITING} questions are already waiting; try again later")
            self.waiting.append(ticket)
        return ticket

    def n_before(self, ticket: object) -> int:
        """How many tickets are ahead of this one."""
        return self.waiting.index(ticket)

    def wait(self, ticket: object, n: int) -> None:
        """Wait until the number of tickets ahead is no longer n, but at most two seconds."""
        def has_moved():
            return self.waiting.index(ticket) != n

        with self.changed:
            self.changed.wait_for(has_moved, timeout=2)

    def leave(self, ticket: object) -> None:
        with self.changed:
            self.waiting.remove(ticket)
            self.changed.notify_all()


class Desk:
    """The model, the queue for it, and the last conversation, whose cache is kept."""

    def __init__(self, lavin: LaVIN, sampling: dict, compiled: bool):
        """sampling: keyword arguments for Conversation.say."""
        self.lavin = lavin
        self.sampling = sampling
        self.queue = Queue()
        self.route = []
        if lavin.adapter_config.experts > 1:
            self.route = lavin.route().tolist()
        self.conversation = Conversation(lavin, None, compiled)

    def answer(self, question: str, turns: list, pixels: torch.Tensor | None) -> Iterator[dict]:
        """Wait in the queue, then answer. Yields the events.

        The caller must close this generator, even if it stops early. Otherwise the queue blocks.
        """
        ticket = self.queue.enter()
        try:
            while n := self.queue.n_before(ticket):
                # Sent again after at most two seconds. Sending fails if the client has gone.
                yield {"waiting": n}
                self.queue.wait(ticket, n)
            yield from self.say(question, turns, pixels)
        finally:
            self.queue.leave(ticket)

    def say(self, question, turns, pixels):
        """The events of the answer itself."""
        if not same_picture(pixels, self.conversation.start.image):
            self.conversation.show(pixels)
        self.conversation.recall(turns)
        is_first = True
        for text in self.conversation.say(question, **self.sampling):
            if is_first and self.conversation.dropped:
                yield {"forgotten": self.conversation.dropped}
            is_first = False
            yield {"text": text}
        yield {"end": True}


def same_picture(a, b):
    """Are these the same pixels, or both None?"""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


# HTTP


class Client(io.RawIOBase):
    """The bytes from and to a client. We wait for the client for `seconds_left` in total.

    A socket's own timeout restarts with every byte, so a slow client could keep us waiting forever.
    """

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.seconds_left = MAX_SECONDS

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.wait(self.connection.recv_into, buffer)

    def write(self, content):
        self.wait(self.connection.sendall, content)
        return len(content)

    def wait(self, action, content):
        """Call action(content) and take its time off seconds_left. TimeoutError if none is left."""
        if self.seconds_left <= 0:
            raise TimeoutError
        self.connection.settimeout(self.seconds_left)
        start = time.monotonic()
        try:
            return action(content)
        finally:
            self.seconds_left -= time.monotonic() - start


class Handler(BaseHTTPRequestHandler):
    """One connection, in its own thread."""
    default_request_version = "HTTP/1.0"    # a reply to a malformed request has a status, too

    def setup(self):
        super().setup()
        self.client = Client(self.connection)
        self.rfile = io.BufferedReader(self.client)
        self.wfile = self.client

    def end_headers(self):
        """Add the headers of every response, including those that http.server sends itself."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def reply(self, status, content, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status, why):
        self.reply(status, json.dumps({"error": why}).encode())

    def send_error(self, code, message=None, explain=None):
        """http.server calls this for a request that it cannot read. By default it sends HTML."""
        self.refuse(code, message or HTTPStatus(code).phrase)

    def is_welcome(self):
        """Is the request for one of our names, and not from another site? If not, refuse it."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.goes_by(hosts[0]):
            names = " or ".join(sorted(self.server.names))
            self.refuse(421, f"this server goes by {names}, not by {short(', '.join(hosts))}; "
                             "use --host to give it another name")
            return False
        for origin in self.headers.get_all("Origin", []):
            if origin.lower() != f"http://{hosts[0]}".lower():
                self.refuse(403, "pages of other sites may not send requests here")
                return False
        return True

    def do_GET(self):
        if not self.is_welcome():
            return
        if self.path == "/":
            self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/about":
            desk = self.server.desk
            about = {
                "model": self.server.model_name,
                "context": desk.lavin.max_seq_len,
                "route": desk.route,
                "colours": self.server.colours,
                "examples": self.server.examples,
            }
            self.reply(200, json.dumps(about).encode())
        else:
            self.refuse(404, "there are only / and /about, and /ask for POST")

    def do_POST(self):
        """Answer a question. It must be JSON: browsers do not let other sites send that here."""
        if not self.is_welcome():
            return
        is_json = self.headers.get_content_type() == "application/json"
        is_chunked = "Transfer-Encoding" in self.headers
        lengths = " ".join(self.headers.get_all("Content-Length", []))      # two are refused
        has_length = re.fullmatch("[0-9]{1,12}", lengths) and not is_chunked
        if self.path != "/ask" or not is_json or not has_length:
            self.refuse(400, "post JSON of a known length to /ask")
            return
        length = int(lengths)
        self.client.seconds_left += min(length, MAX_REQUEST) / SLOWEST
        if length > MAX_REQUEST:
            self.read_past(min(length, 4 * MAX_REQUEST))
            megabytes = MAX_REQUEST // 10**6
            self.refuse(413, f"the request is larger than {megabytes} MB; use a smaller picture")
            return
        try:
            question, turns, pixels = self.read_question(length)
        except LavinError as error:
            self.refuse(400, str(error))
            return
        self.stream_answer(question, turns, pixels)

    def read_question(self, length):
        body = self.rfile.read(length)
        with self.server.readers:
            return parse_question(body, self.server.desk.lavin.resolution)

    def read_past(self, n):
        """Read n bytes and drop them. A browser reads a reply only after it has sent everything."""
        while n > 0:
            n_read = len(self.rfile.read(min(n, 2**20)))
            if n_read == 0:
                return
            n -= n_read

    def stream_answer(self, question, turns, pixels):
        """Send the events as they come. The end of the connection ends the answer (HTTP/1.0)."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("X-Accel-Buffering", "no")         # tells an nginx proxy not to buffer
        self.end_headers()
        try:
            with contextlib.closing(self.server.desk.answer(question, turns, pixels)) as events:
                for event in events:
                    self.send(event)
        except OSError:                 # the browser has left
            raise
        except Exception as error:
            why = explain(error)
            if why is None:
                raise                   # a bug: its traceback goes to stderr
            self.send({"error": why})

    def send(self, event):
        self.wfile.write(json.dumps(event).encode() + b"\n")
        self.wfile.flush()

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass                                            # the client has gone

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Listens from the start. Its desk is set once the model is loaded."""
    daemon_threads = True           # Ctrl-C does not wait for answers
    request_queue_size = 64         # connections that are not accepted yet

    def __init__(self, host: str, port: int, model_name: str, colours: dict, examples: list):
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        self.host = host
        self.address = ipaddress.ip_address(self.server_address[0])
        self.names = {"localhost", "127.0.0.1", host.lower(), str(self.address)}
        if self.address.is_unspecified:
            self.names.add(socket.gethostname().lower())
        self.model_name = model_name
        self.colours = colours
        self.examples = examples
        self.desk = None
        self.connections = set()
        self.readers = threading.Semaphore(MAX_READERS)

    def goes_by(self, host: str) -> bool:
        """Is this Host header, "name" or "name:port", one of our names? The port does not matter.

        A server that listens on all addresses of the machine accepts any IP address: DNS rebinding
        needs a name.
        """
        name = re.sub(":[0-9]*$", "", host.strip().lower()).strip("[]")
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.address.is_unspecified

    def verify_request(self, request, client_address):
        """May we accept one more connection? If not, it gets TOO_MANY and is then closed."""
        if len(self.connections) < MAX_CONNECTIONS:
            self.connections.add(request)
            return True
        with contextlib.suppress(OSError):
            request.sendall(TOO_MANY)
        return False

    def shutdown_request(self, request):
        """Every connection ends here, with or without an error."""
        self.connections.discard(request)
        super().shutdown_request(request)


def listen(host: str, port: int, model_name: str, colours: dict = {},
           examples: list = []) -> Server:
    """Bind the address before loading the model, which takes minutes. port 0: any free port.

    colours, examples: as in /about. Raises LavinError if the address cannot be bound.
    """
    if not host:                    # for a socket, this means all addresses
        raise LavinError("--host is empty; leave it out to serve this machine only, "
                         "or give 0.0.0.0 to serve the whole network")
    try:
        return Server(host, port, model_name, colours, examples)
    except (OSError, OverflowError, TypeError) as error:    # TypeError: an impossible host name
        raise LavinError(f"--serve {port} --host {host}: cannot listen there ({error}); "
                         "choose another port or address") from error


def serve(server: Server, lavin: LaVIN, sampling: dict, compiled: bool) -> None:
    """Answer questions until Ctrl-C. sampling: keyword arguments for Conversation.say."""
    with server:
        server.desk = Desk(lavin, sampling, compiled)
        host = server.host
        if server.address.is_unspecified:
            host = "localhost"
        if not server.address.is_loopback:
            print(f"listening on {server.address}: everybody in the network can ask")
        if ":" in host:
            host = f"[{host}]"
        print(f"http://{host}:{server.server_port} · Ctrl-C to stop", flush=True)
        server.serve_forever()
