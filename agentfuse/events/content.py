"""What an event says of a file: how it begins, who made it, and its SHA-256 where that is cheap."""

from __future__ import annotations

import hashlib
import os
import time
from typing import NamedTuple

from agentfuse.errors import BusyError
from agentfuse.events.arrivals import Seen
from agentfuse.home import marks
from agentfuse.home.mime import HEAD_BYTES
from agentfuse.home.walk import Cursor
from agentfuse.regions import Creator

HASHED_BYTES = 4 * 1024 * 1024
"""Of larger files no hash is told: this is some 5 ms of a thread, which others' events wait for."""

_TICK_NS = 10_000_000
"""The clock of modification times may stand still for so long: two writes within it look like one."""


class Content(NamedTuple):
    """``head``: the beginning; None when it cannot be had. ``sha256``: of exactly what was announced.

    ``created_by``: None when the file is not there any more.
    """

    head: bytes | None
    sha256: str | None
    created_by: Creator | None


UNKNOWN = Content(None, None, None)


def look_at(cursor: Cursor, path: bytes, seen: Seen, *, hashed_bytes: int) -> Content:
    """The content of a file in a tree that lives, as far as it is still the one that was seen.

    No file larger than ``hashed_bytes`` is hashed.
    """
    try:
        fd = cursor.open_file(path)
    except (OSError, BusyError):
        return UNKNOWN
    try:
        st = os.fstat(fd)
        if st.st_ino != seen.ino:
            return UNKNOWN
        creator = marks.read_creator(fd)
        mark = marks.read(fd)
        if mark is not None:  # the content itself is not here yet
            return Content(None, mark.sha256, creator)
        if st.st_size > hashed_bytes or not _is(seen, st):
            return Content(os.pread(fd, HEAD_BYTES, 0), None, creator)
        return _hashed(fd, st, seen, creator)
    except OSError:
        return UNKNOWN
    finally:
        os.close(fd)


def _hashed(fd: int, st: os.stat_result, seen: Seen, creator: Creator) -> Content:
    young_ns = st.st_ctime_ns + _TICK_NS - time.time_ns()
    if 0 < young_ns <= _TICK_NS:
        time.sleep(young_ns / 1e9)  # from then on, whoever writes to it is found out below
    data = os.pread(fd, st.st_size + 1, 0)
    is_whole = len(data) == st.st_size and _is(seen, os.fstat(fd))
    return Content(data[:HEAD_BYTES], hashlib.sha256(data).hexdigest() if is_whole else None, creator)


def _is(seen: Seen, st: os.stat_result) -> bool:
    return (st.st_ino, st.st_size, st.st_mtime_ns) == seen
