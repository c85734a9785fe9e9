"""How far those who hand events on, or files in, have got: a few rows in the database of the event log.

What is in it must not be ahead of the log, so it lives and dies with it. Blocking: for threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from agentfuse.events.log import EventLog

if TYPE_CHECKING:
    from sqlite_utils import Database


class Place(NamedTuple):
    """Where a webhook is in the log: everything to ``reached`` is delivered; what may be on its way, from
    there to ``upto``, goes as one batch again."""

    reached: int
    upto: int | None = None


class Drop(NamedTuple):
    """What is known of a file in an inbox, which is told from others by ``identity``.

    ``since_ns``: when it was begun to take it, by the clock of files; 0: it was refused, which was told.
    """

    identity: str
    since_ns: int


class Bookmarks:
    """The rows of one home. Raises ``EnvironmentProblem`` when the machine does not let it be written."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def place(self, name: str) -> Place | None:
        """How far a webhook has got; None: it has never got anything."""
        if not self._log.exists():
            return None

        def read(db: Database) -> Place | None:
            db.execute(_WEBHOOKS)
            found = db.execute("SELECT reached, upto FROM webhooks WHERE name = ?", [name]).fetchone()
            return None if found is None else Place(*found)

        return self._log.use(read)

    def set_place(self, name: str, place: Place) -> None:
        """Note how far a webhook has got."""

        def write(db: Database) -> None:
            with db.atomic():
                db.execute(_WEBHOOKS)
                db.execute("INSERT OR REPLACE INTO webhooks VALUES (?, ?, ?)", [name, *place])

        self._log.use(write)

    def drops(self, directory: str) -> dict[bytes, Drop]:
        """What is known of the files in an inbox, by their paths in it."""
        if not self._log.exists():
            return {}

        def read(db: Database) -> dict[bytes, Drop]:
            db.execute(_INBOXES)
            rows = db.execute("SELECT path, identity, since_ns FROM inboxes WHERE directory = ?", [directory])
            return {path: Drop(identity, since_ns) for path, identity, since_ns in rows}

        return self._log.use(read) or {}

    def set_drop(self, directory: str, path: bytes, drop: Drop | None) -> None:
        """Note what is known of a file in an inbox; None: nothing, it is gone."""

        def write(db: Database) -> None:
            with db.atomic():
                db.execute(_INBOXES)
                if drop is None:
                    db.execute("DELETE FROM inboxes WHERE directory = ? AND path = ?", [directory, path])
                else:
                    db.execute("INSERT OR REPLACE INTO inboxes VALUES (?, ?, ?, ?)", [directory, path, *drop])

        self._log.use(write)

    def close(self) -> None:
        """Close the database; the next use opens it again."""
        self._log.close()


_WEBHOOKS = """CREATE TABLE IF NOT EXISTS webhooks (
    name TEXT PRIMARY KEY, reached INTEGER NOT NULL, upto INTEGER
) STRICT"""
_INBOXES = """CREATE TABLE IF NOT EXISTS inboxes (
    directory TEXT, path BLOB, identity TEXT NOT NULL, since_ns INTEGER NOT NULL,
    PRIMARY KEY (directory, path)
) STRICT, WITHOUT ROWID"""
