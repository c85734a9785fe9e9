"""One SQLite file of ours beside a home's tree: opened at first use, moved aside when it is damaged.

What is in it is its user's; see ``home.index`` and ``events.log``, where all SQL is.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from agentfuse.errors import EnvironmentProblem, IntegrityError

if TYPE_CHECKING:
    from sqlite_utils import Database

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_OF_THE_MACHINE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
"""Errors that say nothing about the database itself, so it is not given up for them."""


def require_schema(db: Database, *known: int) -> int:
    """The number of a database's schema, 0 of a new one; ``ValueError`` unless it is one of these."""
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    if found not in known:
        raise ValueError(f"schema {found}, this version of agentfuse knows {known[-1]}")
    return found


class LocalDatabase:
    """One database; its user sees to it that threads take turns.

    ``prepare`` makes the tables, or raises ``ValueError`` when those that are there are not its own.
    ``name`` and ``loss`` say, in a warning, what the database is and what follows from losing it.
    ``only_looks``: it is there, nothing is written, and one that is damaged is an ``IntegrityError``.
    """

    def __init__(
        self,
        path: Path,
        prepare: Callable[[Database], None],
        *,
        name: str,
        loss: str,
        only_looks: bool = False,
    ) -> None:
        self._path = path
        self._prepare = prepare
        self._name = name
        self._loss = loss
        self._only_looks = only_looks
        self._db: Database | None = None

    def use(self, work: Callable[[Database], _T]) -> _T | None:
        """``work`` with the database; None if that was damaged, which moves it aside.

        Raises ``EnvironmentProblem`` when the machine is at fault.
        """
        try:
            return work(self._open())
        except (sqlite3.DatabaseError, ValueError) as error:
            self.close()
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_MACHINE:
                raise EnvironmentProblem(
                    f"{self._name} {self._path}: {error}",
                    hint="the state directory must be writable and have free space",
                ) from error
            if self._only_looks:
                raise IntegrityError(
                    f"{self._name} {self._path}: {error}",
                    hint=f"the next mount moves it aside: {self._loss}",
                ) from error
            aside = f"{self._path}.corrupt-{time.time_ns()}"
            _log.warning("%s %s: %s; moved to %s, %s", self._name, self._path, error, aside, self._loss)
            for path in self.files():
                if path.exists():
                    os.replace(path, aside + path.name.removeprefix(self._path.name))
            return None

    def files(self) -> list[Path]:
        """The paths that the database may take on disk."""
        return [self._path.with_name(self._path.name + suffix) for suffix in ("", "-wal", "-shm")]

    def close(self) -> None:
        """Close it; the next use opens it again."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open(self) -> Database:
        if self._db is None:
            # 9 MB and 90 ms, which the mount of an empty memory does not need.
            from sqlite_utils import Database  # noqa: PLC0415

            where = f"{self._path.absolute().as_uri()}?mode={'ro' if self._only_looks else 'rwc'}"
            connection = sqlite3.connect(where, uri=True, check_same_thread=False)
            self._db = Database(connection, execute_plugins=False)
            self._prepare(self._db)
        return self._db
