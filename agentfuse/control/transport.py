"""One request and its answer on a connection: HTTP/1.1 by h11 on trio, bounded in size and time.

Knows no route and no mount. An Exchange is used by one task; what breaks because its client left is one
of CLIENT_LEFT.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import AsyncGenerator, Iterable
from http import HTTPStatus

import h11
import trio

from agentfuse.control.feeds import encode
from agentfuse.errors import AgentfuseError

MAX_HEADER_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024
SEND_DEADLINE_S = 30.0
STALL_DEADLINE_S = 30.0
"""A content that comes in may take as long as it likes, but never so long for its next bytes."""
CLIENT_LEFT = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)

_RECEIVE_BYTES = 64 * 1024
_FD_BYTES = array("i").itemsize
_CLOSE_S = 2.0
_closers = trio.CapacityLimiter(2)

Header = tuple[str, str]


class RequestError(Exception):
    """A request that is answered with an error and nothing else."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "bad_request",
        hint: str = "",
        headers: Iterable[Header] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "message": message, "hint": hint}
        self.headers = list(headers)


def refused(error: AgentfuseError) -> RequestError:
    """The answer that an error of ours is."""
    return RequestError(error.http_status, error.message, code=error.code(), hint=error.hint)


class Exchange:
    """The one request of a connection, and its answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.fd: int | None = None  # came along with the first bytes
        self._is_begun = False
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)

    async def read_head(self) -> h11.Request:
        """The request without its body. Raises ``RequestError`` for what is not HTTP."""
        event = await self._next_event()
        if isinstance(event, h11.Request):
            return event
        raise trio.BrokenResourceError  # the client closed the connection before it asked anything

    async def read_body(self) -> bytes:
        """The whole body; it is small, or the request is refused."""
        body = b""
        while (data := await self.read_some()) is not None:
            body += data
            if len(body) > MAX_BODY_BYTES:
                raise RequestError(413, f"a body has at most {MAX_BODY_BYTES} bytes", code="too_large")
        return body

    async def content(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes; a client that waits to be told to send it is told when this begins."""
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))
        while True:
            data = None
            with trio.move_on_after(STALL_DEADLINE_S) as waiting:
                data = await self.read_some()
            if waiting.cancelled_caught:
                raise RequestError(408, f"nothing came for {STALL_DEADLINE_S:g} s", code="timeout")
            if data is None:
                return
            yield data

    async def read_some(self) -> bytes | None:
        """Some of the body, None at its end."""
        event = await self._next_event()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if isinstance(event, h11.EndOfMessage):
            return None
        raise trio.BrokenResourceError  # the client closed the connection within its request

    async def send_json(self, status: int, body: object, headers: Iterable[Header] = ()) -> None:
        """Answer with one object, of JSON values or in bytes already."""
        if self._http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            raise trio.BrokenResourceError  # HTTP was broken beyond answering
        data = (body if isinstance(body, bytes) else encode(body)) + b"\n"
        await self.begin(status, "application/json", [("Content-Length", str(len(data))), *headers])
        await self.send(data)
        await self.end()

    async def begin(self, status: int, content_type: str, headers: Iterable[Header] = ()) -> None:
        """Begin an answer; chunked unless the headers say how long it is."""
        ours = [("Content-Type", content_type), ("Connection", "close"), ("Cache-Control", "no-store")]
        reason = HTTPStatus(status).phrase
        await self._send(h11.Response(status_code=status, headers=[*ours, *headers], reason=reason))

    async def send(self, data: bytes) -> None:
        """Some of the answer; ``TooSlowError`` when the client does not take it."""
        await self._send(h11.Data(data=data))

    async def end(self) -> None:
        """The answer is complete; one that is not ended so is seen to be cut off."""
        await self._send(h11.EndOfMessage())

    async def _next_event(self) -> object:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise RequestError(error.error_status_hint, f"not HTTP as we speak it: {error}") from None
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self._receive())

    async def _receive(self) -> bytes:
        if self._is_begun:
            return bytes(await self.stream.receive_some(_RECEIVE_BYTES))
        self._is_begun = True
        try:
            # Room for one descriptor: CMSG_SPACE has its padding, which would take a second one.
            data, ancillary, _, _ = await self.stream.socket.recvmsg(
                _RECEIVE_BYTES, socket.CMSG_LEN(_FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise trio.BrokenResourceError from error
        for level, kind, value in ancillary:
            if (level, kind, len(value)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD_BYTES):
                (self.fd,) = array("i", value)
        return data

    async def close_fd(self) -> None:
        """Let go of the descriptor that came along, if one did.

        In a thread: of a file in this very mount, or in one that hangs, closing may wait for a daemon.
        """
        if self.fd is not None:
            fd, self.fd = self.fd, None
            with trio.move_on_after(_CLOSE_S, shield=True):
                await trio.to_thread.run_sync(os.close, fd, abandon_on_cancel=True, limiter=_closers)

    async def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            with trio.fail_after(SEND_DEADLINE_S):
                await self.stream.send_all(data)
