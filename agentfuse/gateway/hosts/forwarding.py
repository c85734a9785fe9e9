"""Requests that are another host's: sent on as they come, and the answer back, nothing of either held.

A connection of its own for each, both directions at once: an answer that comes before the request was sent
whole (a refusal) is passed on. A request that was forwarded is never forwarded again.
"""

from __future__ import annotations

import logging
import socket
import ssl
from urllib.parse import urlsplit

import h11
import trio
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from agentfuse.errors import UsageError
from agentfuse.gateway.edge import StatedError
from agentfuse.gateway.hosts.headers import end_to_end, values
from agentfuse.gateway.hosts.proof import ANSWER_HEADER, Proofs
from agentfuse.gateway.hosts.roster import Host

_LOG = logging.getLogger(__name__)

_CONNECT_S = 5.0
_PIECE_BYTES = 64 * 1024
_MAX_HEAD_BYTES = 64 * 1024
_SILENT = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
_UNSENT_MS = 30_000


class Forwarder:
    """Forwards to other hosts."""

    def __init__(self, proofs: Proofs) -> None:
        self._proofs = proofs

    async def forward(self, scope: Scope, receive: Receive, send: Send, host: Host, lost: trio.Event) -> None:
        """Have ``host`` answer a request of which no body was read; given up when ``lost`` is set.

        Raises ``StatedError`` 503 when the host did not get it, 502 when that is not known, and
        ``ClientDisconnect``. Raised after the answer began, they cut it off.
        """
        stream = await _connected(host)
        async with stream:
            exchange = _Exchange(self._proofs, host, stream, scope=scope, receive=receive, send=send)
            await exchange.run(lost)


class _Exchange:
    """One request and its answer."""

    def __init__(
        self,
        proofs: Proofs,
        host: Host,
        stream: trio.abc.Stream,
        *,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._proofs = proofs
        self._host = host
        self._stream = stream
        self._scope = scope
        self._receive = receive
        self._send = send
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self._nonce = ""
        self._has_sent_all = False
        self._is_answered = False
        self._failure: Exception | None = None

    async def run(self, lost: trio.Event) -> None:
        head = self._head()
        async with trio.open_nursery() as nursery:
            everything = nursery.cancel_scope
            nursery.start_soon(self._give_up, lost, everything)
            try:
                await self._stream.send_all(head)
                nursery.start_soon(self._send_body, everything)
                await self._pass_answer()
            except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
                self._failure = _unknown(self._host, str(error) or "the connection broke")
            except StatedError as error:
                self._failure = error
            everything.cancel()
        if self._failure is not None:
            raise self._failure

    def _head(self) -> bytes:
        scope = self._scope
        headers = end_to_end(scope["headers"])
        if not values(headers, b"host"):
            headers.append((b"host", urlsplit(self._host.url).netloc.encode()))
        target = target_of(scope)
        self._nonce, proof = self._proofs.sign_request(
            scope["method"], target, headers, to=self._host.id, epoch=self._host.epoch
        )
        framing = [(b"connection", b"close")]
        if values(scope["headers"], b"transfer-encoding"):
            framing.append((b"transfer-encoding", b"chunked"))
        try:
            request = h11.Request(method=scope["method"], target=target, headers=[*headers, proof, *framing])
            return self._http.send(request) or b""
        except h11.LocalProtocolError as error:
            raise UsageError(f"the request cannot be forwarded: {error}") from None

    async def _send_body(self, everything: trio.CancelScope) -> None:
        """Then until the client leaves, or the answer is there."""
        try:
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect" and self._is_answered:
                    return  # the server's way to say that all is over
                if message["type"] == "http.disconnect":
                    self._failure = ClientDisconnect()
                    everything.cancel()
                    return
                if message.get("body"):
                    await self._send_up(h11.Data(data=message["body"]))
                if not self._has_sent_all and not message.get("more_body", False):
                    await self._send_up(h11.EndOfMessage())
                    self._has_sent_all = True
        except h11.LocalProtocolError as error:
            self._failure = UsageError(f"the body is not what its head says: {error}")
            everything.cancel()
        except trio.BrokenResourceError:
            return  # what it answered to the beginning may still come

    async def _send_up(self, event: h11.Event) -> None:
        await self._stream.send_all(self._http.send(event) or b"")

    async def _give_up(self, lost: trio.Event, everything: trio.CancelScope) -> None:
        await lost.wait()
        self._failure = _unknown(self._host, "it is lost")
        everything.cancel()

    async def _pass_answer(self) -> None:
        event = await self._next()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next()
        if not isinstance(event, h11.Response):
            raise _unknown(self._host, "it closed the connection")
        headers = end_to_end(event.headers)
        proofs = values(event.headers, ANSWER_HEADER)
        if len(proofs) != 1 or not self._proofs.is_answer(proofs[0], self._nonce, event.status_code, headers):
            raise _unproven(self._host, event.status_code)
        await self._send({"type": "http.response.start", "status": event.status_code, "headers": headers})
        while isinstance(event := await self._next(), h11.Data):
            await self._send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
        if not isinstance(event, h11.EndOfMessage):
            raise _unknown(self._host, "it broke off")
        self._is_answered = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(bytes(await self._stream.receive_some(_PIECE_BYTES)))
        return event


def target_of(scope: Scope) -> bytes:
    """Path and query as they came."""
    query = scope["query_string"]
    path: bytes = scope["raw_path"]
    return path + b"?" + query if query else path


async def _connected(host: Host) -> trio.abc.Stream:
    url = urlsplit(host.url)
    name, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    try:
        with trio.fail_after(_CONNECT_S):
            stream = await trio.open_tcp_stream(name, port)
            _have_noticed(stream)
            if url.scheme == "http":
                return stream
            encrypted = trio.SSLStream(stream, ssl.create_default_context(), server_hostname=name)
            await encrypted.do_handshake()
            return encrypted
    except (OSError, trio.TooSlowError, trio.BrokenResourceError) as error:
        _LOG.warning("host %s at %s cannot be reached: %s", host.id, host.url, error or "it does not answer")
        raise StatedError("the host that has this execution cannot be reached now; try again", 503) from None


def _have_noticed(stream: trio.SocketStream) -> None:
    """Have the kernel notice that the other end is gone without a word."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _SILENT:
        stream.setsockopt(socket.IPPROTO_TCP, option, value)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNSENT_MS)


def _unknown(host: Host, why: str) -> StatedError:
    _LOG.warning("host %s at %s did not answer a forwarded request: %s", host.id, host.url, why)
    return StatedError(
        "the host that has this execution did not answer; whether it was done is not known", 502
    )


def _unproven(host: Host, status: int) -> StatedError:
    _LOG.warning(
        "what answers %d at %s does not prove that it is host %s of this cluster: "
        "the cluster secrets differ, or it has refused us, and its log says why",
        status,
        host.url,
        host.id,
    )
    return StatedError("the host that has this execution cannot be trusted now; try again", 503)
