"""The routes of the mount as a whole: how it is, its regions, its events, its way into the store, its end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from agentfuse.control.contract import Lines, MountControl
from agentfuse.control.eventstream import as_ndjson, as_sse
from agentfuse.control.feeds import encode, error_line
from agentfuse.control.messages import (
    AnyQuery,
    Checkpoint,
    DrainRequest,
    Event,
    EventsQuery,
    HomeReport,
    Line,
    LogLevel,
    Nothing,
    QuotaChange,
    RegionInfo,
    Regions,
    Status,
    SyncRequest,
    UnmountRequest,
)
from agentfuse.control.route import Answer, AnyRoute, Call, Media, Reply, Route, Streamed, Watched
from agentfuse.errors import AgentfuseError, NotFoundError, UsageError

DEFAULT_SYNC_S = 60.0
"""How long a sync may take when its client does not say."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NDJSON = "application/x-ndjson"
_SSE = "text/event-stream"
_LINES = Media((_NDJSON,), Line)


async def _status(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """The mount: what it is, its regions, what is synced, how it is used."""
    return Answer(control.status())


async def _metrics(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """Everything that is counted, in Prometheus' text format; docs/operate.md has the names."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield await control.metrics()

    return Streamed(METRICS_TYPE, chunks())


async def _check(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """Whether the home is sound. Whoever wants to change something in it waits meanwhile."""
    return Answer(await control.check())


async def _regions(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """The regions: their settings, their quotas, what they hold."""
    return Answer({"regions": control.regions()})


async def _set_quota(control: MountControl, call: Call[AnyQuery, QuotaChange]) -> Reply:
    """Change a region's quotas at once, for this execution, its later mounts on this host included.

    A quota below what is held is allowed: nothing more fits then.
    """
    change = call.body
    if change.bytes_quota is None and change.files_quota is None:
        raise UsageError("no quota is given", hint='send {"bytes_quota": ...} or {"files_quota": ...}')
    await control.set_quota(call.region, bytes_quota=change.bytes_quota, files_quota=change.files_quota)
    for region in control.regions():
        if region["name"] == call.region:
            return Answer(region)
    raise NotFoundError(f"there is no region {call.region!r}")


async def _events(control: MountControl, call: Call[EventsQuery, Nothing]) -> Reply:
    """Events as NDJSON, or as SSE for who accepts text/event-stream.

    All that are kept without ``since``; only those that there are without ``follow``.
    """
    is_sse = _SSE.encode() in call.headers.get(b"accept", b"")
    form = as_sse if is_sse else as_ndjson
    asked = call.query
    lines = control.events(since=asked.since, region=asked.region, follow=asked.follow)

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with aclosing(lines):
            async for some in lines:
                yield form(some)

    return Streamed(_SSE if is_sse else _NDJSON, chunks())


async def _checkpoint(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """Begin to commit what is changed, without waiting for it: /v1/sync does that."""
    return Answer({"regions": control.checkpoint()}, status=202)


async def _sync(control: MountControl, call: Call[AnyQuery, SyncRequest]) -> Reply:
    """Return when everything that was closed before is in a snapshot."""
    return Watched(control.sync(timeout_s=_patience_s(call.body.timeout_s)))


async def _drain(control: MountControl, call: Call[AnyQuery, DrainRequest]) -> Reply:
    """Bring everything into the store, then let nothing change, so that what is there stays all there is.

    The line ``drained`` says that it is so. Who writes waits until ``hold_s`` is over or the client has
    left, whichever is first; then all goes on.
    """
    lines = control.drain(timeout_s=_patience_s(call.body.timeout_s), hold_s=call.body.hold_s)
    return Streamed(_NDJSON, _told(lines))


async def _unmount(control: MountControl, call: Call[AnyQuery, UnmountRequest]) -> Reply:
    """End the mount and bring everything into the store."""
    return Watched(control.unmount(lazy=call.body.lazy, timeout_s=call.body.timeout_s))


async def _set_log_level(control: MountControl, call: Call[AnyQuery, LogLevel]) -> Reply:
    """From which level on the daemon logs, until it ends."""
    control.set_log_level(call.body.level)
    return Answer(call.body)


async def _dump(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """What every thread and task of the daemon does, as text. For one that hangs: ``agentfuse dump``."""
    text = control.dump().encode("utf-8", "backslashreplace")

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield text

    return Streamed("text/plain; charset=utf-8", chunks())


async def _told(lines: Lines) -> AsyncGenerator[bytes, None]:
    """Lines as they come; an error after the first of them is the last."""
    has_begun = False
    async with aclosing(lines):
        try:
            async for line in lines:
                yield encode(line) + b"\n" if line else b"\n"
                has_begun = True
        except AgentfuseError as error:
            if not has_begun:
                raise
            yield encode(error_line(error.message, error.hint, error.exit_code)) + b"\n"


def _patience_s(asked_s: float | None) -> float:
    return DEFAULT_SYNC_S if asked_s is None else asked_s


ROUTES: tuple[AnyRoute, ...] = (
    Route("GET", "/v1/status", _status, Status),
    Route("GET", "/v1/metrics", _metrics, Media(("text/plain",))),
    Route("POST", "/v1/check", _check, HomeReport),
    Route("GET", "/v1/regions", _regions, Regions),
    Route("PATCH", "/v1/regions/{region}", _set_quota, RegionInfo, body=QuotaChange),
    Route("GET", "/v1/events", _events, Media((_NDJSON, _SSE), Event), query=EventsQuery, follows=True),
    Route("POST", "/v1/checkpoint", _checkpoint, Checkpoint, status=202),
    Route("POST", "/v1/sync", _sync, _LINES, body=SyncRequest),
    Route("POST", "/v1/drain", _drain, _LINES, body=DrainRequest),
    Route("POST", "/v1/unmount", _unmount, _LINES, body=UnmountRequest),
    Route("PUT", "/v1/log-level", _set_log_level, LogLevel, body=LogLevel),
    Route("GET", "/v1/dump", _dump, Media(("text/plain",))),
)
