"""The control API of one mount: HTTP/1.1 with h11 on trio, over a Unix socket of mode 0600.

GET  /v1/status   one JSON object
GET  /v1/events   ?since=N&follow=1&region=R: NDJSON, or SSE where the client accepts text/event-stream;
                  all that there are without ``since``, only what is there without ``follow``
POST /v1/unmount  {"lazy": bool, "timeout_s": number or null}
POST /v1/sync     {"timeout_s": number or null}
                  both answer NDJSON: {"say": text}, {"progress": {...}}, at last either {"done": {...}}
                  or {"error": {"message", "hint", "exit_code"}}; empty lines are heartbeats

Knows nothing of FUSE or of what an unmount does: a MountControl does. One request per connection,
bounded in size and time. No client, however slow or dead, holds up the mount or an unmount.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import h11
import msgspec
import trio

from agentfuse.control.eventstream import EventLine, as_ndjson, as_sse, parse_query
from agentfuse.control.registry import socket_address
from agentfuse.errors import AgentfuseError

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024
MAX_CONNECTIONS = 256
REQUEST_DEADLINE_S = 10.0
SEND_DEADLINE_S = 30.0
HEARTBEAT_S = 1.0
GRACE_S = 2.0
"""How long answers under way may take to reach their clients when the server is cancelled."""
DEFAULT_SYNC_S = 60.0
"""How long a sync may take when its client does not say."""
_MAX_PENDING_LINES = 1000
_CLIENT_LEFT = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)


_Lines = AsyncGenerator[dict[str, object], None]
_Events = AsyncGenerator[Sequence[EventLine], None]
_Shape = TypeVar("_Shape")


class MountControl(Protocol):
    """What a mount lets its operators do."""

    def status(self) -> dict[str, object]:
        """The mount as JSON values; quick, without I/O."""

    def events(self, *, since: int | None, region: str | None, follow: bool) -> _Events:
        """Events numbered higher than ``since``, as they come; an empty list while there are none.

        An AgentfuseError that comes before the first list is the answer; later it ends the answer.
        """

    def sync(self, *, timeout_s: float) -> AsyncGenerator[dict[str, object], None]:
        """Wait until everything that was closed before is in the store, or raise after ``timeout_s``."""

    def unmount(self, *, lazy: bool, timeout_s: float | None) -> AsyncGenerator[dict[str, object], None]:
        """End the mount and tell how it goes, in the objects of the NDJSON answer.

        The generator only watches: the work belongs to the daemon and goes on when the generator is
        closed early. It is not closed because a client left. An AgentfuseError that it raises
        becomes the last line.
        """


class _RequestError(Exception):
    """A request that is answered with an error and nothing else."""

    def __init__(self, status: int, message: str, *, code: str = "bad_request", hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "message": message, "hint": hint}


def _refused(error: AgentfuseError) -> _RequestError:
    return _RequestError(error.http_status, error.message, code="error", hint=error.hint)


async def serve(
    path: Path,
    control: MountControl,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``control`` at the socket ``path`` until cancelled; started when it accepts connections.

    A socket left at ``path`` is replaced: the caller holds the mountpoint's lock. When cancelled,
    answers that are complete still reach their clients, for GRACE_S at most; then the socket is removed.
    """
    listener = _listen(path)
    server = _Server(control)
    try:
        async with listener, trio.open_nursery() as nursery:
            connections = await nursery.start(server.hold_connections)
            task_status.started()
            try:
                await trio.serve_listeners(server.handle, [listener], handler_nursery=connections)
            finally:
                server.stop(connections)
    finally:
        _remove(path)


def _listen(path: Path) -> trio.SocketListener:
    _remove(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: the file appears with this mode, not later
        with socket_address(path) as address:
            listener.bind(address)
        listener.listen(MAX_CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class _Server:
    def __init__(self, control: MountControl) -> None:
        self._control = control
        self._reading: set[trio.CancelScope] = set()
        self._stopping = trio.Event()

    async def hold_connections(
        self, task_status: trio.TaskStatus[trio.Nursery] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Own every connection's task, out of reach of the server's own cancellation, until ``stop``."""
        async with trio.open_nursery() as connections:
            connections.cancel_scope.shield = True
            task_status.started(connections)
            await self._stopping.wait()

    def stop(self, connections: trio.Nursery) -> None:
        """Drop the clients that have not finished asking, and give the others GRACE_S for their answers."""
        for scope in self._reading:
            scope.cancel()
        connections.cancel_scope.deadline = trio.current_time() + GRACE_S
        self._stopping.set()

    async def handle(self, stream: trio.SocketStream) -> None:
        """Answer the one request of a connection. Never raises but for cancellation."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        async with stream:
            try:
                try:
                    _check_peer(stream)
                    request, body = await self._read(stream, connection)
                    await self._answer(stream, connection, request, body)
                except _RequestError as error:
                    await _send_json(stream, connection, error.status, error.body)
            except _CLIENT_LEFT:
                log.debug("a control client left before its answer")
            except Exception:
                log.exception("unexpected error in the control server")

    async def _read(self, stream: trio.SocketStream, connection: h11.Connection) -> tuple[h11.Request, bytes]:
        if len(self._reading) >= MAX_CONNECTIONS:
            raise _RequestError(503, "too many connections", code="busy")
        with trio.CancelScope(deadline=trio.current_time() + REQUEST_DEADLINE_S) as scope:
            self._reading.add(scope)
            try:
                return await _read_request(stream, connection)
            finally:
                self._reading.discard(scope)
        raise _RequestError(408, f"no complete request within {REQUEST_DEADLINE_S:g} s", code="timeout")

    async def _answer(
        self, stream: trio.SocketStream, connection: h11.Connection, request: h11.Request, body: bytes
    ) -> None:
        path = request.target.partition(b"?")[0]
        methods = {
            b"/v1/status": b"GET",
            b"/v1/events": b"GET",
            b"/v1/sync": b"POST",
            b"/v1/unmount": b"POST",
        }
        if path not in methods:
            raise _RequestError(
                404,
                "no such path",
                code="not_found",
                hint="there are GET /v1/status, GET /v1/events, POST /v1/sync, POST /v1/unmount",
            )
        if request.method != methods[path]:
            allowed = methods[path].decode()
            raise _RequestError(405, f"this path takes {allowed} only", code="method_not_allowed")
        if path == b"/v1/status":
            await _send_json(stream, connection, *self._status())
        elif path == b"/v1/events":
            await self._send_events(stream, connection, request)
        elif path == b"/v1/sync":
            asked = _parse(body, _Sync)
            timeout_s = DEFAULT_SYNC_S if asked.timeout_s is None else asked.timeout_s
            await self._follow(stream, connection, self._control.sync(timeout_s=timeout_s))
        else:
            wanted = _parse(body, _Unmount)
            lines = self._control.unmount(lazy=wanted.lazy, timeout_s=wanted.timeout_s)
            await self._follow(stream, connection, lines)

    def _status(self) -> tuple[int, dict[str, object]]:
        try:
            return 200, self._control.status()
        except AgentfuseError as error:
            return error.http_status, {"code": "error", "message": error.message, "hint": error.hint}
        except Exception:
            log.exception("unexpected error in the status of the mount")
            return 500, {"code": "internal", "message": "unexpected error", "hint": "see the daemon's log"}

    async def _send_events(
        self, stream: trio.SocketStream, connection: h11.Connection, request: h11.Request
    ) -> None:
        headers = dict(request.headers)
        is_sse = b"text/event-stream" in headers.get(b"accept", b"")
        encode = as_sse if is_sse else as_ndjson
        try:
            asked = parse_query(request.target, headers.get(b"last-event-id", b""))
        except AgentfuseError as error:
            raise _refused(error) from None
        lines = self._control.events(since=asked.since, region=asked.region, follow=asked.follow)
        async with aclosing(lines):
            try:
                first: Sequence[EventLine] = await anext(lines, [])
            except AgentfuseError as error:
                raise _refused(error) from None
            content_type = "text/event-stream" if is_sse else "application/x-ndjson"
            await _send(stream, connection, h11.Response(status_code=200, headers=_headers(content_type)))
            await _send(stream, connection, h11.Data(data=encode(first)))
            try:
                async for some in lines:
                    await _send(stream, connection, h11.Data(data=encode(some)))
            except AgentfuseError as error:
                # Cut off in the middle of HTTP, so that nobody takes it for the end.
                log.warning("a subscriber of events is cut off: %s", error)
                return
            await _send(stream, connection, h11.EndOfMessage())

    async def _follow(self, stream: trio.SocketStream, connection: h11.Connection, lines: _Lines) -> None:
        feed = _Feed()
        async with trio.open_nursery() as watching:
            watching.start_soon(self._watch, feed, lines)
            await self._send_feed(stream, connection, feed)

    async def _send_feed(self, stream: trio.SocketStream, connection: h11.Connection, feed: _Feed) -> None:
        response = h11.Response(status_code=200, headers=_headers("application/x-ndjson"))
        # A client that left does not end the unmount: whoever watches it goes on.
        with contextlib.suppress(*_CLIENT_LEFT):
            await _send(stream, connection, response)
            async with aclosing(feed.chunks()) as chunks:
                async for chunk in chunks:
                    await _send(stream, connection, h11.Data(data=chunk))
            await _send(stream, connection, h11.EndOfMessage())

    async def _watch(self, feed: _Feed, lines: _Lines) -> None:
        """Follow an unmount or a sync to its end, whether or not its client still listens."""
        try:
            async with aclosing(lines):
                async for line in lines:
                    feed.put(line)
        except AgentfuseError as error:
            feed.put(_error_line(error.message, error.hint, error.exit_code))
        except Exception:
            log.exception("unexpected error in what a control client asked for")
            feed.put(_error_line("unexpected error", "see the daemon's log", 70))
        finally:
            feed.close()


class _Feed:
    """Lines from an unmount or a sync to one client, never making it wait.

    Of progress only the newest is kept; of a client that does not read at all, the last thousand lines.
    """

    def __init__(self) -> None:
        self._lines: collections.deque[dict[str, object]] = collections.deque(maxlen=_MAX_PENDING_LINES)
        self._closed = False
        self._changed = trio.Event()

    def put(self, line: dict[str, object]) -> None:
        if "progress" in line and self._lines and "progress" in self._lines[-1]:
            self._lines.pop()
        self._lines.append(line)
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """NDJSON as it comes; an empty line whenever there was nothing for HEARTBEAT_S."""
        while True:
            if self._lines:
                yield b"".join(_encode(line) + b"\n" for line in self._take())
            elif self._closed:
                return
            else:
                with trio.move_on_after(HEARTBEAT_S) as waiting:
                    await self._changed.wait()
                if waiting.cancelled_caught:
                    yield b"\n"
            if not self._lines and not self._closed:
                self._changed = trio.Event()

    def _take(self) -> list[dict[str, object]]:
        lines = list(self._lines)
        self._lines.clear()
        return lines


def _check_peer(stream: trio.SocketStream) -> None:
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    if uid not in (0, os.geteuid()):
        raise _RequestError(403, f"uid {uid} may not control this mount", code="forbidden")


async def _read_request(stream: trio.SocketStream, connection: h11.Connection) -> tuple[h11.Request, bytes]:
    request: h11.Request | None = None
    body = b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise _RequestError(error.error_status_hint, f"not HTTP as we speak it: {error}") from None
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(16 * 1024))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise _RequestError(413, f"a body has at most {MAX_BODY_BYTES} bytes", code="too_large")
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, body
        else:
            raise trio.BrokenResourceError  # the client closed the connection before it asked anything


class _Sync(msgspec.Struct, forbid_unknown_fields=True):
    timeout_s: Annotated[float, msgspec.Meta(ge=0)] | None = None


class _Unmount(msgspec.Struct, forbid_unknown_fields=True):
    lazy: bool = False
    timeout_s: Annotated[float, msgspec.Meta(ge=0)] | None = None


def _parse(body: bytes, shape: type[_Shape]) -> _Shape:
    try:
        return msgspec.json.decode(body or b"{}", type=shape)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _RequestError(
            400, f"the body is not understood: {error}", hint='send JSON like {"timeout_s": 60}'
        ) from None


async def _send_json(
    stream: trio.SocketStream,
    connection: h11.Connection,
    status: int,
    body: dict[str, object] | dict[str, str],
) -> None:
    if connection.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
        raise trio.BrokenResourceError  # HTTP was broken beyond answering
    data = _encode(body) + b"\n"
    headers = [*_headers("application/json"), ("Content-Length", str(len(data)))]
    await _send(
        stream,
        connection,
        h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase),
    )
    await _send(stream, connection, h11.Data(data=data))
    await _send(stream, connection, h11.EndOfMessage())


async def _send(stream: trio.SocketStream, connection: h11.Connection, event: h11.Event) -> None:
    data = connection.send(event)
    if data:
        with trio.fail_after(SEND_DEADLINE_S):
            await stream.send_all(data)


def _headers(content_type: str) -> list[tuple[str, str]]:
    return [("Content-Type", content_type), ("Connection", "close"), ("Cache-Control", "no-store")]


def _error_line(message: str, hint: str, exit_code: int) -> dict[str, object]:
    return {"error": {"message": message, "hint": hint, "exit_code": exit_code}}


def _encode(value: object) -> bytes:
    # ASCII only: a path that is not UTF-8 survives as lone surrogates, escaped.
    return json.dumps(value, separators=(",", ":")).encode("ascii")
