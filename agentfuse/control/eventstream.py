"""How events travel over HTTP: what may be asked of them, and their two forms, NDJSON and SSE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol
from urllib.parse import parse_qsl

import msgspec

from agentfuse.errors import UsageError


class EventLine(Protocol):
    """One event; ``text`` is its JSON, in ASCII, without an end of line."""

    @property
    def seq(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> bytes: ...


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """Which events are wanted; see the server's description of ``/v1/events``."""

    since: Annotated[int, msgspec.Meta(ge=0)] | None = None
    region: str | None = None
    follow: bool = False


def parse_query(target: bytes, last_event_id: bytes) -> Asked:
    """What is asked of the events; a browser that comes back tells where it was in a header.

    Raises ``UsageError``.
    """
    query = target.partition(b"?")[2].decode("ascii", "replace")
    fields = dict(parse_qsl(query, keep_blank_values=True))
    if last_event_id:
        fields["since"] = last_event_id.decode("ascii", "replace")
    try:
        return msgspec.convert(fields, Asked, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"the query is not understood: {error}", hint="write it like ?since=7&follow=1"
        ) from None


def as_ndjson(events: Sequence[EventLine]) -> bytes:
    """One line each; an empty line when there is nothing."""
    return b"".join(event.text + b"\n" for event in events) or b"\n"


def as_sse(events: Sequence[EventLine]) -> bytes:
    """Server-sent events with ids, for clients that come back; a comment when there is nothing."""
    form = b"id: %d\nevent: %s\ndata: %s\n\n"
    return b"".join(form % (event.seq, event.kind.encode(), event.text) for event in events) or b": \n\n"
