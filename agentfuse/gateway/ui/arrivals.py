"""What happens in a home, as it happens: server-sent events that a page shows.

``arrival`` is one event of the home (the id is its number, with which a browser resumes), ``state`` is parts
of the page that look otherwise now, ``end``: the page is to be loaded again.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agentfuse.client import Event
from agentfuse.errors import AgentfuseError
from agentfuse.gateway.edge import StatedError
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.ui.actions import address
from agentfuse.home.walk import join
from agentfuse.regions import Creator

_STATE_S = 2.0
_LONGEST_S = 15 * 60.0
"""After that the browser comes again, and shows that its session is still good."""

_MAX_STREAMS = 128

_AGAIN_S = 1.0

Follow = Callable[[int], AsyncGenerator[Event, None]]
"""The events numbered higher, and those to come."""

State = Callable[[], Awaitable[dict[str, str] | None]]
"""Parts of the page, by their ids; None when all of it is another one now."""

Told = Callable[[Event], tuple[str, str]]
"""A row of the table, and what a screen reader says."""


class Ticker:
    """Counts streams, and ends them when the gateway does."""

    def __init__(self, closing: trio.Event) -> None:
        self.closing = closing
        self.streams = 0


class ArrivalStream(Response):
    """One page that listens. Raises ``StatedError`` 503 when too many do."""

    def __init__(self, ticker: Ticker, follow: Follow, since: int, state: State, told: Told) -> None:
        if ticker.streams >= _MAX_STREAMS:
            raise StatedError("too many pages are listening; reload this one to see what is new", 503)
        self.status_code = 200
        self.background = None
        self.init_headers(
            {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._ticker = ticker
        self._follow = follow
        self._since = since
        self._state = state
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._ticker.streams += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with trio.move_on_after(_LONGEST_S):
                async with trio.open_nursery() as nursery:
                    sending = _Sending(send)
                    nursery.start_soon(self._until_gone, receive, nursery.cancel_scope)
                    nursery.start_soon(self._until_closing, nursery.cancel_scope)
                    nursery.start_soon(self._tell_events, sending)
                    await self._tell_state(sending)
                    nursery.cancel_scope.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._ticker.streams -= 1

    async def _until_gone(self, receive: Receive, stream: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.cancel()

    async def _until_closing(self, stream: trio.CancelScope) -> None:
        await self._ticker.closing.wait()
        stream.cancel()

    async def _tell_events(self, sending: _Sending) -> None:
        while True:
            try:
                async with aclosing(self._follow(self._since)) as events:
                    async for event in events:
                        row, text = self._told(event)
                        await sending.send("arrival", {"row": row, "text": text}, number=event.seq)
                        self._since = event.seq
            except AgentfuseError:
                pass  # the home is not mounted yet, or no more, or its daemon is restarted
            await trio.sleep(_AGAIN_S)

    async def _tell_state(self, sending: _Sending) -> None:
        """Until the page is another one."""
        shown: dict[str, str] = {}
        while True:
            try:
                parts = await self._state()
            except AgentfuseError:
                return  # the browser asks again
            if parts is None:
                await sending.send("end", {})
                return
            news = {part: html for part, html in parts.items() if shown.get(part) != html}
            await sending.send("state", news)  # also when there is none: proxies cut what is silent
            shown = parts
            await trio.sleep(_STATE_S)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What happened to a file; ``href`` is empty where it is no more."""

    seq: int
    verb: str
    region: str
    path: bytes
    old_path: bytes
    href: str
    size: int
    at: float
    created_by: Creator


_VERBS = {
    "arrived": "New",
    "modified": "Changed",
    "moved": "Moved",
    "deleted": "Removed",
    "refused": "Refused",
}


def arrival(execution: Execution, event: Event) -> Arrival:
    """An event as it is shown."""
    path = os.fsencode(event.path)
    is_there = event.kind not in ("deleted", "refused")
    href = address(execution, "/files", join(os.fsencode(event.region), path)) if is_there else ""
    old = os.fsencode(event.old_path or "")
    verb = _VERBS[event.kind]
    return Arrival(event.seq, verb, event.region, path, old, href, event.size, event.time, event.created_by)


class _Sending:
    """One event after the other."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = trio.Lock()

    async def send(self, kind: str, data: dict[str, str], *, number: int | None = None) -> None:
        lines = f"id: {number}\n" if number is not None else ""
        text = f"{lines}event: {kind}\ndata: {json.dumps(data)}\n\n"
        async with self._lock:
            await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})
