"""Endpoints of webhooks for tests: real HTTPS servers on this host that answer as they are told."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trustme
from standardwebhooks.webhooks import Webhook as Verifier

SECRET = "whsec_" + base64.b64encode(os.urandom(32)).decode()

Behaviour = Callable[[http.server.BaseHTTPRequestHandler], None]


def answers(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    """Answers at once."""

    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def sends(data: bytes) -> Behaviour:
    """Sends these bytes, whatever they are, and hangs up."""

    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return behave


def hangs_until(event: threading.Event) -> Behaviour:
    """Says nothing for a long time."""

    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        event.wait(60)
        handler.close_connection = True

    return behave


def never_ends(until: threading.Event) -> Behaviour:
    """Takes it, and goes on answering for ever."""

    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not until.is_set():
                handler.wfile.write(bytes(100_000))
        handler.close_connection = True

    return behave


class Receiver:
    """A server whose answers are ``behaviours`` in turn, then 204. ``got``: what was posted, verified."""

    def __init__(self, authority: trustme.CA | None, *behaviours: Behaviour, port: int = 0) -> None:
        self.behaviours = list(behaviours)
        self.got: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.changed = threading.Condition()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver._take(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        if authority is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("localhost").configure_cert(context)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_port
        scheme = "http" if authority is None else "https"
        self.url = f"{scheme}://localhost:{self.port}/hook?token=t0ps3cret"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def _take(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        message = Verifier(SECRET).verify(body, headers)
        assert message["id"] == headers["webhook-id"]
        with self.changed:
            behave = self.behaviours.pop(0) if self.behaviours else answers(204)
            self.got.append(message)
            self.headers.append(headers)
            self.changed.notify_all()
        behave(handler)

    def wait_for(self, is_enough: Callable[[list[dict[str, Any]]], bool], timeout_s: float = 30.0) -> None:
        """Return when what was posted so far is enough."""
        with self.changed:
            assert self.changed.wait_for(lambda: is_enough(self.got), timeout_s), self.got

    def paths(self) -> list[str]:
        """The paths of all events posted, in order."""
        return [event["path"] for message in self.got for event in message["events"]]

    def close(self) -> None:
        """Nothing listens any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextlib.contextmanager
def receiving(authority: trustme.CA | None, *behaviours: Behaviour, port: int = 0) -> Iterator[Receiver]:
    """A receiver for a block."""
    receiver = Receiver(authority, *behaviours, port=port)
    try:
        yield receiver
    finally:
        receiver.close()


def webhook_table(receiver_url: str, base: Path, authority: trustme.CA | None, *lines: str) -> str:
    """The configuration of a webhook; its secret and its authority are written below ``base``."""
    secret, ca = base / "webhook.secret", base / "ca.pem"
    secret.write_text(SECRET + "\n")
    table = [f'[[webhooks]]\nurl = "{receiver_url}"\nsecret_file = "{secret}"', *lines]
    if authority is not None:
        authority.cert_pem.write_to_path(str(ca))
        table.append(f'ca_file = "{ca}"')
    return "\n".join(table) + "\n"


def seqs(message: dict[str, Any]) -> list[int]:
    """The numbers of a message's events."""
    return [event["seq"] for event in json.loads(json.dumps(message))["events"]]
