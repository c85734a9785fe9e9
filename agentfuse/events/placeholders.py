"""Empty new files, held back for a moment before they are told of.

A browser (Firefox) makes an empty file under the final name, writes beside it, and renames over it. So
an empty file waits until it gets a content, is replaced or removed, or nothing of that happens for a
while. What is held is only in memory: after a crash the files that were not told of are found anyway.
The trio thread's.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import trio

from agentfuse.errors import BusyError
from agentfuse.events.arrivals import DOWNLOAD_SUFFIXES, Completed, Moved, Replaced, Touched, is_temporary
from agentfuse.events.log import Happened
from agentfuse.home.walk import Cursor

HELD_S = 1.0
"""So long an empty file waits, and then again for as long as it looks like a download's."""
_MOST = 256
"""More at once are no browser's, and are told of without delay."""
_STALLED_S = 30.0
"""A download's temporary that nobody has written to for so long keeps no placeholder back any more."""

_Key = tuple[str, bytes]


class _Held(NamedTuple):
    due: float
    happened: Happened
    operation: Completed


class Placeholders:
    """The empty files that nobody was told of yet. ``tree``: where the regions' directories are."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._held: dict[_Key, _Held] = {}  # the first due first
        self._limiter = trio.CapacityLimiter(1)

    def __bool__(self) -> bool:
        return bool(self._held)

    @property
    def next_due(self) -> float:
        """When ``ripe`` may have something, by trio's clock; infinity when nothing is held."""
        return next(iter(self._held.values())).due if self._held else math.inf

    def hold(self, happened: Happened) -> bool:
        """Hold it back if it is the completion of an empty file, and say whether it was."""
        operation = happened.operation
        if not isinstance(operation, Completed) or operation.seen.size or is_temporary(operation.path):
            return False
        key = (happened.region, operation.path)
        before = self._held.get(key)
        if before is None and len(self._held) >= _MOST:
            return False
        # Who empties it again and again does not put it off for ever.
        due = before.due if before is not None else trio.current_time() + HELD_S
        self._held[key] = _Held(due, happened, operation)
        return True

    def note(self, happened: Happened) -> list[Happened]:
        """Something happened: forget what is overtaken by it; return what must be told of before it."""
        region, _, operation = happened
        match operation:
            case Completed(path, seen):
                if seen.size:
                    self._held.pop((region, path), None)
            case Touched(path, seen):
                held = self._held.get((region, path))
                if held is not None:
                    same = held.operation._replace(seen=seen)
                    self._held[region, path] = _Held(held.due, held.happened._replace(operation=same), same)
            case Replaced(path):
                self._take_below(region, path)
            case Moved(old, new):
                self._take_below(region, new)
                return self._take_below(region, old)
        return []

    def paths(self) -> set[tuple[str, bytes]]:
        """What is held: (region, path) of each."""
        return set(self._held)

    def take_all(self) -> list[Happened]:
        """Everything, to be told of now."""
        held = [each.happened for each in self._held.values()]
        self._held.clear()
        return held

    async def ripe(self) -> list[Happened]:
        """What has waited long enough and does not look like a download's; the rest waits on."""
        now = trio.current_time()
        if self.next_due > now:
            return []
        due = {key: held for key, held in self._held.items() if held.due <= now}
        awaited = await trio.to_thread.run_sync(_awaited, self._tree, list(due), limiter=self._limiter)
        told = []
        for key, held in due.items():
            if self._held.get(key) is held:  # nothing happened to it meanwhile
                del self._held[key]
                if key in awaited:
                    self._held[key] = held._replace(due=trio.current_time() + HELD_S)
                else:
                    told.append(held.happened)
        return told

    def _take_below(self, region: str, path: bytes) -> list[Happened]:
        below = path and path + b"/"
        keys = [
            (where, name)
            for where, name in self._held
            if where == region and (name == path or name.startswith(below))
        ]
        return [self._held.pop(key).happened for key in keys]


def _awaited(tree: Path, keys: Iterable[_Key]) -> set[_Key]:
    """Those whose content is being written beside them, under a download's temporary name."""
    temporaries: dict[_Key, set[bytes]] = {}
    awaited = set()
    for region, path in keys:
        directory, _, name = path.rpartition(b"/")
        if (region, directory) not in temporaries:
            temporaries[region, directory] = under_way(tree / region, directory)
        if os.path.splitext(name)[1].lower() in temporaries[region, directory]:
            awaited.add((region, path))
    return awaited


def under_way(root: Path | int, directory: bytes) -> set[bytes]:
    """The extensions of what is being downloaded to a directory: ``.pdf`` of ``a.Xy12Zw.pdf.part``.

    ``root``: the path or the descriptor of what the directory is in. Nothing there is changed.
    """
    found = set()
    try:
        with Cursor(root, unlocks=False) as cursor:
            directory_fd = cursor.enter(directory)
            for name in map(os.fsencode, os.listdir(directory_fd)):
                whole, suffix = os.path.splitext(name.lower())
                if suffix in DOWNLOAD_SUFFIXES:
                    st = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
                    if stat.S_ISREG(st.st_mode) and time.time() - st.st_mtime < _STALLED_S:
                        found.add(os.path.splitext(whole)[1])
    except (OSError, BusyError):  # it lives: a directory may go, and then so does what is in it
        pass
    return found
