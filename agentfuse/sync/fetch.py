"""Fetching contents to disk: which come with one request, and verifying each. Knows files, no trees."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import FileIO

from agentfuse.objectstore.base import CHUNK_BYTES, ObjectStore
from agentfuse.snapshots.entries import Entry
from agentfuse.sync.contents import verify
from agentfuse.sync.upload import PACK_BYTES

GAP_BYTES = 256 * 1024
"""Bytes that nobody wants between two contents are fetched along: a request costs more than they do."""

_ZEROS = bytes(CHUNK_BYTES)


@dataclass(slots=True)
class Run:
    """Contents of one object, from ``offset`` to ``end``, that come with one request."""

    object: str
    offset: int
    end: int
    contents: list[Entry]


def plan(contents: Iterable[Entry]) -> list[Run]:
    """Group contents to runs that are cheap to fetch, and no longer than a pack unless a content is."""
    runs: list[Run] = []
    last = Run("", 0, 0, [])
    for entry in sorted(contents, key=lambda entry: (entry.object, entry.offset)):
        end = max(last.end, entry.offset + entry.size)
        is_near = entry.object == last.object and entry.offset - last.end <= GAP_BYTES
        if is_near and end - last.offset <= PACK_BYTES:
            last.contents.append(entry)
            last.end = end
        else:
            last = Run(entry.object, entry.offset, entry.offset + entry.size, [entry])
            runs.append(last)
    return runs


def read_run(store: ObjectStore, key: str, run: Run) -> memoryview:
    """The bytes of a run, unverified and possibly fewer."""
    return memoryview(store.get(key, offset=run.offset, length=run.end - run.offset))


def content_of(store: ObjectStore, key: str, run: Run, data: memoryview, entry: Entry) -> memoryview:
    """One content of the bytes of a run. Raises ``IntegrityError`` unless it is what the entry names."""
    start = entry.offset - run.offset
    content = data[start : start + entry.size]
    verify(store, key, entry, len(content), hashlib.sha256(content).hexdigest())
    return content


def stream_into(
    file: FileIO, store: ObjectStore, key: str, entry: Entry, is_abandoned: Callable[[], bool]
) -> bool:
    """Stream one large content into a file, which stands at its beginning, and verify it.

    Where the content is zero a file that has no bytes of its own keeps its hole. Asks ``is_abandoned``
    before each piece, and returns False then, early. Raises as :func:`content_of` does. In both cases the
    file is worthless.
    """
    is_hollow = _is_hollow(file)
    digest = hashlib.sha256()
    size = 0
    for piece in store.stream(key, offset=entry.offset, length=entry.size):
        if is_abandoned():
            return False
        size += len(piece)
        digest.update(piece)
        if size > entry.size:
            break
        if is_hollow and piece == _ZEROS[: len(piece)]:
            file.seek(len(piece), os.SEEK_CUR)
        else:
            write_all(file, memoryview(piece))
    verify(store, key, entry, size, digest.hexdigest())
    file.truncate(entry.size)
    return True


def _is_hollow(file: FileIO) -> bool:
    try:
        os.lseek(file.fileno(), 0, os.SEEK_DATA)
    except OSError:
        return True  # ENXIO: nothing but a hole
    finally:
        file.seek(0)
    return False


def write_all(file: FileIO, content: memoryview) -> None:
    """Write all of it."""
    while content:
        content = content[file.write(content) :]


def copy_all(source: FileIO, copy: FileIO) -> None:
    """Copy what a file holds, from its beginning, sparing its zeros, into one of the same size."""
    is_hollow = _is_hollow(copy)
    source.seek(0)
    while piece := source.read(CHUNK_BYTES):
        if is_hollow and piece == _ZEROS[: len(piece)]:
            copy.seek(len(piece), os.SEEK_CUR)
        else:
            write_all(copy, memoryview(piece))
    copy.truncate(source.tell())
