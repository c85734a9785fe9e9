"""What has changed in a region since it was last captured: enough to know when to sync, and to tell people.

What has changed exactly is found out by looking (``sync.scan``); this only says that something has, how
much about, and since when. Knows no store. The trio thread's alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Changes:
    """Counts the changes of one region. ``version`` grows with every one of them.

    ``since`` is when the oldest change was made that no commit holds, ``closed_since`` the oldest one
    that was complete (a file closed, a name given or taken) and not even sent; both by the monotonic
    clock, None when there is none. ``on_change`` is called when either begins to have a value.
    """

    def __init__(self) -> None:
        self.version = 0
        self.since: float | None = None
        self.closed_since: float | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._dirty: dict[int, int] = {}
        self._captured: dict[int, int] = {}
        self._captured_since: float | None = None

    def note(self, ino: int, size_bytes: int | None) -> None:
        """The content of the inode ``ino``, now ``size_bytes`` long, has changed; None: only what is
        said of it, its name or its attributes.
        """
        self.version += 1
        if size_bytes is None:
            self._dirty.setdefault(ino, 0)
        else:
            self._dirty[ino] = size_bytes
        if self.since is None:
            self.since = time.monotonic()
            self.on_change()

    def note_complete(self) -> None:
        """What was changed is complete: worth sending."""
        if self.closed_since is None:
            self.closed_since = time.monotonic()
            self.on_change()

    def capture(self) -> int:
        """Everything noted so far is about to be captured; the version that this is."""
        self._captured.update(self._dirty)
        self._dirty = {}
        if self._captured_since is None:
            self._captured_since = self.since
        self.since = self.closed_since = None
        return self.version

    def captured_is_committed(self) -> None:
        """What was captured is in a snapshot."""
        self._captured = {}
        self._captured_since = None

    def captured_is_lost(self) -> None:
        """What was captured is in no snapshot: it counts as changed again."""
        self._dirty = self._captured | self._dirty
        self.since = self._captured_since if self._captured_since is not None else self.since
        self._captured, self._captured_since = {}, None

    def age_s(self) -> float | None:
        """How long ago the oldest change was made that no snapshot holds; None when there is none."""
        since = self._captured_since if self._captured_since is not None else self.since
        return None if since is None else time.monotonic() - since

    def totals(self) -> tuple[int, int]:
        """How many files, and bytes of files, have changed and are in no snapshot."""
        dirty = self._captured | self._dirty
        return len(dirty), sum(dirty.values())
