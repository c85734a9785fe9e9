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

    def close(self) -> None:
        """Close the database; the next use opens it again."""
        self._log.close()


_WEBHOOKS = """CREATE TABLE IF NOT EXISTS webhooks (
    name TEXT PRIMARY KEY, reached INTEGER NOT NULL, upto INTEGER
) STRICT"""
