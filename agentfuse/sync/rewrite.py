"""Changing an agent's memory from its history, without a home: a new snapshot upon the newest one.

Nothing in a history is ever changed: going back is a step forward, too. Contents that only older snapshots
name are sent again, because those snapshots may be collected at any moment (``snapshots.collect``).
"""

from __future__ import annotations

import datetime
import io
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import msgspec

from agentfuse.errors import (
    BusyError,
    FrozenError,
    IntegrityError,
    NotFoundError,
    ObjectNotFoundError,
    StoreError,
    UsageError,
)
from agentfuse.objectstore.base import ObjectStore
from agentfuse.progress import Reporter
from agentfuse.snapshots.changes import Change, Summary, changes, summarise
from agentfuse.snapshots.databases import whole
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry, names_by_inode, parent_of, printable
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import check_id
from agentfuse.snapshots.rebase import Conflict, Listing, by_path, in_tree_order, is_changed
from agentfuse.snapshots.references import below, find, read_snapshot, require_newest
from agentfuse.sync.contents import StoredSource, read_content
from agentfuse.sync.merge import Merger
from agentfuse.sync.reports import Meter
from agentfuse.sync.upload import Place, Readable, Uploader, placed

MAX_RACES = 100
"""As for commits: each lost race means that an execution got through."""


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """What a rewrite came to. ``number`` is None when the newest snapshot is as wanted already.

    ``changed``: against the snapshot it was made upon. ``conflicts``: what could not be taken back, because
    later runs changed it too; ``merged``: texts that were, by line; ``kept``: what the run had added and
    is there still, because later runs changed it.
    """

    number: int | None
    changed: Summary
    conflicts: tuple[Conflict, ...] = ()
    merged: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What a rewrite would do ``upon`` the newest snapshot there was; see ``RewriteReport`` for the rest."""

    upon: int
    changes: tuple[Change, ...]
    conflicts: tuple[Conflict, ...]
    merged: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Composed:
    """A listing to be committed. ``made``: contents that the store has not, by hash; the rest as reported."""

    entries: Listing
    made: Mapping[str, bytes] = field(default_factory=dict)
    conflicts: tuple[Conflict, ...] = ()
    merged: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


_Compose = Callable[[Listing], _Composed]
"""Makes of the newest listing the one that is wanted."""


class Rewriter:
    """Writes snapshots of one agent's region that are made of earlier ones.

    Its methods raise ``NotFoundError`` for what is not in the history, ``FrozenError`` when a frozen file
    would not stay as it is, ``StoreError`` and its kinds.
    """

    def __init__(self, store: ObjectStore, agent: str, region: str, reporter: Reporter) -> None:
        self._store = store
        self._agent = check_id("agent", agent)
        self._region = check_id("region", region)
        self._reporter = reporter
        self._history = History(store, agent, region)
        self._uploader = Uploader(store, agent, may_be_there=True)

    def restore(self, number: int, path: bytes = b"", *, upon: int | None = None) -> RewriteReport:
        """Make ``path``, and everything below it, what it was in a snapshot; all else stays.

        ``upon``: only while that is the newest snapshot, or else raise ``BusyError``.
        """
        where = f" of {printable(path)}" if path else ""
        reason = f"restore{where} from snapshot {number}"
        return self._commit(self._restoring(number, path), f"restore-of-{number}", reason, upon)

    def plan_restore(self, number: int, path: bytes = b"") -> RewritePlan:
        """What :meth:`restore` would do now."""
        return self._plan(self._restoring(number, path))

    def _restoring(self, number: int, path: bytes) -> _Compose:
        old = read_snapshot(self._history, self._agent, number)
        find(old, path)
        wanted = by_path(old.entries)

        def compose(theirs: Listing) -> _Composed:
            return _Composed(_replaced(theirs, wanted, path) if path else wanted)

        return compose

    def revert(self, execution: str, *, upon: int | None = None) -> RewriteReport:
        """Take back what one execution changed; what later ones changed stays. Once: not what was taken
        back already, unless that was reverted since.

        ``upon`` as in :meth:`restore`. Raises ``NotFoundError`` also when a snapshot that is needed for
        comparison was collected.
        """
        compose = self._reverting(execution)
        return self._commit(compose, _reverting(execution), f"revert of execution {execution}", upon)

    def plan_revert(self, execution: str) -> RewritePlan:
        """What :meth:`revert` would do now."""
        return self._plan(self._reverting(execution))

    def _reverting(self, execution: str) -> _Compose:
        steps = self._steps_of(check_id("execution", execution))
        name = _reverting(execution)

        def compose(theirs: Listing) -> _Composed:
            composed = _Composed(theirs)
            for before, after in steps:
                composed = self._undo(composed, before, after, name)
            return composed

        return compose

    def _steps_of(self, execution: str) -> list[tuple[Listing, Listing]]:
        """What an execution did, the last first: listings before and after each row of its snapshots; nothing
        if it is taken back."""
        require_newest(self._history, self._agent)
        rows: list[tuple[int, Snapshot]] = []  # what the first one follows, and the last one
        resumed: set[int] = set()
        last: dict[str, int] = {}
        for number, found in self._history.newest_first(ends_only=True):
            if not isinstance(found, Snapshot):
                raise found
            last.setdefault(found.execution, number)
            if found.execution != execution:
                continue
            resumed.add(found.resumes)
            if rows and rows[-1][0] == number:
                rows[-1] = (found.follows, rows[-1][1])
            else:
                rows.append((found.follows, found))
        if not rows:
            raise NotFoundError(
                f"execution {execution} made no snapshot of agent {self._agent} that is still there",
                hint=f"agentfuse log --agent {self._agent} lists who made which",
            )
        if _is_reverted(execution, last):
            return []
        for number in resumed - {0}:
            if not any(follows < number <= row.number for follows, row in rows):
                raise self._collected(execution, number, "which it made")
        return [(self._before(follows, row), by_path(row.entries)) for follows, row in rows]

    def _before(self, follows: int, last: Snapshot) -> Listing:
        if follows == 0:
            return {b"": last.entries[0]}
        try:
            return by_path(self._history.read(follows).entries)
        except ObjectNotFoundError as error:
            raise self._collected(last.execution, follows, "which it began with") from error

    def _collected(self, execution: str, number: int, which: str) -> NotFoundError:
        return NotFoundError(
            f"what execution {execution} changed cannot be told: snapshot {number}, {which}, was collected",
            hint=f"agentfuse diff and restore work with the snapshots that agentfuse log --agent "
            f"{self._agent} lists",
        )

    def _undo(self, composed: _Composed, before: Listing, after: Listing, name: str) -> _Composed:
        merger = Merger(self._store, self._agent, name, self._read, composed.made)
        rebased, texts = merger.rebase(after, composed.entries, before)
        made = {rebased.entries[path].sha256: text for path, text in texts.items()}
        kept = [p for p, e in after.items() if p not in before and e.type != "dir" and p in rebased.entries]
        return _Composed(
            rebased.entries,
            {**composed.made, **made},
            (*composed.conflicts, *rebased.conflicts),
            (*composed.merged, *map(printable, texts)),
            (*composed.kept, *map(printable, kept)),
        )

    def _read(self, entry: Entry) -> bytes | None:
        try:
            return read_content(self._store, self._agent, entry)
        except (ObjectNotFoundError, IntegrityError):
            return None

    def _plan(self, compose: _Compose) -> RewritePlan:
        newest = require_newest(self._history, self._agent)
        theirs = by_path(self._history.read(newest).entries)
        composed = compose(theirs)
        _require_frozen_kept(theirs, composed.entries)
        changed = tuple(changes(theirs, composed.entries))
        return RewritePlan(newest, changed, composed.conflicts, composed.merged, composed.kept)

    def _commit(self, compose: _Compose, name: str, reason: str, upon: int | None) -> RewriteReport:
        for _ in range(MAX_RACES):
            newest = require_newest(self._history, self._agent)
            if upon not in (None, newest):
                raise BusyError(
                    f"agent {self._agent}: snapshot {newest} was made meanwhile", hint="look at it again"
                )
            theirs = by_path(self._history.read(newest).entries)
            composed = compose(theirs)
            _require_frozen_kept(theirs, composed.entries)
            if not is_changed(theirs, composed.entries):
                return RewriteReport(None, Summary(), composed.conflicts, composed.merged, composed.kept)
            entries = self._place(composed, theirs)
            follows, resumes = self._history.stretch(newest, name)
            snapshot = Snapshot(
                agent=self._agent,
                region=self._region,
                number=newest + 1,
                parent=newest,
                follows=follows,
                resumes=resumes,
                execution=name,
                commit=str(uuid.uuid4()),
                reason=reason,
                time=datetime.datetime.now(datetime.UTC),
                entries=list(entries.values()),
            )
            if self._history.commit(snapshot):
                changed = summarise(theirs, entries)
                return RewriteReport(newest + 1, changed, composed.conflicts, composed.merged, composed.kept)
        raise StoreError(f"agent {self._agent}: lost {MAX_RACES} commits in a row to executions")

    def _place(self, composed: _Composed, theirs: Listing) -> dict[bytes, Entry]:
        """The entries with a place that is safe from collection for every content."""
        places = {e.sha256: Place(e.object, e.offset) for e in theirs.values() if e.object}
        places.update(self._uploader.places())
        files = {e.sha256: e for e in composed.entries.values() if e.size and e.sha256 not in places}
        if files:
            meter = Meter(
                self._reporter,
                "flush",
                total_files=len(files),
                total_bytes=sum(entry.size for entry in files.values()),
            )
            self._uploader.send(files.values(), partial(self._opened, composed.made), meter)
            meter.tell()
            places.update(self._uploader.places())
        return {path: placed(entry, places) for path, entry in composed.entries.items()}

    def _opened(self, made: Mapping[str, bytes], entry: Entry) -> Readable:
        if entry.sha256 in made:
            return io.BytesIO(made[entry.sha256])
        return StoredSource(self._store, self._agent, entry)


def _reverting(execution: str) -> str:
    """Under which execution's name another one is taken back."""
    return f"revert-of-{execution}"


def _is_reverted(execution: str, last: Mapping[str, int]) -> bool:
    """Whether an execution is taken back and that was not taken back; ``last``: each one's last snapshot."""
    name = _reverting(execution)
    return last.get(name, 0) > last.get(execution, 0) and not _is_reverted(name, last)


def _require_frozen_kept(theirs: Listing, wanted: Listing) -> None:
    for path, entry in theirs.items():
        if entry.is_frozen:
            found = wanted.get(path)
            if found is None or (found.type, found.sha256, found.mode, found.is_frozen) != (
                entry.type,
                entry.sha256,
                entry.mode,
                True,
            ):
                raise FrozenError(f"{printable(path)!r} is frozen", hint="have it thawed first")


def _replaced(theirs: Listing, wanted: Listing, path: bytes) -> dict[bytes, Entry]:
    """``theirs`` with ``path``, all below it and what belongs to it as in ``wanted``."""
    tops = whole(path, theirs, wanted)
    gone = {each for top in tops for each in below(theirs, top)}
    taken = {each: entry for top in tops for each, entry in below(wanted, top).items()}
    entries = {each: entry for each, entry in theirs.items() if each not in gone}
    first_free = 1 + max((entry.link for entry in entries.values()), default=0)
    for each, entry in taken.items():
        link = entry.link and entry.link + first_free
        entries[each] = msgspec.structs.replace(entry, link=link)
    above = parent_of(path)
    while above not in entries or entries[above].type != "dir":
        if above in entries:
            raise UsageError(
                f"{printable(above)} is no directory any more, so {printable(path)} cannot be in it",
                hint=f"restore {printable(above)} itself, or into a directory with --to",
            )
        entries[above] = wanted[above]
        above = parent_of(above)
    links = names_by_inode(entries.values())
    lone = {names[0] for names in links.values() if len(names) == 1}
    return in_tree_order(
        msgspec.structs.replace(entry, link=0) if each in lone else entry for each, entry in entries.items()
    )
