"""Asks a mount's daemon over its control socket: blocking, and the same for trio and asyncio."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import anyio
import h11
import httpx
from anyio.abc import ByteReceiveStream

from agentfuse.control import asks
from agentfuse.control.asks import ANSWER_DEADLINE_S, BASE_URL, Ask, Content
from agentfuse.control.registry import socket_address
from agentfuse.errors import BusyError

OVERTIME_S = 15.0
"""A daemon that was given a time ends soon after it: a request to the store may be under way then."""

# verify=False: there is no TLS on a Unix socket, and to read all certificates for nothing takes some 20 ms.
_T = TypeVar("_T")


class ControlClient:
    """A mount's operations, by its control socket. Every error is an AgentfuseError.

    A socket without a daemon is NotFoundError; a daemon silent for ``deadline_s`` is BusyError.
    """

    def __init__(self, socket_path: Path, *, deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self._path = socket_path
        self._deadline_s = deadline_s

    def ask(self, ask: Ask[_T]) -> _T:
        """Ask for one JSON object."""
        with self.opened(ask) as response:
            return ask.understood(response.read())

    def status(self) -> dict[str, Any]:
        """The mount as the daemon describes it."""
        return self.ask(Ask("GET", "/v1/status", dict[str, Any]))

    def dump(self) -> str:
        """What the daemon's threads and tasks do."""
        with self.opened(asks.dump()) as response:
            return response.read().decode("utf-8", "replace")

    def put(self, ask: Ask[_T], content: Iterable[bytes], size: int | None) -> _T:
        """Ask for something that a content goes along with; ``size``: its length, if that is known."""
        with self.opened(ask, content=content, size=size) as response:
            return ask.understood(response.read())

    @contextmanager
    def content(self, ask: Ask[bytes]) -> Iterator[Content[Iterator[bytes]]]:
        """A content in pieces. ``BusyError`` when it ends too early."""
        with self.opened(ask) as response:
            yield asks.content_of(response, self._pieces(response))

    def _pieces(self, response: httpx.Response) -> Iterator[bytes]:
        with asks.whole_content(), asks.map_httpx(self._path):
            yield from response.iter_raw()

    def metrics(self) -> str:
        """What the mount counts, in Prometheus' text format."""
        with self.opened(asks.metrics()) as response:
            return response.read().decode()

    def trace(
        self,
        *,
        operations: Iterable[str] = (),
        path: str | None = None,
        pid: int | None = None,
        region: str | None = None,
        errors: bool = False,
        for_s: float | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Requests of the kernel as they happen, from the first, empty one on; empty ones are heartbeats."""
        ask = asks.trace(operations=operations, path=path, pid=pid, region=region, errors=errors, for_s=for_s)
        return self._lines(ask)

    def watch(self, *, interval_s: float, frames: int | None = None) -> Iterator[dict[str, Any]]:
        """What happened in each interval: {"activity": ..., "status": ..., "events": [...]}."""
        return self._lines(asks.watch(interval_s, frames))

    def _lines(self, ask: Ask[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        with self.opened(ask) as response:
            for text in response.iter_lines():
                yield asks.line_of(text)

    def events(
        self, *, since: int | None = None, region: str | None = None, follow: bool = False
    ) -> Generator[dict[str, Any], None, None]:
        """Events numbered higher than ``since``, or all; with ``follow`` those to come, to the mount's end.

        An empty one says that this was all for now; it comes every few seconds while nothing else does.
        """
        with self.opened(asks.events(since=since, region=region, follow=follow)) as response:
            for text in response.iter_lines():
                yield asks.line_of(text)

    def check(self) -> dict[str, Any]:
        """Whether the home is sound: ``{execution, regions, events, problems, notes}``."""
        return self.ask(asks.check())

    def sync(self, *, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Have everything closed so far brought into the store; yields as :meth:`unmount` does.

        Raises UnflushedError when that takes the daemon longer than ``timeout_s``.
        """
        return self._follow(asks.sync(timeout_s), "the sync", timeout_s)

    def drain(self, *, timeout_s: float | None = None, hold_s: float) -> Iterator[dict[str, Any]]:
        """As :meth:`sync`, and from {"drained": ...} on nothing changes, until this is closed or ends."""
        limit_s = None if timeout_s is None else timeout_s + hold_s
        return self._follow(asks.drain(timeout_s, hold_s), "the drain", limit_s)

    def unmount(self, *, lazy: bool = False, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """End the mount; yields {"say": ...}, {"progress": ...} and at last {"done": ...}.

        ``timeout_s``: how long the daemon tries to reach the store. Raises what the daemon reports (with
        its exit code); BusyError when it has not ended OVERTIME_S after that (the unmount goes on);
        UnflushedError when the daemon ends without having said that all is durable.
        """
        return self._follow(asks.unmount(lazy=lazy, timeout_s=timeout_s), "the unmount", timeout_s)

    def _follow(
        self, ask: Ask[dict[str, Any]], what: str, timeout_s: float | None
    ) -> Iterator[dict[str, Any]]:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s + OVERTIME_S
        with self.opened(ask) as response:
            for text in response.iter_lines():
                line = asks.line_of(text)
                if line:
                    yield line
                if "done" in line:
                    return
                if time.monotonic() > deadline:
                    raise BusyError(
                        f"{what} did not end within {timeout_s:g} s",
                        hint="it goes on; ask again, or look with agentfuse ps",
                    )
        raise asks.ended_early()

    @contextmanager
    def opened(
        self,
        ask: Ask[Any],
        *,
        content: Iterable[bytes] | None = None,
        size: int | None = None,
    ) -> Iterator[httpx.Response]:
        """The answer, once it has begun and is no refusal."""
        with (
            socket_address(self._path) as address,
            httpx.Client(
                transport=httpx.HTTPTransport(uds=address, verify=False),
                base_url=BASE_URL,
                timeout=max(self._deadline_s, ask.deadline_s),
            ) as http,
            asks.map_httpx(self._path),
            http.stream(
                ask.method,
                ask.url,
                content=ask.content() if content is None else content,
                headers={**ask.headers, **_length(size)},
            ) as response,
        ):
            if not response.is_success:
                raise asks.refusal(response.status_code, response.read())
            yield response


class AsyncControlClient:
    """As ControlClient, to be awaited under trio or asyncio."""

    def __init__(self, socket_path: Path, *, deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self._path = socket_path
        self._deadline_s = deadline_s

    async def ask(self, ask: Ask[_T]) -> _T:
        """Ask for one JSON object."""
        async with self.opened(ask) as response:
            return ask.understood(await response.aread())

    async def put(self, ask: Ask[_T], content: AsyncIterable[bytes], size: int | None) -> _T:
        """As ``ControlClient.put``."""
        async with self.opened(ask, content=content, size=size) as response:
            return ask.understood(await response.aread())

    async def ask_with(self, fd: int, ask: Ask[_T]) -> _T:
        """As :meth:`ask`; a descriptor goes along, of which the daemon gets one of its own."""
        http, body = h11.Connection(h11.CLIENT), ask.content() or b""
        head = h11.Request(
            method=ask.method,
            target=ask.url,
            headers=[("Host", "agentfuse"), ("Content-Length", str(len(body))), *ask.headers.items()],
        )
        with socket_address(self._path) as address, asks.map_httpx(self._path):
            with anyio.fail_after(max(self._deadline_s, ask.deadline_s)):
                async with await anyio.connect_unix(address) as stream:
                    await stream.send_fds(http.send(head) or b"", [fd])
                    with suppress(anyio.BrokenResourceError):  # it may have answered already
                        await stream.send(
                            (http.send(h11.Data(data=body)) or b"") + (http.send(h11.EndOfMessage()) or b"")
                        )
                    status, data = await _answer(http, stream)
            if status >= 400:
                raise asks.refusal(status, data)
            return ask.understood(data)

    @asynccontextmanager
    async def content(self, ask: Ask[bytes]) -> AsyncIterator[Content[AsyncIterator[bytes]]]:
        """As ``ControlClient.content``."""
        async with self.opened(ask) as response:
            yield asks.content_of(response, self._pieces(response))

    async def _pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        with asks.whole_content(), asks.map_httpx(self._path):
            async for piece in response.aiter_raw():
                yield piece

    async def lines(self, ask: Ask[dict[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
        """An answer line by line, empty ones for heartbeats."""
        async with self.opened(ask) as response:
            async for text in response.aiter_lines():
                yield asks.line_of(text)

    @asynccontextmanager
    async def opened(
        self,
        ask: Ask[Any],
        *,
        content: AsyncIterable[bytes] | None = None,
        size: int | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """As ``ControlClient.opened``."""
        with socket_address(self._path) as address, asks.map_httpx(self._path):
            async with (
                httpx.AsyncClient(
                    transport=httpx.AsyncHTTPTransport(uds=address, verify=False),
                    base_url=BASE_URL,
                    timeout=max(self._deadline_s, ask.deadline_s),
                ) as http,
                http.stream(
                    ask.method,
                    ask.url,
                    content=ask.content() if content is None else content,
                    headers={**ask.headers, **_length(size)},
                ) as response,
            ):
                if not response.is_success:
                    raise asks.refusal(response.status_code, await response.aread())
                yield response


async def _answer(http: h11.Connection, stream: ByteReceiveStream) -> tuple[int, bytes]:
    """The status and body of an answer. Raises what :func:`asks.map_httpx` takes for one that is cut off."""
    status, body = 0, b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            try:
                http.receive_data(await stream.receive())
            except anyio.EndOfStream:
                http.receive_data(b"")
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return status, body
        else:
            raise asks.ended_early()


def _length(size: int | None) -> dict[str, str]:
    return {} if size is None else {"Content-Length": str(size)}
