"""Requests as they happen, for whoever follows them: filtered where they happen, so that what nobody wants
costs little, and kept only as long as a reader is quick.
"""

from __future__ import annotations

import collections
import fnmatch
import math
import re
from collections.abc import AsyncGenerator

import trio

from agentfuse.control.contract import Wanted
from agentfuse.errors import UsageError
from agentfuse.fuse.tracing import TRACED, Traced, Tracer

HEARTBEAT_S = 1.0
_MOST_WAITING = 8192
_BATCH = 512


async def trace(
    tracer: Tracer, wanted: Wanted, *, for_s: float | None, ended: trio.Event
) -> AsyncGenerator[list[dict[str, object]], None]:
    """Requests as JSON values, for so long or until the mount has ended; an empty list while there are none.

    What a reader is too slow for is lost, and counted in a value ``{"lost": n}`` where it would have been.
    Raises ``UsageError``.
    """
    if unknown := wanted.operations - set(TRACED):
        raise UsageError(f"no operation {min(unknown)!r} is traced", hint=f"there are {', '.join(TRACED)}")
    reader = _Reader(wanted)
    until = math.inf if for_s is None else trio.current_time() + for_s
    with tracer.listening(reader.hear):
        yield []  # from now on
        while (now := trio.current_time()) < until and not ended.is_set():
            with trio.move_on_at(min(until, now + HEARTBEAT_S)):
                await reader.heard.wait()
            yield reader.take()
    while rest := reader.take():
        yield rest


class _Reader:
    def __init__(self, wanted: Wanted) -> None:
        self.heard = trio.Event()
        self._wanted = wanted
        self._glob = re.compile(fnmatch.translate(wanted.path)) if wanted.path is not None else None
        self._queue: collections.deque[Traced] = collections.deque()
        self._lost = 0

    def hear(self, traced: Traced) -> None:
        """Keep it, if it is wanted and there is room."""
        if not self._is_wanted(traced):
            return
        if len(self._queue) < _MOST_WAITING:
            self._queue.append(traced)
        else:
            self._lost += 1
        self.heard.set()

    def take(self) -> list[dict[str, object]]:
        """Some of what is there, in order."""
        some = [self._queue.popleft().as_dict() for _ in range(min(_BATCH, len(self._queue)))]
        if not self._queue:
            self.heard = trio.Event()
            if self._lost:
                some.append({"lost": self._lost})
                self._lost = 0
        return some

    def _is_wanted(self, traced: Traced) -> bool:
        wanted = self._wanted
        return (
            (not wanted.operations or traced.operation in wanted.operations)
            and (wanted.pid is None or traced.process.pid == wanted.pid)
            and (wanted.region is None or traced.region == wanted.region)
            and (not wanted.errors or traced.errno != 0)
            and (
                self._glob is None
                or any(p is not None and self._glob.match(p) for p in (traced.path, traced.to))
            )
        )
