"""What can be asked of a mount: each route with its method, path, typed request and answer.

A route knows neither sockets nor FUSE: it turns a typed call into one on a MountControl, and what that
says into a Reply.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec

from agentfuse.control.eventstream import EventLine, as_ndjson, as_sse
from agentfuse.control.messages import AnyQuery, EventsQuery, Nothing, SyncRequest, UnmountRequest
from agentfuse.control.transport import RequestError

DEFAULT_SYNC_S = 60.0
"""How long a sync may take when its client does not say."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Lines = AsyncGenerator[dict[str, object], None]
Events = AsyncGenerator[Sequence[EventLine], None]
_Q = TypeVar("_Q", bound=msgspec.Struct)
_B = TypeVar("_B", bound=msgspec.Struct)


class MountControl(Protocol):
    """What a mount lets its operators do."""

    def status(self) -> dict[str, object]:
        """The mount as JSON values; quick, without I/O."""

    async def metrics(self) -> bytes:
        """What is counted, in Prometheus' text format."""

    def events(self, *, since: int | None, region: str | None, follow: bool) -> Events:
        """Events numbered higher than ``since``, as they come; an empty list while there are none.

        An AgentfuseError that comes before the first list is the answer; later it ends the answer.
        """

    async def check(self) -> dict[str, object]:
        """Whether the home is sound, as JSON values; see ``inspection.HomeReport``."""

    def sync(self, *, timeout_s: float) -> Lines:
        """Wait until everything that was closed before is in the store, or raise after ``timeout_s``."""

    def unmount(self, *, lazy: bool, timeout_s: float | None) -> Lines:
        """End the mount and tell how it goes, in the objects of the NDJSON answer.

        The generator only watches: the work belongs to the daemon and goes on when the generator is
        closed early. It is not closed because a client left. An AgentfuseError that it raises
        becomes the last line.
        """


@dataclass(frozen=True, slots=True)
class Call(Generic[_Q, _B]):
    """A request as its route gets it. Header names are lower-case."""

    query: _Q
    body: _B
    headers: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """One JSON object."""

    value: dict[str, object]


@dataclass(frozen=True, slots=True)
class Watched:
    """Work that goes on though nobody listens, and the lines that it is told in."""

    lines: Lines


@dataclass(frozen=True, slots=True)
class Streamed:
    """Bytes as they come. What fails before the first of them is the answer; later it cuts the answer off."""

    content_type: str
    chunks: AsyncGenerator[bytes, None]


Reply = Answer | Watched | Streamed


@dataclass(frozen=True, slots=True)
class Route(Generic[_Q, _B]):
    """One method of one path. The docstring of ``handler`` is its description."""

    method: str
    path: str
    handler: Callable[[MountControl, Call[_Q, _B]], Awaitable[Reply]]
    query: type[_Q]
    body: type[_B]

    def call(self, target: bytes, body: bytes, headers: Mapping[bytes, bytes]) -> Call[_Q, _B]:
        """The request, typed. Raises ``RequestError`` for one that is not understood."""
        return Call(_parse_query(target, headers, self.query), _parse_body(body, self.body), headers)


async def _status(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """The mount: what it is, its regions, what is synced, how it is used."""
    return Answer(control.status())


async def _metrics(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """Everything that is counted, in Prometheus' text format; docs/operate.md has the names."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield await control.metrics()

    return Streamed(METRICS_TYPE, chunks())


async def _events(control: MountControl, call: Call[EventsQuery, Nothing]) -> Reply:
    """Events as NDJSON, or as SSE for who accepts text/event-stream.

    All that are kept without ``since``; only those that there are without ``follow``.
    """
    is_sse = b"text/event-stream" in call.headers.get(b"accept", b"")
    encode = as_sse if is_sse else as_ndjson
    asked = call.query
    lines = control.events(since=asked.since, region=asked.region, follow=asked.follow)

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with aclosing(lines):
            async for some in lines:
                yield encode(some)

    return Streamed("text/event-stream" if is_sse else "application/x-ndjson", chunks())


async def _check(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """Whether the home is sound. Whoever wants to change something in it waits meanwhile."""
    return Answer(await control.check())


async def _sync(control: MountControl, call: Call[AnyQuery, SyncRequest]) -> Reply:
    """Return when everything that was closed before is in a snapshot."""
    timeout_s = DEFAULT_SYNC_S if call.body.timeout_s is None else call.body.timeout_s
    return Watched(control.sync(timeout_s=timeout_s))


async def _unmount(control: MountControl, call: Call[AnyQuery, UnmountRequest]) -> Reply:
    """End the mount and bring everything into the store."""
    return Watched(control.unmount(lazy=call.body.lazy, timeout_s=call.body.timeout_s))


ROUTES: tuple[Route[Any, Any], ...] = (
    Route("GET", "/v1/status", _status, AnyQuery, Nothing),
    Route("GET", "/v1/metrics", _metrics, AnyQuery, Nothing),
    Route("GET", "/v1/events", _events, EventsQuery, Nothing),
    Route("POST", "/v1/check", _check, AnyQuery, Nothing),
    Route("POST", "/v1/sync", _sync, AnyQuery, SyncRequest),
    Route("POST", "/v1/unmount", _unmount, AnyQuery, UnmountRequest),
)


def find(method: bytes, target: bytes) -> Route[Any, Any]:
    """The route of a request. Raises ``RequestError``."""
    path = target.partition(b"?")[0].decode("ascii", "replace")
    here = [route for route in ROUTES if route.path == path]
    if not here:
        there_are = ", ".join(f"{route.method} {route.path}" for route in ROUTES)
        raise RequestError(404, "no such path", code="not_found", hint=f"there are {there_are}")
    for route in here:
        if route.method == method.decode("ascii", "replace"):
            return route
    allowed = ", ".join(route.method for route in here)
    raise RequestError(
        405, f"this path takes {allowed} only", code="method_not_allowed", headers=[("Allow", allowed)]
    )


def _parse_query(target: bytes, headers: Mapping[bytes, bytes], shape: type[_Q]) -> _Q:
    text = target.partition(b"?")[2].decode("ascii", "replace")
    fields = dict(parse_qsl(text, keep_blank_values=True))
    if b"last-event-id" in headers:  # a browser that comes back to a stream of events tells where it was
        fields["since"] = headers[b"last-event-id"].decode("ascii", "replace")
    try:
        return msgspec.convert(fields, shape, strict=False)
    except msgspec.ValidationError as error:
        names = "&".join(f"{field.encode_name}=..." for field in msgspec.structs.fields(shape))
        raise RequestError(400, f"the query is not understood: {error}", hint=f"it takes ?{names}") from None


def _parse_body(body: bytes, shape: type[_Q]) -> _Q:
    try:
        return msgspec.json.decode(body or b"{}", type=shape)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(
            400, f"the body is not understood: {error}", hint='send JSON like {"timeout_s": 60}'
        ) from None
