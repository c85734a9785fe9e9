"""Sending contents to the store: small ones many to a pack, large ones alone and streamed.

A pack is the plain concatenation of contents, and an object like any other: named by the SHA-256 of its
bytes. Sending the same contents again gives the same objects, so it can be interrupted at any moment.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from agentfuse.errors import ObjectNotFoundError
from agentfuse.home.walk import Cursor, changed_meanwhile, local_disk
from agentfuse.objectstore.base import ObjectStore, Source
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.layout import object_key
from agentfuse.sync.reports import Meter
from agentfuse.sync.workers import Workers

SMALL_BYTES = 1024 * 1024
"""Contents below this share objects."""

PACK_BYTES = 8 * 1024 * 1024
"""No pack is longer."""

TRUSTED_FOR_S = 3600
"""For so long an object that no snapshot names is relied upon; garbage collection waits far longer."""


class Place(NamedTuple):
    """Where the store has a content: the hash that names the object, and the offset in it."""

    object: str
    offset: int


class Readable(Source, Protocol):
    """A source that is closed after use."""

    def close(self) -> None:
        """Let go of what it holds."""


class Uploader:
    """Brings contents of one agent into the store, and remembers which it brought.

    ``objects_put`` and ``bytes_put`` count what travelled. ``may_be_there``: an earlier process may have
    been interrupted, so objects are looked for before they are sent.
    """

    def __init__(self, store: ObjectStore, agent: str, *, may_be_there: bool) -> None:
        self.objects_put = 0
        self.bytes_put = 0
        self._store = store
        self._agent = agent
        self._may_be_there = may_be_there
        self._sent: dict[str, tuple[Place, float]] = {}

    def places(self) -> dict[str, Place]:
        """Where the contents are that this uploader brought lately, by hash."""
        limit = time.monotonic() - TRUSTED_FOR_S
        return {sha256: place for sha256, (place, at) in self._sent.items() if at > limit}

    def upload(
        self,
        root: Path,
        files: Iterable[Entry],
        meter: Meter,
        *,
        elsewhere: Mapping[str, Callable[[], Readable]] | None = None,
    ) -> None:
        """Send the contents of ``files``, which lie below ``root``: one entry for each content.

        ``elsewhere``: by hash, what opens the contents that do not lie there.
        When this returns all are durable in the store and in :meth:`places`; after an error some are.
        Raises ``BusyError`` if a file no longer is what its entry says.
        """
        with local_disk(root), Workers() as workers, Cursor(root) as cursor:

            def opened(entry: Entry) -> _Content:
                if elsewhere and entry.sha256 in elsewhere:
                    return _Content(elsewhere[entry.sha256](), entry)
                return _Content(open(cursor.open_file(entry.path), "rb", buffering=0), entry)

            pack = _Pack()
            for entry in files:
                if entry.size >= SMALL_BYTES:
                    workers.make_room()
                    content = opened(entry)
                    workers.submit(partial(self._send_alone, content), partial(self._note, [entry], meter))
                    continue
                if len(pack.body) + entry.size > PACK_BYTES:
                    workers.submit(partial(self._send_pack, pack), partial(self._note, pack.entries, meter))
                    pack = _Pack()
                pack.add(opened(entry))
            if pack.entries:
                workers.submit(partial(self._send_pack, pack), partial(self._note, pack.entries, meter))
            workers.finish()

    def _send_alone(self, content: _Content) -> tuple[str, bool]:
        with content:
            name = content.entry.sha256
            return name, self._put(name, content, content.entry.size)

    def _send_pack(self, pack: _Pack) -> tuple[str, bool]:
        name = hashlib.sha256(pack.body).hexdigest()
        return name, self._put(name, pack.body, len(pack.body))

    def _put(self, name: str, body: bytearray | Source, size_bytes: int) -> bool:
        key = object_key(self._agent, name)
        if self._may_be_there and self._is_there(key, size_bytes):
            return False
        self._store.put(key, body, size_bytes=size_bytes)
        return True

    def _is_there(self, key: str, size_bytes: int) -> bool:
        try:
            found = self._store.stat(key)
        except ObjectNotFoundError:
            return False
        return found.size_bytes == size_bytes and time.time() - found.modified_at < TRUSTED_FOR_S

    def _note(self, entries: list[Entry], meter: Meter, outcome: tuple[str, bool]) -> None:
        name, has_travelled = outcome
        offset = 0
        for entry in entries:
            self._sent[entry.sha256] = (Place(name, offset), time.monotonic())
            offset += entry.size
            meter.add(files=1, size=entry.size)
        if has_travelled:
            self.objects_put += 1
            self.bytes_put += offset


class _Content:
    """The content of one file, which must be what its entry says. Closes what it is given to read from."""

    def __init__(self, file: Readable, entry: Entry) -> None:
        self.entry = entry
        self._file = file
        self._digest = hashlib.sha256()
        self._left = entry.size

    def __enter__(self) -> _Content:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int, /) -> bytes:
        """The next bytes; raises ``BusyError`` rather than let the last of a changed content out."""
        if not self._left:
            return b""
        with local_disk(Path(os.fsdecode(self.entry.path))):
            piece = self._file.read(min(size, self._left))
        self._left -= len(piece)
        self._digest.update(piece)
        if not piece or (not self._left and self._digest.hexdigest() != self.entry.sha256):
            raise changed_meanwhile(self.entry.path)
        return piece


class _Pack:
    """Contents on their way into one object."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.body = bytearray()

    def add(self, content: _Content) -> None:
        with content:
            while piece := content.read(SMALL_BYTES):
                self.body += piece
        self.entries.append(content.entry)
