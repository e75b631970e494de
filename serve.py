"""LaVIN as a page: python serve.py, then open http://127.0.0.1:8000.

    GET /           page.html
    GET /about      {"model", "context", "route": [layers, 2 modalities, 2 experts]}
    POST /ask       {"question", "turns": [[question, answer], …], "image": base64 or null}, answered by a line of JSON
                    for each event: {"waiting": n} while n others come first, {"forgotten": n} turns that the context
                    has no room for, {"text": piece} as it comes, at last {"end": true}, or {"error": why}

The server remembers nobody: a page sends its conversation along. One question is answered at a time; the cache of the
last one is used again as far as the next begins like it, as a follow-up does.
"""

import argparse
import base64
import contextlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image

import data
from chat import Conversation
from files import LavinError, at_least, run
from generate import add_model_flags, add_sampling_flags, find_model, load_model, sampling

PAGE = Path(__file__).with_name("page.html")
MAX_REQUEST = 20_000_000        # bytes
MAX_PIXELS = 50_000_000
MAX_TEXT = 20_000               # characters
MAX_TURNS = 100
MAX_WAITING = 20                # questions


class Queue:
    """First come, first served."""

    def __init__(self):
        self.waiting, self.changed = [], threading.Condition()

    @contextlib.contextmanager
    def turn(self, tell):
        """Wait for one's turn and hold it. tell(how many come first) is called now and then; what it raises ends the wait."""
        ticket = object()
        with self.changed:
            if len(self.waiting) == MAX_WAITING:
                raise LavinError(f"{MAX_WAITING} questions are waiting already; try again in a while")
            self.waiting.append(ticket)
        try:
            while before := self.waiting.index(ticket):
                tell(before)
                with self.changed:
                    self.changed.wait_for(lambda: self.waiting.index(ticket) != before, timeout=2)
            yield
        finally:
            with self.changed:
                self.waiting.remove(ticket)
                self.changed.notify_all()


def picture(text, resolution):
    """base64 -> pixels (3, R, R)."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
        small = image.width * image.height <= MAX_PIXELS
        pixels = data.load_pixels(image, resolution) if small else None
    except Exception as error:      # Pillow's readers raise anything
        raise LavinError("this is not a picture that can be read") from error
    if not small:
        raise LavinError(f"the picture has more than {MAX_PIXELS // 10**6} million pixels; take a smaller one")
    return pixels


def parse(body, resolution):
    """The body of POST /ask -> (question, turns, pixels or None). LavinError says what is wrong with it."""
    try:
        asked = json.loads(body)
        question, turns, image = asked["question"], asked.get("turns", []), asked.get("image")
        if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            raise ValueError("turns")
        texts = [question, *(text for turn in turns for text in turn)]
        "".join(texts).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LavinError("not a question in the form that serve.py describes") from error
    if not question.strip():
        raise LavinError("there is no question")
    if max(map(len, texts)) > MAX_TEXT:
        raise LavinError(f"this is longer than {MAX_TEXT:,} characters; ask it shorter")
    return question.strip(), turns[-MAX_TURNS:], None if image is None else picture(image, resolution)


class Desk:
    """The model, its queue, and whose conversation the cache holds."""

    def __init__(self, lavin, how, compiled):
        self.how, self.queue, self.lavin, self.route = how, Queue(), lavin, lavin.route().tolist()
        self.conversation = Conversation(lavin, None, compiled)

    def answer(self, question, turns, pixels):
        """Yield the events of an answer. To be called when it is one's turn."""
        shown = self.conversation.head.image
        if (pixels is None) != (shown is None) or pixels is not None and not torch.equal(pixels, shown):
            self.conversation.show(pixels)
        self.conversation.recall(turns)
        for i, text in enumerate(self.conversation.say(question, **self.how)):
            if i == 0 and self.conversation.dropped:
                yield {"forgotten": self.conversation.dropped}
            yield {"text": text}
        yield {"end": True}


class Handler(BaseHTTPRequestHandler):
    timeout = 60                    # seconds that a connection may be silent

    def reply(self, status, content, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:")
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status, why):
        self.reply(status, json.dumps({"error": why}).encode())

    def do_GET(self):
        if self.path == "/":
            self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/about":
            desk = self.server.desk
            about = {"model": self.server.model, "context": desk.lavin.max_seq_len, "route": desk.route}
            self.reply(200, json.dumps(about).encode())
        else:
            self.refuse(404, "there is / and /about, and /ask to post to")

    def do_POST(self):
        """A question. Content of any other type than JSON is refused: a browser lets no other site send that."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/ask" or self.headers.get_content_type() != "application/json" or not re.fullmatch("[0-9]{1,12}", length):
            return self.refuse(400, "post JSON of a known length to /ask")
        if int(length) > MAX_REQUEST:
            left = min(int(length), 4 * MAX_REQUEST)            # a browser listens only when it has said all
            while left > 0 and (read := len(self.rfile.read(min(left, 2**20)))):
                left -= read
            return self.refuse(413, f"this is larger than {MAX_REQUEST // 10**6} MB; take a smaller picture")
        desk = self.server.desk
        try:
            question, turns, pixels = parse(self.rfile.read(int(length)), desk.lavin.resolution)
        except LavinError as error:
            return self.refuse(400, str(error))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("X-Accel-Buffering", "no")
        self.end_headers()                                      # HTTP/1.0: the end of the connection is the answer's

        def send(event):
            self.wfile.write(json.dumps(event).encode() + b"\n")
            self.wfile.flush()

        try:
            with desk.queue.turn(lambda before: send({"waiting": before})):
                for event in desk.answer(question, turns, pixels):
                    send(event)
        except LavinError as error:
            send({"error": str(error)})

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            pass                                                # whoever asked has gone

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True           # Ctrl-C does not wait for answers
    request_queue_size = 64         # connections that are not taken up yet

    def __init__(self, address, desk, model):
        super().__init__(address, Handler)
        self.desk, self.model = desk, model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=at_least(0), default=8000, help="0: any that is free (default: 8000)")
    add_model_flags(parser)
    add_sampling_flags(parser)
    parser.set_defaults(data=None, data_root=None)
    args = parser.parse_args()
    how = sampling(args, parser)
    adapter, remembered = find_model(args)
    try:
        server = Server((args.host, args.port), None, f"{Path(args.llama).name} · {adapter and Path(adapter).name or 'no adapter'}")
    except (OSError, OverflowError) as error:
        raise LavinError(f"--host {args.host} --port {args.port}: cannot listen there ({error}); choose another") from error
    with server:
        server.desk = Desk(load_model(args, adapter, remembered), how, args.compile)
        print(f"http://{args.host}:{server.server_port} · Ctrl-C ends it", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run(main)
