"""What this host knows of a region's last sync: the index in terms of entries, and of commits.

A commit is noted twice: before it is tried, as an intent, and when it has succeeded. Without the first, a
commit whose answer or whose process was lost would be taken for another execution's work: what was
removed here since would come back, and what was changed would be in conflict with itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from agentfuse.errors import EnvironmentProblem, ObjectNotFoundError
from agentfuse.home import marks
from agentfuse.home.index import Base, Index, Intent, Row
from agentfuse.regions import Creator
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.history import History
from agentfuse.snapshots.rebase import Listing, by_path
from agentfuse.sync.scan import Print, Scan
from agentfuse.sync.upload import Place

_log = logging.getLogger(__name__)

_Xattrs = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Synced:
    """The region as it was when it was last synced, see ``Base``."""

    number: int
    exact: bool
    entries: dict[bytes, Entry]
    prints: dict[bytes, Print]

    def places(self) -> dict[str, Place]:
        """Where contents are that maybe only this disk has: the bases of merges to come."""
        return {e.sha256: Place(e.object, e.offset) for e in self.entries.values() if e.object}


@dataclass(frozen=True, slots=True)
class Note:
    """What is to be noted of a commit: rows that are not what they were, paths that are gone."""

    base: Base
    changed: list[Row]
    removed: frozenset[bytes]

    def then(self, later: Note) -> Note:
        """Both in one."""
        changed = {row.path: row for row in self.changed if row.path not in later.removed}
        changed |= {row.path: row for row in later.changed}
        return Note(later.base, list(changed.values()), self.removed | later.removed)

    def upon(self, rows: Iterable[Row]) -> list[Row]:
        """The rows as they are once this is noted."""
        left = {row.path: row for row in rows if row.path not in self.removed}
        return list((left | {row.path: row for row in self.changed}).values())


class Notes:
    """The notes of one region in an index. Only a help: when one cannot be made, nothing is lost."""

    def __init__(self, index: Index, history: History) -> None:
        self._index = index
        self._history = history
        self._lock = threading.Lock()
        self._restored: tuple[Scan, int] | None = None
        # What the index would not take, for want of room on the disk: known to this process alone.
        self._unwritten: Note | None = None
        self._unwritten_intents: list[tuple[Intent, Note]] = []

    def last_sync(self) -> Synced:
        """Raises ``StoreError`` when it must be read from the store and cannot be."""
        _try(self.note_restored)
        _try(self._write_unwritten)
        base, rows = self._index.load()
        has_intents = self._unwritten_intents or self._index.intents()
        if has_intents and self.learn_outcomes(self._history.newest(at_least=base.number)):
            base, rows = self._index.load()
        if self._unwritten is not None:
            base, rows = self._unwritten.base, self._unwritten.upon(rows)
        if not base.lost:
            entries = {row.path: _entry(row) for row in rows}
            prints = {row.path: Print(row.ino, row.ctime_ns) for row in rows}
            return Synced(base.number, base.exact, entries, prints)
        try:
            return Synced(base.number, True, by_path(self._history.read(base.number).entries), {})
        except ObjectNotFoundError:
            # Collected since. Merging from nothing keeps everything of both sides.
            return Synced(base.number, False, {}, {})

    def learn_outcomes(self, newest: int) -> bool:
        """Whether a commit that was only intended, as far as was known, turns out to have succeeded; it is
        noted then. ``newest``: the newest snapshot. Raises ``StoreError`` when one cannot be read.
        """
        for intent, note in self._unwritten_intents:
            if intent.number <= newest and self._committed(intent.number) == intent.commit:
                self.write(note)
                return True
        for intent in self._index.intents():
            if intent.number > newest:
                continue  # it may be under way yet
            if self._committed(intent.number) == intent.commit:
                self._index.fulfil(intent.commit)
                return True
            self._index.give_up(intent.commit)
        return False

    def _committed(self, number: int) -> str:
        """The id of the commit that made a snapshot."""
        try:
            return self._history.read(number).commit
        except ObjectNotFoundError:
            return ""  # collected since

    def restored(self, now: Scan, number: int) -> None:
        """The region has just been made what a snapshot is; the rows follow with :meth:`note_restored`.

        Raises ``EnvironmentProblem``.
        """
        self._index.begin(number)
        self._restored = now, number

    def note_restored(self) -> None:
        """Note the rows of what was restored, if that is to be done yet; safe from any thread.

        Raises ``EnvironmentProblem``.
        """
        with self._lock:
            if self._restored is not None:
                now, number = self._restored
                self._index.write(Base(number, exact=True), changed=_rows(now, now.entries.values()))
                self._restored = None

    def of(
        self, synced: Synced, now: Scan, committed: Listing, base: Base, places: Mapping[str, Place]
    ) -> Note:
        """The note of a commit of ``now`` that made ``committed``; ``places``: where other contents are."""
        changed = [
            row
            for row in _rows(now, committed.values(), places)
            if synced.prints.get(row.path) != (row.ino, row.ctime_ns)
            or synced.entries[row.path] != _entry(row)
        ]
        return Note(base, changed, frozenset(synced.entries.keys() - now.entries.keys()))

    def intend(self, note: Note, commit: str) -> None:
        """A commit by this id is about to be tried; ``note`` is made when it has succeeded."""
        intent = Intent(commit, note.base.number)
        try:
            self._index.intend(intent, note.base, changed=note.changed, removed=note.removed)
        except EnvironmentProblem as error:
            _log.warning("a commit cannot be noted on this disk before it is tried: %s", error)
            self._unwritten_intents.append((intent, note))

    def give_up(self, commit: str) -> None:
        """An intended commit has failed for certain."""
        self._unwritten_intents = [each for each in self._unwritten_intents if each[0].commit != commit]
        _try(lambda: self._index.give_up(commit))

    def write(self, note: Note) -> None:
        """What is noted is so. Forgets all intents."""
        self._unwritten = note if self._unwritten is None else self._unwritten.then(note)
        self._unwritten_intents = []
        _try(self._write_unwritten)

    def _write_unwritten(self) -> None:
        note = self._unwritten
        if note is not None:
            self._index.write(note.base, changed=note.changed, removed=note.removed)
            self._unwritten = None

    def write_news(self, note: Note, synced: Synced) -> None:
        """As :meth:`write`, if there is anything that is not noted yet."""
        if note.changed or note.removed or note.base != (synced.number, synced.exact, False):
            self.write(note)


def _try(write: Callable[[], None]) -> None:
    try:
        write()
    except EnvironmentProblem as error:
        _log.warning("nothing is lost, but the next commit has more to read: %s", error)


def _rows(now: Scan, committed: Iterable[Entry], others: Mapping[str, Place] | None = None) -> Iterator[Row]:
    places = dict(others or {})
    places.update((entry.sha256, Place(entry.object, entry.offset)) for entry in committed)
    for path, entry in now.entries.items():
        place, print_ = places.get(entry.sha256, Place("", 0)), now.prints[path]
        yield Row(
            path=path,
            ino=print_.ino,
            ctime_ns=print_.ctime_ns,
            type=entry.type,
            mode=entry.mode,
            mtime_ns=entry.mtime_ns,
            size=entry.size,
            sha256=entry.sha256,
            object=place.object,
            offset=place.offset,
            target=entry.target,
            link=entry.link,
            xattrs=msgspec.msgpack.encode(_attributes(entry)),
        )


def _attributes(entry: Entry) -> _Xattrs:
    """The attributes of an entry as the file itself has them: who made it among them."""
    if entry.created_by is Creator.AGENT:
        return entry.xattrs
    return (*entry.xattrs, (marks.CREATOR, entry.created_by.encode()))


def _entry(row: Row) -> Entry:
    xattrs = _XATTRS.decode(row.xattrs)
    is_marked = bool(xattrs) and xattrs[-1][0] == marks.CREATOR
    return Entry(
        path=row.path,
        type=row.type,  # type: ignore[arg-type]  # the index does not know the kinds there are
        mode=row.mode,
        mtime_ns=row.mtime_ns,
        size=row.size,
        sha256=row.sha256,
        object=row.object,
        offset=row.offset,
        target=row.target,
        link=row.link,
        xattrs=xattrs[:-1] if is_marked else xattrs,
        created_by=Creator(xattrs[-1][1].decode()) if is_marked else Creator.AGENT,
    )


# msgspec learns a type at its first use; two threads at once would crash the process.
_XATTRS = msgspec.msgpack.Decoder(_Xattrs)
