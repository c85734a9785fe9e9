"""An agent's memory: one region restored from its history and committed back to it.

Ties the store, the history, the index and the disk together. A commit sends contents first and the
snapshot last, so that until the very end the previous snapshot is the newest, and it can be run again.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from agentfuse.errors import IntegrityError, ObjectNotFoundError, StoreError
from agentfuse.home import marks
from agentfuse.home.index import Base, Index
from agentfuse.home.walk import Cursor, changed_meanwhile, local_disk
from agentfuse.objectstore.base import ObjectStore
from agentfuse.progress import Reporter
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry, printable, totals_of
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import check_id, check_region, object_key
from agentfuse.snapshots.rebase import Listing, Rebased, by_path, is_changed
from agentfuse.sync.absent import Absent, Part, Settled, take_up
from agentfuse.sync.contents import StoredSource, read_content, stream_content
from agentfuse.sync.hydrate import hydrate, lay_out
from agentfuse.sync.merge import Merger, sources
from agentfuse.sync.notes import Note, Notes, Synced
from agentfuse.sync.reports import CommitReport, Meter, RestoreReport
from agentfuse.sync.scan import Capture, Scan, observe, scan
from agentfuse.sync.spool import Spool
from agentfuse.sync.upload import Place, Readable, Uploader, placed

_log = logging.getLogger(__name__)

MAX_RACES = 100
"""Commits lost in a row before giving up; each means that another execution got through."""


class Moment:
    """A region at one moment, on its way to be committed: see :meth:`Memory.moment`."""

    def __init__(self, synced: Synced, capture: Capture, meter: Meter) -> None:
        self.synced = synced
        self._capture = capture
        self._meter = meter
        self._found: Scan | None = None

    def look(self) -> None:
        """Look at the region as ``Capture.look`` does; the last look is what counts."""
        self._found = self._capture.look(self._meter)

    def finished(self) -> Scan:
        """What was found, with all hashes."""
        assert self._found is not None
        if self._found.copies:
            self._found = self._capture.finish(self._found)
        return self._found


class _LostContentError(ObjectNotFoundError):
    """The store has lost a content that was never fetched: nobody can have it any more."""

    def __init__(self, entry: Entry, problem: str) -> None:
        super().__init__(problem)
        self.path = entry.path
        self.sha256 = entry.sha256


def _without(entries: Listing, theirs: Listing, lost: Collection[str]) -> Listing:
    """A listing without contents that are lost; where the other side has the path, that stays."""
    if not lost:
        return entries
    kept = {}
    for path, entry in entries.items():
        found: Entry | None = entry
        if entry.sha256 in lost:
            found = theirs.get(path)
        if found is not None and found.sha256 not in lost:
            kept[path] = found
    return kept


class Memory:
    """The memory of an agent in one execution: ``region``, backed by the directory ``root``.

    ``owner``: uid and gid that restored files get; None leaves them to this process's user. ``region`` may
    be an execution's own, see ``layout.execution_region``. Not safe for concurrent calls. Nobody else may
    write below ``root`` during a call, unless a :class:`Moment` is what is committed.
    """

    def __init__(
        self,
        *,
        store: ObjectStore,
        agent: str,
        execution: str,
        root: Path,
        index: Index,
        owner: tuple[int, int] | None,
        region: str = "shared",
    ) -> None:
        self._store = store
        self._agent = check_id("agent", agent)
        self._execution = check_id("execution", execution)
        self.root = root
        self._index = index
        self._owner = owner
        self._region = check_region(region)
        self._history = History(store, agent, region)
        self._notes = Notes(index, self._history)
        # Whoever commits without having restored finishes what another process began.
        self._uploader = Uploader(store, agent, may_be_there=True)

    def restore(self, reporter: Reporter, absent: Absent | None = None) -> RestoreReport:
        """Bring the newest snapshot into ``root``, which must be empty, and note it in the index.

        With ``absent`` without the contents, as far as this host can: the files that are to be filled are
        added there. When it returns all is durable on this host; after an error the root is to be cleared.
        Raises ``StoreError`` and its kinds, and ``EnvironmentProblem``.
        """
        self._index.clear()
        self._uploader = Uploader(self._store, self._agent, may_be_there=False)
        number = self._history.newest()
        if number == 0:
            return RestoreReport(None)
        entries = by_path(self._history.read(number).entries)
        totals = totals_of(entries.values())
        meter = Meter(reporter, "restore", total_files=totals.files, total_bytes=totals.bytes)
        restore = hydrate if absent is None else lay_out
        requests, marked = restore(
            self._store, self._agent, entries, self.root, owner=self._owner, meter=meter
        )
        meter.tell()
        now = observe(self.root, entries)
        self._notes.restored(now, number)
        if absent is None:
            self._notes.note_restored()
        else:
            part = self._part()
            for path in marked:
                absent.add(part, now.prints[path].ino, now.entries[path])
        frozen = tuple(entry.path for entry in entries.values() if entry.is_frozen)
        return RestoreReport(number, totals.files, totals.bytes, requests, frozen)

    def note_restored(self) -> None:
        """Tell the index what was restored, which a lazy restore leaves for later; safe from any thread.

        Until then it only knows the snapshot's number. Raises ``EnvironmentProblem``.
        """
        self._notes.note_restored()

    def resume(self, absent: Absent) -> None:
        """Add the files that an earlier process has left without their contents to ``absent``.

        Raises ``StoreError`` when where the contents are must be read from the store and cannot be.
        """
        marked = list(take_up(self.root))
        if not marked:
            return
        places = self._places_of_bases(self._notes.last_sync())
        places |= self._search({entry.sha256 for _, entry in marked} - places.keys())
        part = self._part()
        for ino, entry in marked:
            absent.add(part, ino, placed(entry, places))

    def _search(self, wanted: set[str]) -> dict[str, Place]:
        """Where contents are that nothing on this host knows the place of: some snapshot may."""
        found: dict[str, Place] = {}
        for number in reversed(list(self._history.numbers()) if wanted else ()):
            with contextlib.suppress(ObjectNotFoundError):  # collected just now
                entries = self._history.read(number).entries
                found = {e.sha256: Place(e.object, e.offset) for e in entries if e.object} | found
            if wanted <= found.keys():
                break
        return found

    def _part(self) -> Part:
        return Part(self.root, self._store, self._agent, self._settled)

    def _settled(self, files: Iterable[Settled]) -> None:
        """Files hold their contents for good: the next commit need not read them again."""
        self.note_restored()
        xattrs = msgspec.msgpack.encode(())
        self._index.reprint((*file, xattrs) for file in files)

    def moment(self, reporter: Reporter, spool: Spool) -> Moment:
        """Begin to capture the region at one moment, while others write to it; copies go to ``spool``.

        Raises ``StoreError`` when what was synced last must be read from the store and cannot be.
        """
        synced = self._notes.last_sync()
        capture = Capture(self.root, synced.entries, synced.prints, spool)
        return Moment(synced, capture, Meter(reporter, "scan"))

    def send(self, moment: Moment, reporter: Reporter) -> None:
        """Bring the contents of a moment into the store, without a snapshot that names them yet.

        Raises as :meth:`commit` does.
        """
        now = moment.finished()
        bases = self._places_of_bases(moment.synced)
        self._upload(now.entries.values(), bases, bases, now, reporter=reporter)

    def commit(self, reporter: Reporter, reason: str, moment: Moment | None = None) -> CommitReport:
        """Make what changed since the last sync durable, as a new snapshot upon the newest one.

        When it returns it is in the store; after an error the newest snapshot is still whole, and calling
        again goes on. Raises ``StoreError`` and its kinds, ``BusyError`` when a file changed meanwhile,
        ``EnvironmentProblem`` when the local disk fails.
        """
        if moment is None:
            synced = self._notes.last_sync()
            meter = Meter(reporter, "scan")
            now = scan(self.root, synced.entries, synced.prints, meter)
            meter.tell()
        else:
            synced, now = moment.synced, moment.finished()
        report = self._commit(synced, now, reporter, reason)
        self._uploader.forget()
        return report

    def _commit(self, synced: Synced, now: Scan, reporter: Reporter, reason: str) -> CommitReport:
        skipped = tuple(map(printable, now.skipped))
        if not synced.number and len(now.entries) == 1:
            return CommitReport(None, skipped=skipped)  # an empty region that never was anything else
        if not is_changed(synced.entries, now.entries):
            note = self._note_of(synced, now, synced.entries, Base(synced.number, synced.exact))
            self._notes.write_news(note, synced)
            return CommitReport(None, skipped=skipped)
        put_before = self._uploader.objects_put, self._uploader.bytes_put
        number, entries, rebased, merged = self._commit_upon_newest(synced, now, reporter, reason)
        self._forget_others(synced, entries)
        totals = totals_of(entries.values())
        return CommitReport(
            number,
            totals.files,
            totals.bytes,
            self._uploader.objects_put - put_before[0],
            self._uploader.bytes_put - put_before[1],
            rebased.conflicts,
            skipped,
            tuple(map(printable, merged)),
        )

    def _commit_upon_newest(
        self, synced: Synced, now: Scan, reporter: Reporter, reason: str
    ) -> tuple[int | None, Listing, Rebased, tuple[bytes, ...]]:
        """The number that was committed, None when the newest snapshot has all already; its listing; the
        rebase that led to it; the paths of merged texts.
        """
        texts: dict[bytes, bytes]
        lost: set[str] = set()
        for _ in range(MAX_RACES):
            newest = self._history.newest(at_least=synced.number)
            if self._notes.learn_outcomes(newest):
                synced = self._notes.last_sync()
            if newest == synced.number and synced.exact:
                theirs: Listing = synced.entries
                merged, texts = Rebased(now.entries, ()), {}
            else:
                theirs = by_path(self._history.read(newest).entries) if newest else {}
                read_mine = partial(self._read_mine, synced, now)
                merger = Merger(self._store, self._agent, self._execution, read_mine)
                merged, texts = merger.rebase(synced.entries, theirs, now.entries)
            wanted = _without(merged.entries, theirs, lost)
            try:
                entries = self._place(wanted, theirs, synced, now, reporter=reporter, texts=texts)
            except _LostContentError as error:
                _log.error("%s is left out, for its content is lost: %s", printable(error.path), error)
                lost.add(error.sha256)
                continue
            if not is_changed(theirs, entries):
                note = self._note_of(synced, now, theirs, Base(newest, not is_changed(theirs, now.entries)))
                self._notes.write_news(note, synced)
                return None, theirs, merged, tuple(texts)
            snapshot = self._snapshot(newest, reason, entries)
            base = Base(newest + 1, exact=not is_changed(entries, now.entries))
            note = self._note_of(synced, now, entries, base)
            self._notes.intend(note, snapshot.commit)
            if self._history.commit(snapshot):
                self._notes.write(note)
                return newest + 1, entries, merged, tuple(texts)
            self._notes.give_up(snapshot.commit)
        raise StoreError(f"agent {self._agent}: lost {MAX_RACES} commits in a row to other executions")

    def _read_mine(self, synced: Synced, now: Scan, entry: Entry) -> bytes | None:
        if entry.sha256 in now.opens:
            return now.opens[entry.sha256]().read(entry.size)
        with local_disk(self.root), Cursor(self.root) as cursor:
            with open(cursor.open_file(entry.path), "rb") as file:
                if entry.size and marks.read(file.fileno()) is not None:
                    return self._read_stored(placed(entry, self._places_of_bases(synced)))
                content = file.read(entry.size + 1)
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise changed_meanwhile(entry.path)
            return content

    def _read_stored(self, entry: Entry) -> bytes | None:
        """The content of an absent file; None if the store has it no longer."""
        try:
            return read_content(self._store, self._agent, entry) if entry.object else None
        except (ObjectNotFoundError, IntegrityError) as error:
            _log.warning("%s cannot be merged: %s", printable(entry.path), error)
            return None

    def _place(
        self,
        entries: Mapping[bytes, Entry],
        theirs: Listing,
        synced: Synced,
        now: Scan,
        *,
        reporter: Reporter,
        texts: Mapping[bytes, bytes],
    ) -> dict[bytes, Entry]:
        """The entries with a place in the store for every content, after sending those that have none.

        Of a merged text this side's version is sent along, because it stays on this disk: it is what the
        next merge of this path starts from.
        """
        # Only what the newest snapshot names, or was sent just now, is safe from garbage collection.
        places = {e.sha256: Place(e.object, e.offset) for e in theirs.values() if e.object}
        places.update(self._uploader.places())
        made, opens = sources(texts, entries)
        wanted = [*made, *now.entries.values()]
        named = {e.sha256 for e in entries.values()} | {now.entries[path].sha256 for path in texts}
        bases = self._places_of_bases(synced)
        unplaced = (entry for entry in wanted if entry.sha256 in named)
        self._upload(unplaced, places, bases, now, reporter=reporter, opens=opens)
        places.update(self._uploader.places())
        return {path: placed(entry, places) for path, entry in entries.items()}

    def _upload(
        self,
        wanted: Iterable[Entry],
        places: Mapping[str, Place],
        bases: Mapping[str, Place],
        now: Scan,
        *,
        reporter: Reporter,
        opens: Mapping[str, Callable[[], Readable]] | None = None,
    ) -> None:
        """Send each content of ``wanted`` that has no place in ``places``.

        What neither ``opens`` nor ``now`` opens is read from below the root, or, if it is absent there, from
        its place in ``bases``, which may soon be gone.
        """

        def stored(entry: Entry) -> Readable:
            found = placed(entry, bases)
            if not found.object:
                found = placed(entry, self._search({entry.sha256}))
            try:
                # Twice the reading, but rare; and one content that is lost must not keep the others.
                for _ in stream_content(self._store, self._agent, found):
                    pass
            except (ObjectNotFoundError, IntegrityError) as error:
                raise _LostContentError(entry, error.message) from error
            return StoredSource(self._store, self._agent, found)

        files = list({e.sha256: e for e in wanted if e.size and e.sha256 not in places}.values())
        if files:
            meter = Meter(reporter, "flush", total_files=len(files), total_bytes=sum(e.size for e in files))
            elsewhere = {**now.opens, **(opens or {})}
            self._uploader.upload(self.root, files, meter, elsewhere=elsewhere, stored=stored)
            meter.tell()

    def _snapshot(self, parent: int, reason: str, entries: Listing) -> Snapshot:
        follows, resumes = self._history.stretch(parent, self._execution)
        return Snapshot(
            agent=self._agent,
            region=self._region,
            number=parent + 1,
            parent=parent,
            follows=follows,
            resumes=resumes,
            execution=self._execution,
            commit=str(uuid.uuid4()),
            reason=reason,
            time=datetime.datetime.now(datetime.UTC),
            entries=list(entries.values()),
        )

    def _note_of(self, synced: Synced, now: Scan, committed: Listing, base: Base) -> Note:
        return self._notes.of(synced, now, committed, base, self._places_of_bases(synced))

    def _forget_others(self, synced: Synced, committed: Listing) -> None:
        """Keep on this host only what the next run will ask for: a file that changes every few seconds would
        push everything else out of the cache."""
        named = {entry.object for entry in committed.values()}
        for name in {place.object for place in self._places_of_bases(synced).values()} - named:
            self._store.forget(object_key(self._agent, name))

    def _places_of_bases(self, synced: Synced) -> dict[str, Place]:
        """Where contents are that only this disk has: the bases of merges to come, see ``_place``."""
        return synced.places() | self._uploader.places()
