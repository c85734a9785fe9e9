"""What happened and is not in the log yet, in order. Knows no filesystem, no log and no threads."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable

from agentfuse.events.arrivals import Completed, Moved, Operation, Replaced
from agentfuse.events.log import Happened

_UNCOUNTED = 20
"""For so many counts what may be a whole directory, whose files only the log knows."""


class Waiting:
    """What waits for the log, weighed by its files: what came as a tree carries each of them."""

    def __init__(self) -> None:
        self._waiting: collections.deque[Happened] = collections.deque()
        self._files = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, happened: Happened, *, most: float = math.inf) -> bool:
        """Put it at the end; False when it is not alone and there would be more files than ``most``."""
        if self._waiting and _is_same(self._waiting[-1], happened):
            self._waiting[-1] = happened
            return True
        files = _files_of(happened.operation)
        if self._waiting and self._files + files > most:
            return False
        self._waiting.append(happened)
        self._files += files
        return True

    def extend(self, some: Iterable[Happened]) -> None:
        """Put all of them at the end."""
        for happened in some:
            self.add(happened)

    def take(self, most: int) -> list[Happened]:
        """The first ones, with so many files at most; one, however many it has."""
        taken: list[Happened] = []
        files = 0
        while self._waiting:
            next_ones = _files_of(self._waiting[0].operation)
            if taken and files + next_ones > most:
                break
            taken.append(self._waiting.popleft())
            files += next_ones
        self._files -= files
        return taken

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._files = 0


def _files_of(operation: Operation) -> int:
    match operation:
        case Replaced(files=files, went=went):
            return max(len(files), _UNCOUNTED if went == "IN_MOVED_FROM" else 1)
        case Moved(seen=None):
            return _UNCOUNTED
    return 1


def _is_same(before: Happened, after: Happened) -> bool:
    """Whether the same file was completed twice in a row: as inotify does, that is told once."""
    one, two = before.operation, after.operation
    return (
        before.region == after.region
        and isinstance(one, Completed)
        and isinstance(two, Completed)
        and (one.path, one.how) == (two.path, two.how)
    )
