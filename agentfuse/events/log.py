"""The durable log of a home's events, numbered from 1 without gaps, in SQLite beside the tree.

In the same transaction as its events stands what they told of each file, so that after a crash, or any
time that nobody listened, comparing that with the tree finds exactly what was not told. Blocking: for
threads. Knows no FUSE and no subscribers.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from agentfuse.errors import EnvironmentProblem
from agentfuse.events.arrivals import Judgement, Kind, Operation, Seen, judge
from agentfuse.events.content import HASHED_BYTES, UNKNOWN, look_at
from agentfuse.home.database import LocalDatabase, require_schema
from agentfuse.home.mime import type_of
from agentfuse.home.walk import Cursor
from agentfuse.killpoints import passing
from agentfuse.regions import Creator

if TYPE_CHECKING:
    from sqlite_utils import Database

_T = TypeVar("_T")

SCHEMA = 2
KEPT = 250_000
"""So many events are kept at least, the newest ones: an agent that rewrites a file in a loop must not
fill the disk with them."""

_HASHED_AT_ONCE = 32 * 1024 * 1024
"""So much is read for hashes in one transaction, so that nobody waits long for the events in it."""

_NOT_THERE = ("deleted", "refused")


class Event(NamedTuple):
    """One thing that happened to one file.

    ``path`` is relative to the region; ``old_path`` is where a moved file was. ``size`` is the file's, a
    deleted one's as it was last told of. ``mime`` is None when nothing is known of the content.
    """

    seq: int
    time: float
    kind: Kind
    mask: str
    region: str
    path: bytes
    old_path: bytes | None
    size: int
    mime: str | None
    sha256: str | None
    created_by: str

    def to_json(self, *, execution: str, agent: str) -> bytes:
        """The event as one line of ASCII; bytes of a path that are not UTF-8 are lone surrogates."""
        fields: dict[str, Any] = self._asdict()
        fields["mask"] = [self.mask] if self.mask else []
        fields["path"] = os.fsdecode(self.path)
        fields["old_path"] = None if self.old_path is None else os.fsdecode(self.old_path)
        fields |= {"execution": execution, "agent": agent}
        return json.dumps(fields, separators=(",", ":")).encode("ascii")


class Happened(NamedTuple):
    """Something that happened in a region, and when."""

    region: str
    time: float
    operation: Operation


class EventLog:
    """The log of one home. Safe from any thread; opened at first use.

    ``tree``: where the regions' directories are. Raises ``EnvironmentProblem`` when the machine does not
    let it be written; a damaged log is moved aside, and the files there are told of again, from number 1.
    ``only_looks``: nothing is written, and a damaged one is an ``IntegrityError``.
    """

    def __init__(self, path: Path, tree: Path, *, kept: int = KEPT, only_looks: bool = False) -> None:
        self.tree = tree
        self._path = path
        self._kept = kept
        self._lock = threading.Lock()
        self._hashed_left = 0
        self._database = LocalDatabase(
            path,
            _accept if only_looks else _prepare,
            name="event log",
            loss="events are numbered anew, and files told of again",
            only_looks=only_looks,
        )

    def exists(self) -> bool:
        """Whether anything was ever written."""
        return self._path.exists()

    def append(self, batch: Sequence[Happened], *, silently: bool = False) -> list[Event]:
        """Judge what happened and write the events that it makes, all or none; return them.

        ``silently``: nobody is told, it is only noted that these files are known.
        """
        with self._lock:
            passing("announce.begun")
            for _ in range(2):  # if it was damaged once more, with a new one
                events = self._database.use(lambda db: self._write(db, batch, silently))
                if events is not None:
                    passing("announce.committed")
                    return events
        raise EnvironmentProblem(f"event log {self._path}: damaged as soon as it was made")

    def read(self, after: int, limit: int) -> list[Event]:
        """The events numbered higher than ``after``, in order, ``limit`` at most."""
        with self._lock:
            return self._database.use(lambda db: _read(db, after, limit)) or []

    def newest(self) -> int:
        """The number of the newest event, 0 when there is none."""
        if not self.exists():
            return 0
        with self._lock:
            return (self._database.use(_span) or (0, 0))[1]

    def known(self, region: str) -> dict[bytes, Seen]:
        """Every file of a region that was told of, and is not known to be gone, as it was then."""
        with self._lock:
            return dict(self._database.use(lambda db: _KnownRows(db, region).at(b"")) or [])

    def gaps(self) -> int:
        """How many numbers are missing between the oldest event that is kept and the newest."""
        with self._lock:
            return self._database.use(_gaps) or 0

    def use(self, work: Callable[[Database], _T]) -> _T | None:
        """``work`` with the database, for the tables of others in it; None if that was damaged."""
        with self._lock:
            return self._database.use(work)

    def close(self) -> None:
        """Close the database; the next use opens it again."""
        with self._lock:
            self._database.close()

    def _write(self, db: Database, batch: Sequence[Happened], silently: bool) -> list[Event]:
        with db.atomic():
            oldest, number = _span(db)
            events: list[Event] = []
            self._hashed_left = _HASHED_AT_ONCE
            for region, time, operation in batch:
                known = _KnownRows(db, region)
                judged = list(judge(operation, known))
                if judged:
                    described = list(self._described(judged, known, time, number + len(events) + 1))
                    events += [] if silently else described
            db.conn.executemany(f"INSERT INTO events VALUES ({_MARKS})", events)
            number += len(events)
            if number - oldest >= self._kept * 1.1:
                db.execute("DELETE FROM events WHERE seq <= ?", [number - self._kept])
            passing("announce.judged")
        return events

    def _described(
        self, judged: Iterable[Judgement], known: _KnownRows, time: float, number: int
    ) -> Iterator[Event]:
        region = known.region
        with Cursor(self.tree / region) as cursor:
            for seq, (kind, how, path, seen, old_path, told) in enumerate(judged, number):
                # Of a file that nobody told of before and that is gone by now, nothing says more than this.
                is_known = kind in ("moved", "deleted")
                creator = known.creator_of(old_path or path) if is_known else told
                content, mime = UNKNOWN, None
                if kind not in _NOT_THERE:
                    hashed = min(HASHED_BYTES, self._hashed_left)
                    content = look_at(cursor, path, seen, hashed_bytes=hashed)
                    self._hashed_left -= seen.size if content.sha256 else 0
                    mime, creator = type_of(path, content.head), content.created_by or creator
                    known.set_creator(path, creator)
                yield Event(
                    seq, time, kind, how, region, path, old_path, seen.size, mime, content.sha256, creator
                )


# -- SQL

_MARKS = ",".join("?" * len(Event._fields))


def _accept(db: Database) -> None:
    require_schema(db, SCHEMA)


def _prepare(db: Database) -> None:
    """Make the tables, or accept those that are there."""
    found = require_schema(db, 0, SCHEMA)
    db.enable_wal()
    # No fsync at each commit: a killed process loses nothing by that. What a power cut takes, the tree
    # still shows, and it is told of at the next start.
    db.execute("PRAGMA synchronous = NORMAL")
    if found == 0:
        with db.atomic():
            db.table("events").create(
                {
                    "seq": int,
                    "time": float,
                    "kind": str,
                    "mask": str,
                    "region": str,
                    "path": bytes,
                    "old_path": bytes,
                    "size": int,
                    "mime": str,
                    "sha256": str,
                    "created_by": str,
                },
                pk="seq",
                strict=True,
            )
            known = {"region": str, "path": bytes, "seen": str, "created_by": str}
            db.table("known").create(known, pk=("region", "path"), strict=True)
            db.execute(f"PRAGMA user_version = {SCHEMA}")
    db.execute("CREATE INDEX IF NOT EXISTS known_seen ON known (region, seen)")


def _span(db: Database) -> tuple[int, int]:
    oldest, newest = db.execute("SELECT min(seq), max(seq) FROM events").fetchone()
    return oldest or 1, newest or 0


def _gaps(db: Database) -> int:
    oldest, newest = _span(db)
    return newest - oldest + 1 - int(db.table("events").count) if newest else 0


def _read(db: Database, after: int, limit: int) -> list[Event]:
    rows = db.execute("SELECT * FROM events WHERE seq > ? ORDER BY seq LIMIT ?", [after, limit])
    return [Event._make(row) for row in rows]


class _KnownRows:
    """What was told of the files of a region, within a transaction."""

    def __init__(self, db: Database, region: str) -> None:
        self._db = db
        self.region = region
        self._gone: dict[bytes, Creator] = {}

    def get(self, path: bytes) -> Seen | None:
        found = self._db.execute(
            "SELECT seen FROM known WHERE region = ? AND path = ?", [self.region, path]
        ).fetchone()
        return None if found is None else _to_seen(found[0])

    def put(self, path: bytes, seen: Seen) -> None:
        # As text: numbers that agents can set are larger than SQLite's.
        row = [self.region, path, " ".join(map(str, seen)), Creator.AGENT]
        self._db.execute(
            "INSERT INTO known VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET seen = excluded.seen", row
        )

    def remove(self, path: bytes) -> None:
        self._gone[path] = self.creator_of(path)
        self._db.execute("DELETE FROM known WHERE region = ? AND path = ?", [self.region, path])

    def creator_of(self, path: bytes) -> Creator:
        """Who made the file that is known at a path, or was until now, as was last told; else the agent."""
        if path in self._gone:
            return self._gone[path]
        found = self._db.execute(
            "SELECT created_by FROM known WHERE region = ? AND path = ?", [self.region, path]
        ).fetchone()
        return Creator.AGENT if found is None else Creator(found[0])

    def set_creator(self, path: bytes, creator: Creator) -> None:
        """Note who made the file that is known at a path."""
        self._db.execute(
            "UPDATE known SET created_by = ? WHERE region = ? AND path = ?", [creator, self.region, path]
        )

    def at(self, path: bytes) -> list[tuple[bytes, Seen]]:
        below = path and path + b"/"
        rows = self._db.execute(
            "SELECT path, seen FROM known WHERE region = ? AND (path = ? OR path >= ? AND path < ?)"
            " ORDER BY path",
            [self.region, path, below, path + b"0" if path else b"\xff" * 5000],
        )
        return [(each, _to_seen(seen)) for each, seen in rows]

    def names_of(self, ino: int) -> list[tuple[bytes, Seen]]:
        rows = self._db.execute(
            "SELECT path, seen FROM known WHERE region = ? AND seen >= ? AND seen < ? ORDER BY path",
            [self.region, f"{ino} ", f"{ino}!"],
        ).fetchall()
        return [(path, _to_seen(seen)) for path, seen in rows]


def _to_seen(text: str) -> Seen:
    ino, size, mtime_ns = map(int, text.split())
    return Seen(ino, size, mtime_ns)
