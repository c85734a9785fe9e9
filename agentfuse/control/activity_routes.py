"""The routes of what a mount does at this moment: each request of the kernel, or intervals summed up."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from agentfuse.control.contract import MountControl, Wanted
from agentfuse.control.feeds import encode
from agentfuse.control.messages import Frame, Nothing, TracedRequest, TraceQuery, WatchQuery
from agentfuse.control.route import AnyRoute, Call, Media, Reply, Route, Streamed

_NDJSON = "application/x-ndjson"


async def _trace(control: MountControl, call: Call[TraceQuery, Nothing]) -> Reply:
    """Requests of the kernel as they happen, one a line, for ``for_s`` or until the client leaves.

    Empty lines are heartbeats; ``{"lost": n}`` stands for requests that came faster than they were read.
    """
    asked = call.query
    operations = frozenset(name for name in asked.op.split(",") if name)
    wanted = Wanted(operations, asked.path, asked.pid, asked.region, asked.errors)
    found = control.trace(wanted, for_s=asked.for_s)

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with aclosing(found):
            async for some in found:
                yield b"".join(encode(line) + b"\n" for line in some) or b"\n"

    return Streamed(_NDJSON, chunks())


async def _watch(control: MountControl, call: Call[WatchQuery, Nothing]) -> Reply:
    """What happened in each interval, with the status and the last events."""
    frames = control.watch(interval_s=call.query.interval_s, frames=call.query.frames)

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with aclosing(frames):
            async for frame in frames:
                yield encode(frame) + b"\n"

    return Streamed(_NDJSON, chunks())


ROUTES: tuple[AnyRoute, ...] = (
    Route("GET", "/v1/trace", _trace, Media((_NDJSON,), TracedRequest), query=TraceQuery, follows=True),
    Route("GET", "/v1/watch", _watch, Media((_NDJSON,), Frame), query=WatchQuery, follows=True),
)
