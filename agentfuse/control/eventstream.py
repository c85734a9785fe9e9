"""How events travel over HTTP: their two forms, NDJSON and SSE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class EventLine(Protocol):
    """One event; ``text`` is its JSON, in ASCII, without an end of line."""

    @property
    def seq(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> bytes: ...


def as_ndjson(events: Sequence[EventLine]) -> bytes:
    """One line each; an empty line when there is nothing."""
    return b"".join(event.text + b"\n" for event in events) or b"\n"


def as_sse(events: Sequence[EventLine]) -> bytes:
    """Server-sent events with ids, for clients that come back; a comment when there is nothing."""
    form = b"id: %d\nevent: %s\ndata: %s\n\n"
    return b"".join(form % (event.seq, event.kind.encode(), event.text) for event in events) or b": \n\n"
