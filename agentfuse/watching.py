"""What a mount does, summed up over short intervals while somebody looks: for ``agentfuse watch``."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import AsyncGenerator, Callable
from typing import Any

import trio

from agentfuse.fuse.tracing import Traced, Tracer
from agentfuse.processes import Process

_HOTTEST = 10
_MOST_NAMES = 10_000
"""Names told apart in an interval; what comes after so many counts for the operations only."""
_FINE_BITS = 2
"""So many bits after the first tell durations apart: to a quarter of a power of two."""


class Summary:
    """Requests of one interval."""

    def __init__(self) -> None:
        self._operations: dict[str, _Share] = {}
        self._files: dict[str, _Share] = {}
        self._processes: dict[Process, _Share] = {}

    def hear(self, traced: Traced) -> None:
        """Add a request."""
        _share(self._operations, traced.operation).add(traced)
        if traced.path is not None and (traced.path in self._files or len(self._files) < _MOST_NAMES):
            _share(self._files, traced.path).add(traced)
        process = traced.process
        if process.pid and (process in self._processes or len(self._processes) < _MOST_NAMES):
            _share(self._processes, process).add(traced)

    def as_dict(self, interval_s: float) -> dict[str, object]:
        """``{interval_s, requests_per_s, errors_per_s, p50_us, p99_us, operations, files, processes}``."""
        everything = _Share()
        for each in self._operations.values():
            everything.merge(each)
        return {
            "interval_s": round(interval_s, 3),
            **everything.as_dict(interval_s),
            "operations": [
                {"operation": name, **share.as_dict(interval_s)}
                for name, share in sorted(self._operations.items(), key=lambda item: -item[1].requests)
            ],
            "files": [{"path": path, **share.as_dict(interval_s)} for path, share in _hottest(self._files)],
            "processes": [
                {"pid": process.pid, "process": process.name, **share.as_dict(interval_s)}
                for process, share in _hottest(self._processes)
            ],
        }


class _Share:
    """What falls to one operation, file or process."""

    __slots__ = ("durations", "errors", "read_bytes", "requests", "written_bytes")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.read_bytes = 0
        self.written_bytes = 0
        self.durations: dict[int, int] = {}

    def add(self, traced: Traced) -> None:
        """Count a request."""
        self.requests += 1
        if traced.errno:  # to look for a name in vain is how programs find out that there is none
            self.errors += (traced.operation, traced.errno) != ("lookup", errno.ENOENT)
        elif traced.operation == "read":
            self.read_bytes += traced.size or 0
        elif traced.operation == "write":
            self.written_bytes += traced.size or 0
        step = _step_of(traced.spent_ns)
        self.durations[step] = self.durations.get(step, 0) + 1

    def merge(self, other: _Share) -> None:
        """Count another's requests, too."""
        self.requests += other.requests
        self.errors += other.errors
        self.read_bytes += other.read_bytes
        self.written_bytes += other.written_bytes
        for step, number in other.durations.items():
            self.durations[step] = self.durations.get(step, 0) + number

    def as_dict(self, interval_s: float) -> dict[str, object]:
        """The rates, and how long the request in the middle took, and that which is slower than 99 of 100."""
        return {
            "requests_per_s": round(self.requests / interval_s, 1),
            "errors_per_s": round(self.errors / interval_s, 1),
            "read_bytes_per_s": round(self.read_bytes / interval_s),
            "written_bytes_per_s": round(self.written_bytes / interval_s),
            "p50_us": self._percentile_us(0.5),
            "p99_us": self._percentile_us(0.99),
        }

    def _percentile_us(self, share: float) -> float | None:
        left = math.ceil(self.requests * share)
        for step in sorted(self.durations):
            left -= self.durations[step]
            if left <= 0:
                return round(_ns_of(step) / 1000, 1)
        return None


def _share(shares: dict[Any, _Share], key: object) -> _Share:
    found = shares.get(key)
    if found is None:
        found = shares[key] = _Share()
    return found


def _hottest(shares: dict[Any, _Share]) -> list[tuple[Any, _Share]]:
    return sorted(shares.items(), key=lambda item: -item[1].requests)[:_HOTTEST]


def _step_of(spent_ns: int) -> int:
    """The step that a duration is in; larger for longer ones."""
    bits = max(spent_ns.bit_length(), _FINE_BITS + 1)
    return (bits << _FINE_BITS) | ((spent_ns >> (bits - 1 - _FINE_BITS)) & ((1 << _FINE_BITS) - 1))


def _ns_of(step: int) -> int:
    """The end of a step."""
    bits, part = step >> _FINE_BITS, step & ((1 << _FINE_BITS) - 1)
    return ((1 << _FINE_BITS) + part + 1) << (bits - 1 - _FINE_BITS)


async def watch(
    tracer: Tracer,
    now: Callable[[], dict[str, object]],
    *,
    interval_s: float,
    frames: int | None,
    ended: trio.Event,
) -> AsyncGenerator[dict[str, object], None]:
    """For each of so many intervals a summary, as ``activity``, and what is so at its end.

    The interval in which the mount ended is the last one.
    """
    summary = Summary()

    def hear(traced: Traced) -> None:
        summary.hear(traced)

    with tracer.listening(hear):
        begun = trio.current_time()
        for _ in itertools.count() if frames is None else range(frames):
            if ended.is_set():
                return
            with trio.move_on_after(interval_s):
                await ended.wait()
            done, summary, until = summary, Summary(), trio.current_time()
            yield {"activity": done.as_dict(until - begun), **now()}
            begun = until
