"""Who made a request: FUSE tells a thread's number, people know processes.

Reads ``comm`` and ``status`` only: what else /proc has of a process may wait for its memory to be unlocked,
and so for a page that it is waiting for here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

_FRESH_S = 0.5
"""A program that has just been started still has the name of the one that started it."""
_MOST_KNOWN = 1000


class Process(NamedTuple):
    """``pid`` is the process's, 0 when it is none of this namespace; ``name`` is empty when it is gone."""

    pid: int
    name: str


class Processes:
    """Remembers for a moment what was found."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[int, tuple[float, Process]] = {}

    def of(self, thread: int) -> Process:
        """The process of a thread, by its number."""
        now = self._clock()
        known = self._known.get(thread)
        if known is not None and now - known[0] < _FRESH_S:
            return known[1]
        found = _look(thread)
        if not found.name and known is not None:
            found = known[1]  # it is gone, and was here a moment ago
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[thread] = (now, found)
        return found


def _look(thread: int) -> Process:
    if thread <= 0:
        return Process(0, "")
    try:
        with open(f"/proc/{thread}/status", encoding="utf-8", errors="replace") as file:
            fields = dict(line.rstrip("\n").partition(":\t")[::2] for line in file)
        return Process(int(fields["Tgid"]), fields["Name"])
    except (OSError, KeyError, ValueError):
        return Process(thread, "")
