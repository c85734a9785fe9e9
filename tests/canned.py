"""An HTTP server on this machine that gives the answers a test wrote, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """``missing``: bytes that Content-Length promises and the connection breaks before."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    missing: int = 0


def refusal(status: int, code: str, said: str = "said so", more: str = "") -> Answer:
    """An S3 error."""
    document = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{said}</Message>{more}</Error>"
    return Answer(status, document.encode(), {"Content-Type": "application/xml"})


class Canned:
    """Answers one after the other, the last one again and again."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.asked: list[Asked] = []
        self.answers: list[Answer | Callable[[Asked], Answer]] = []
        self._lock = threading.Lock()

    def answer(self, asked: Asked) -> Answer:
        with self._lock:
            self.asked.append(asked)
            given = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return given if isinstance(given, Answer) else given(asked)


@contextlib.contextmanager
def canned() -> Iterator[Canned]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = script.answer(Asked(self.command, self.path, headers, body))
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body) + answer.missing))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            self.close_connection = answer.missing > 0

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        script = Canned(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()
