"""Who hears of each file of a region, by path: the seam between the filesystem and the events.

An ``Account`` without one (``observer`` is None) costs its region a comparison and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

Found = list[tuple[bytes, os.stat_result | None]]
"""The regular files at a path, by their paths in the region; None: still being written."""

Look = Callable[[], Found]
"""Finds out what is at a path now. Called at once or never: it is a walk."""


class Observer(Protocol):
    """Hears what happened, after it did, on the trio thread; never raises and never waits.

    Paths are relative to the region. ``how`` is what inotify calls it: ``IN_CLOSE_WRITE`` and so on.
    """

    def completed(self, path: bytes, st: os.stat_result, how: str) -> None:
        """The content of the regular file at ``path`` is whole: nobody has it open to write any more."""

    def touched(self, path: bytes, st: os.stat_result) -> None:
        """The times of the file at ``path`` were set."""

    def replaced(self, path: bytes, found: Found, *, came: str, went: str) -> None:
        """What was at ``path``, a file or a directory, is not there any more; ``found`` is, if anything."""

    def moved(self, old: bytes, new: bytes, st: os.stat_result, look: Look) -> None:
        """The file or directory ``old`` has become ``new``, in the place of what was there.

        ``look`` looks at ``new``.
        """
