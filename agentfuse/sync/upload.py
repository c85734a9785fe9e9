"""Sending contents to the store: small ones many to a pack, large ones alone and streamed.

A pack is the plain concatenation of contents, and an object like any other: named by the SHA-256 of its
bytes. Sending the same contents again gives the same objects, so it can be interrupted at any moment.

But an *old* object of that name may be about to be collected as garbage (``snapshots.collect``), and no
request can take that back: so only an object that was absent, or is young, is relied upon. Otherwise the
bytes go under a name that was never used before.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from agentfuse.errors import ObjectNotFoundError
from agentfuse.home import marks
from agentfuse.home.walk import Cursor, changed_meanwhile, local_disk
from agentfuse.killpoints import passing
from agentfuse.objectstore.base import ObjectStat, ObjectStore, Source
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


def placed(entry: Entry, places: Mapping[str, Place]) -> Entry:
    """The entry with the place of its content, or without one."""
    place = places.get(entry.sha256, Place("", 0))
    if (entry.object, entry.offset) == place:
        return entry
    return msgspec.structs.replace(entry, object=place.object, offset=place.offset)


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

    def forget(self) -> None:
        """A snapshot names what was brought: whoever needs it finds it there."""
        self._sent.clear()

    def upload(
        self,
        root: Path,
        files: Iterable[Entry],
        meter: Meter,
        *,
        elsewhere: Mapping[str, Callable[[], Readable]] | None = None,
        stored: Callable[[Entry], Readable] | None = None,
    ) -> None:
        """Send the contents of ``files``, which lie below ``root``: one entry for each content.

        ``elsewhere``: by hash, what opens the contents that do not lie there. ``stored`` opens those of
        files that are there without their contents (``home.marks``).
        When this returns all are durable in the store and in :meth:`places`; after an error some are.
        Raises ``BusyError`` if a file no longer is what its entry says.
        """
        with local_disk(root), Cursor(root, only_looks=True) as cursor:

            def opened(entry: Entry) -> Readable:
                if elsewhere and entry.sha256 in elsewhere:
                    return elsewhere[entry.sha256]()
                fd = cursor.open_file(entry.path)
                if stored is None or marks.read(fd) is None:
                    return open(fd, "rb", buffering=0)
                os.close(fd)
                return stored(entry)

            self.send(files, opened, meter)

    def send(self, files: Iterable[Entry], opened: Callable[[Entry], Readable], meter: Meter) -> None:
        """As :meth:`upload`, of contents that ``opened`` opens; it is called in this thread only."""
        with Workers() as workers:
            pack = _Pack()
            for entry in files:
                if entry.size >= SMALL_BYTES:
                    workers.make_room()
                    content = _Content(opened(entry), entry)
                    workers.submit(partial(self._send_alone, content), partial(self._note, [entry], meter))
                    continue
                if len(pack.body) + entry.size > PACK_BYTES:
                    workers.submit(partial(self._send_pack, pack), partial(self._note, pack.entries, meter))
                    pack = _Pack()
                pack.add(_Content(opened(entry), entry))
            if pack.entries:
                workers.submit(partial(self._send_pack, pack), partial(self._note, pack.entries, meter))
            workers.finish()

    def _send_alone(self, content: _Content) -> tuple[str, bool]:
        name, size_bytes = content.entry.sha256, content.entry.size
        with content:
            found = self._find(name)
            if found is not None and _is_young(found, size_bytes):
                return name, False
            name = _unused_name() if found else name
            passing("upload.begun")
            self._store.put(object_key(self._agent, name), content, size_bytes=size_bytes)
            passing("upload.sent")
            return name, True

    def _send_pack(self, pack: _Pack) -> tuple[str, bool]:
        body = bytes(pack.body)
        pack.body.clear()
        name = hashlib.sha256(body).hexdigest()
        passing("upload.begun")
        found = self._find(name) if self._may_be_there else None
        if found is None:
            # A fresh home's packs are new nearly always: whether they are, the put itself finds out.
            if self._store.put_if_absent(object_key(self._agent, name), body):
                passing("upload.sent")
                return name, True
            found = self._find(name)
        if found is not None and _is_young(found, len(body)):
            return name, False
        name = _unused_name()
        self._store.put(object_key(self._agent, name), body)
        return name, True

    def _find(self, name: str) -> ObjectStat | None:
        try:
            return self._store.stat(object_key(self._agent, name))
        except ObjectNotFoundError:
            return None

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


def _is_young(found: ObjectStat, size_bytes: int) -> bool:
    return found.size_bytes == size_bytes and time.time() - found.modified_at < TRUSTED_FOR_S


def _unused_name() -> str:
    return secrets.token_hex(32)


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
