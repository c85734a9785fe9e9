"""Reading a source that promised its size, whole or in parts that travel some at a time.

Memory is bounded by the number of parts that may be under way, over all sources of a store. Each is an
anonymous mapping, which the system has back at once; the allocator keeps freed megabytes for every thread
that had some. Knows no store.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from agentfuse.errors import StoreError
from agentfuse.objectstore.base import CHUNK_BYTES, Source

_T = TypeVar("_T")


class PartSender:
    """Sends parts in ``at_a_time`` threads, and never has more of them in memory. Safe to share."""

    def __init__(self, at_a_time: int) -> None:
        self._slots = threading.BoundedSemaphore(at_a_time)
        self._threads = ThreadPoolExecutor(at_a_time, thread_name_prefix="agentfuse-part")

    def send(
        self, source: Source, size_bytes: int, part_bytes: int, send: Callable[[int, mmap.mmap], _T]
    ) -> list[_T]:
        """What ``send(number, part)`` returned for each part, numbered from 1; called in threads.

        The source is read in the caller's thread. Raises what it or the first of the failed parts
        raised; when this returns or raises, no part is under way.
        """
        sent: list[Future[_T]] = []

        def send_one(number: int, part: mmap.mmap) -> _T:
            try:
                with part:
                    return send(number, part)
            finally:
                self._slots.release()

        try:
            for start in range(0, size_bytes, part_bytes):
                self._slots.acquire()
                try:
                    part = _read(source, min(part_bytes, size_bytes - start), start, size_bytes)
                    sent.append(self._threads.submit(send_one, len(sent) + 1, part))
                except BaseException:
                    self._slots.release()
                    raise
                if any(each.done() and each.exception() for each in sent):
                    break
            else:
                require_end(source, size_bytes)
        finally:
            wait(sent)
        return [each.result() for each in sent]


def read_whole(source: Source, size_bytes: int) -> mmap.mmap:
    """All of a source that is not empty; to be closed.

    Raises ``StoreError`` when it gives another number of bytes than it promised.
    """
    content = _read(source, size_bytes, 0, size_bytes)
    require_end(source, size_bytes)
    return content


def _read(source: Source, wanted: int, start: int, size_bytes: int) -> mmap.mmap:
    content = mmap.mmap(-1, wanted)
    while (done := content.tell()) < wanted:
        piece = source.read(min(CHUNK_BYTES, wanted - done))
        if not piece:
            raise StoreError(f"upload of {size_bytes} bytes: the source gave {start + done}")
        content.write(piece)
    content.seek(0)
    return content


def require_end(source: Source, size_bytes: int) -> None:
    """Raise ``StoreError`` unless a source that gave ``size_bytes`` has nothing more."""
    if source.read(1):
        raise StoreError(f"upload of {size_bytes} bytes: the source gave more")
