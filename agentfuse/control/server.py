"""The control API of one mount: HTTP/1.1 with h11 on trio, over a Unix socket of mode 0600.

What can be asked is in ``routes``. One request per connection, bounded in size and time. No client,
however slow or dead, holds up the mount or an unmount.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import trio

from agentfuse.control import routes
from agentfuse.control.contract import Lines, MountControl
from agentfuse.control.feeds import Feed, error_line
from agentfuse.control.registry import socket_address
from agentfuse.control.route import Answer, AnyRoute, Call, Reply, Streamed
from agentfuse.control.transport import CLIENT_LEFT, Exchange, RequestError, refused
from agentfuse.errors import AgentfuseError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 384
MAX_FOLLOWERS = 320
"""So many of them may wait for what is to come: the others are for who wants an answer."""

REQUEST_DEADLINE_S = 10.0
GRACE_S = 2.0
"""How long answers under way may take to reach their clients when the server is cancelled."""
_SEE_LOG = "see the daemon's log"


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
        self._connections = 0
        self._followers = 0
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
        exchange = Exchange(stream)
        self._connections += 1
        try:
            async with stream:
                try:
                    try:
                        _check_peer(stream)
                        await self._answer(exchange)
                    except RequestError as error:
                        await exchange.send_json(error.status, error.body, error.headers)
                except CLIENT_LEFT:
                    log.debug("a control client left before its answer")
                except Exception:
                    log.exception("unexpected error in the control server")
        finally:
            self._connections -= 1
            await exchange.close_fd()

    async def _answer(self, exchange: Exchange) -> None:
        """Read the request, do what it asks, and tell."""
        if self._connections > MAX_CONNECTIONS:
            raise _too_many(MAX_CONNECTIONS, "connections")
        route, call = await self._read(exchange)
        if not route.follows:
            await self._send(exchange, await self._reply(exchange, route, call))
            return
        if self._followers >= MAX_FOLLOWERS:
            raise _too_many(MAX_FOLLOWERS, "followers")
        self._followers += 1
        try:
            await self._send(exchange, await self._reply(exchange, route, call))
        finally:
            self._followers -= 1

    async def _read(self, exchange: Exchange) -> tuple[AnyRoute, Call[Any, Any]]:
        """What is asked, and of which route."""
        route = call = None
        with self._interruptible(trio.current_time() + REQUEST_DEADLINE_S):
            request = await exchange.read_head()
            route, headers = routes.find(request.method, request.target), dict(request.headers)
            with _answering():
                body = b"" if route.takes_content else await exchange.read_body()
                call = replace(route.call(request.target, headers, body), fd=exchange.fd)
        if route is None or call is None:
            raise RequestError(408, f"no complete request within {REQUEST_DEADLINE_S:g} s", code="timeout")
        return route, call

    async def _reply(self, exchange: Exchange, route: AnyRoute, call: Call[Any, Any]) -> Reply:
        """Do what is asked."""
        if not route.takes_content:
            with _answering():
                return await route.handler(self._control, call)
        with self._interruptible():
            async with aclosing(exchange.content()) as content:
                with _answering():
                    return await route.handler(self._control, replace(call, content=content))
        raise RequestError(503, "the mount is ending", code="busy", hint="mount it again")

    @contextlib.contextmanager
    def _interruptible(self, deadline: float = math.inf) -> Iterator[None]:
        """What a client has not finished to ask ends when the server does."""
        with trio.CancelScope(deadline=deadline) as scope:
            self._reading.add(scope)
            try:
                yield
            finally:
                self._reading.discard(scope)

    async def _send(self, exchange: Exchange, reply: Reply) -> None:
        if isinstance(reply, Answer):
            value = reply.value if isinstance(reply.value, bytes) else msgspec.to_builtins(reply.value)
            await exchange.send_json(reply.status, value)
        elif isinstance(reply, Streamed):
            await _send_stream(exchange, reply)
        else:
            feed = Feed()
            async with trio.open_nursery() as watching:
                watching.start_soon(_watch, feed, reply.lines)
                await _send_feed(exchange, feed)


async def _send_stream(exchange: Exchange, reply: Streamed) -> None:
    async with aclosing(reply.chunks) as chunks:
        with _answering():
            first = await anext(chunks, b"")
        await exchange.begin(reply.status, reply.content_type, reply.headers)
        await exchange.send(first)
        try:
            async for chunk in chunks:
                await exchange.send(chunk)
        except AgentfuseError as error:
            # Cut off in the middle of HTTP, so that nobody takes it for the end.
            log.warning("an answer is cut off: %s", error)
            return
        await exchange.end()


async def _send_feed(exchange: Exchange, feed: Feed) -> None:
    # A client that left does not end the unmount: whoever watches it goes on.
    with contextlib.suppress(*CLIENT_LEFT):
        await exchange.begin(200, "application/x-ndjson")
        async with aclosing(feed.chunks()) as chunks:
            async for chunk in chunks:
                await exchange.send(chunk)
        await exchange.end()


async def _watch(feed: Feed, lines: Lines) -> None:
    """Follow an unmount or a sync to its end, whether or not its client still listens."""
    try:
        async with aclosing(lines):
            async for line in lines:
                feed.put(line)
    except AgentfuseError as error:
        feed.put(error_line(error.message, error.hint, error.exit_code))
    except Exception:
        log.exception("unexpected error in what a control client asked for")
        feed.put(error_line("unexpected error", _SEE_LOG, AgentfuseError.exit_code))
    finally:
        feed.close()


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Turns errors into answers; what nobody expected is logged, once."""
    try:
        yield
    except AgentfuseError as error:
        raise refused(error) from None
    except (RequestError, *CLIENT_LEFT):
        raise
    except Exception:
        log.exception("unexpected error in what a control client asked for")
        raise RequestError(500, "unexpected error", code="internal", hint=_SEE_LOG) from None


def _too_many(limit: int, what: str) -> RequestError:
    return RequestError(503, f"there are {limit} {what} already", code="busy", hint="close some of them")


def _check_peer(stream: trio.SocketStream) -> None:
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    if uid not in (0, os.geteuid()):
        raise RequestError(403, f"uid {uid} may not control this mount", code="forbidden")
