"""What was last synced of a region, in SQLite, so that a commit reads only the files that changed.

All of it can be lost: a damaged database is moved aside, and everything is hashed again. The number of
the snapshot that the tree was last equal to stands in a small file beside it (``index.base``), because
it cannot be found out again. The only SQL of the durability part; knows no snapshots and no store.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from agentfuse.home.database import LocalDatabase, require_schema
from agentfuse.home.tree import write_durably
from agentfuse.killpoints import passing

if TYPE_CHECKING:
    from sqlite_utils import Database

SCHEMA = 2


class Row(NamedTuple):
    """One path as it was when it was last synced.

    ``ino``, ``size``, ``mtime_ns`` and ``ctime_ns`` tell whether a file is still the one it was.
    ``xattrs`` are opaque bytes of the caller's; ``sha256`` and ``object`` are hexadecimal or empty.
    """

    path: bytes
    ino: int
    ctime_ns: int
    type: str
    mode: int
    mtime_ns: int
    size: int
    sha256: str
    object: str
    offset: int
    target: bytes
    link: int
    xattrs: bytes


class Base(NamedTuple):
    """What the rows are. ``number``: the newest snapshot known when they were written, 0 for none.

    ``exact``: they are that snapshot's listing, path by path. ``lost``: they are gone, and ``number`` is
    a snapshot that the tree was once equal to.
    """

    number: int
    exact: bool
    lost: bool = False


class Intent(NamedTuple):
    """A commit that was begun, by its id, and the snapshot that it was to be."""

    commit: str
    number: int


class Index:
    """The index of one home's region. Safe from any thread; opened at first use.

    ``only_looks``: nothing is written, and a damaged one is an ``IntegrityError`` rather than moved aside.
    Raises ``EnvironmentProblem`` when the database can be neither opened nor made.
    """

    def __init__(self, path: Path, *, only_looks: bool = False) -> None:
        self._path = path
        self._number_path = path.with_suffix(".base")
        self._lock = threading.RLock()
        # The lock of this class is what makes one connection safe from several threads.
        self._database = LocalDatabase(
            path,
            _accept if only_looks else _prepare,
            name="index",
            loss="all files are hashed again",
            only_looks=only_looks,
        )

    def load(self) -> tuple[Base, list[Row]]:
        """All rows and what they are. Nothing written yet is snapshot 0, exactly, with no rows."""
        with self._lock:
            loaded = self._database.use(_load) if self._path.exists() else None
            return loaded or (self._base_beside(), [])

    def write(self, base: Base, *, changed: Iterable[Row], removed: Iterable[bytes] = ()) -> None:
        """Note what was synced, in one transaction: new and changed rows, paths that are gone, the base."""
        with self._lock:
            passing("note.begun")
            self._database.use(lambda db: _write(db, base, changed, removed))
            passing("note.between")
            if base.exact:
                self.begin(base.number)
            passing("note.written")

    def intend(
        self, intent: Intent, base: Base, *, changed: Iterable[Row], removed: Iterable[bytes] = ()
    ) -> None:
        """Note what :meth:`write` is to note when a commit has succeeded, which may never be learned here."""
        with self._lock:
            self._database.use(lambda db: _intend(db, intent, base, changed, removed))
            passing("intent.noted")

    def intents(self) -> list[Intent]:
        """The commits of which nothing was noted since they were begun."""
        with self._lock:
            return (self._database.use(_intents) if self._path.exists() else None) or []

    def fulfil(self, commit: str) -> None:
        """This one of the intents has succeeded after all: note what it was to, and forget all others."""
        with self._lock:
            found = self._database.use(lambda db: _intended(db, commit))
            if found is not None:
                self.write(found[0], changed=found[1], removed=found[2])

    def give_up(self, commit: str) -> None:
        """This one of the intents has failed for good."""
        with self._lock:
            self._database.use(lambda db: db.table("intents").delete_where("commit_id = ?", [commit]))

    def begin(self, number: int) -> None:
        """Note, before there are any rows, which snapshot the tree is equal to."""
        with self._lock:
            write_durably(self._number_path, b"%d\n" % number)

    def reprint(self, prints: Iterable[tuple[bytes, str, int, int, bytes]]) -> None:
        """Note what files have become whose contents were brought: (path, sha256, ino, ctime_ns, xattrs).

        A row that says otherwise of the content or the attributes, or is gone, stays as it is.
        """
        with self._lock:
            self._database.use(lambda db: _reprint(db, prints))

    def clear(self) -> None:
        """Forget everything: the tree is about to be made anew."""
        with self._lock:
            self.close()
            for path in (*self._database.files(), self._number_path):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the database; the next use opens it again."""
        with self._lock:
            self._database.close()

    def _base_beside(self) -> Base:
        try:
            return Base(int(self._number_path.read_text()), exact=False, lost=True)
        except (FileNotFoundError, ValueError):
            return Base(0, exact=True)


# -- SQL

_COLUMNS = {
    "path": bytes,
    "ino": int,
    "ctime_ns": int,
    "type": str,
    "mode": int,
    "mtime_ns": str,  # an agent can set times that 64 bits of nanoseconds cannot hold
    "size": int,
    "sha256": str,
    "object": str,
    "offset": int,
    "target": bytes,
    "link": int,
    "xattrs": bytes,
    "check": int,
}
_Noted = tuple[Base, list[tuple[Any, ...]], list[bytes]]
_INTENT_COLUMNS = {"commit_id": str, "number": int, "noted": bytes, "check": int}
_INO, _MTIME = Row._fields.index("ino"), Row._fields.index("mtime_ns")


def _accept(db: Database) -> None:
    require_schema(db, SCHEMA)


def _prepare(db: Database) -> None:
    """Make the tables, or accept those that are there."""
    found = require_schema(db, *range(SCHEMA + 1))
    db.enable_wal()
    db.execute("PRAGMA synchronous = FULL")
    if found == SCHEMA:
        return
    with db.atomic():
        if found == 0:
            db.table("synced").create(_COLUMNS, pk="path", not_null=set(_COLUMNS), strict=True)
            db.table("base").create({"id": int, "number": int, "exact": int, "rows": int}, pk="id")
        db.table("intents").create(_INTENT_COLUMNS, pk="commit_id")
        db.execute(f"PRAGMA user_version = {SCHEMA}")


def _load(db: Database) -> tuple[Base, list[Row]] | None:
    found = db.execute("SELECT number, exact, rows FROM base").fetchone()
    if found is None:
        return None
    rows = [_from_columns(columns) for columns in db.execute("SELECT * FROM synced ORDER BY path")]
    if len(rows) != found[2]:
        raise ValueError(f"{len(rows)} rows of {found[2]}")
    return Base(found[0], bool(found[1])), rows


def _write(db: Database, base: Base, changed: Iterable[Row], removed: Iterable[bytes]) -> None:
    insert = f"INSERT OR REPLACE INTO synced VALUES ({','.join('?' * len(_COLUMNS))})"
    with db.atomic():
        db.conn.executemany("DELETE FROM synced WHERE path = ?", ((path,) for path in removed))
        db.conn.executemany(insert, map(_to_columns, changed))
        record = {"id": 1, "number": base.number, "exact": int(base.exact), "rows": db.table("synced").count}
        db.table("base").upsert(record, pk="id")
        db.execute("DELETE FROM intents")


def _intend(
    db: Database, intent: Intent, base: Base, changed: Iterable[Row], removed: Iterable[bytes]
) -> None:
    noted = msgspec.msgpack.encode((base, list(map(_to_columns, changed)), list(removed)))
    columns = (*intent, noted)
    with db.atomic():
        db.execute("INSERT INTO intents VALUES (?, ?, ?, ?)", (*columns, _checksum(columns)))


def _intents(db: Database) -> list[Intent]:
    return [Intent(*row) for row in db.execute("SELECT commit_id, number FROM intents ORDER BY number")]


def _intended(db: Database, commit: str) -> tuple[Base, list[Row], list[bytes]] | None:
    found = db.execute("SELECT * FROM intents WHERE commit_id = ?", (commit,)).fetchone()
    if found is None:
        return None
    if _checksum(found[:-1]) != found[-1]:
        raise ValueError(f"wrong checksum at commit {commit}")
    base, changed, removed = _NOTED.decode(found[2])
    return base, [_from_columns(columns) for columns in changed], removed


def _reprint(db: Database, prints: Iterable[tuple[bytes, str, int, int, bytes]]) -> None:
    insert = f"INSERT OR REPLACE INTO synced VALUES ({','.join('?' * len(_COLUMNS))})"
    with db.atomic():
        for path, sha256, ino, ctime_ns, xattrs in prints:
            found = db.execute("SELECT * FROM synced WHERE path = ?", (path,)).fetchone()
            row = _from_columns(found) if found is not None else None
            if row is not None and (row.sha256, row.xattrs) == (sha256, xattrs):
                db.execute(insert, _to_columns(row._replace(ino=ino, ctime_ns=ctime_ns)))


def _to_columns(row: Row) -> tuple[object, ...]:
    ino = row.ino - 2**64 if row.ino >= 2**63 else row.ino  # SQLite's integers are signed
    columns = (*row[:_INO], ino, *row[_INO + 1 : _MTIME], str(row.mtime_ns), *row[_MTIME + 1 :])
    return (*columns, _checksum(columns))


def _from_columns(columns: tuple[Any, ...]) -> Row:
    if _checksum(columns[:-1]) != columns[-1]:
        raise ValueError(f"wrong checksum at {columns[0]!r}")
    row = Row._make(columns[:-1])
    return row._replace(ino=row.ino % 2**64, mtime_ns=int(columns[_MTIME]))


def _checksum(columns: tuple[object, ...]) -> int:
    """SQLite would not notice a flipped bit in a value; a wrong hash must not get into a snapshot."""
    return zlib.crc32(msgspec.msgpack.encode(columns))


# msgspec learns a type at its first use; two threads at once would crash the process.
_NOTED = msgspec.msgpack.Decoder(_Noted)
