"""What this host notes of its executions, beside their records: ``STATE/gateway/executions/<execution>/``.

The note is there before anything else of the execution is, and goes after everything else: so a gateway that
was killed finds all that it had begun, though the store has many records of others.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from agentfuse.errors import EnvironmentProblem
from agentfuse.home.tree import sync_directory, write_durably

_LOG = logging.getLogger(__name__)
_NOTE = "note.json"


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """An execution that this host began. ``staged``: the ids of the files that it claims for it.

    ``ended_at``: its record is terminal, in seconds since the epoch; what is left here is for operators.
    """

    id: str
    organization: str
    agent: str
    staged: list[str] = []
    ended_at: float | None = None


class Journal:
    """The notes of a state directory. Every method blocks."""

    def __init__(self, state: Path) -> None:
        self.path = state / "gateway" / "executions"

    def directory(self, execution: str) -> Path:
        """Where this host keeps what it needs for an execution."""
        return self.path / execution

    def write(self, note: Note) -> None:
        """Note an execution, or note it anew; durable when this returns."""
        directory = self.directory(note.id)
        try:
            if not directory.is_dir():
                directory.mkdir(mode=0o700, parents=True)
                sync_directory(self.path)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot make {directory}: {os.strerror(error.errno or 0)}",
                hint="the state directory must be writable and have free space",
            ) from error
        write_durably(directory / _NOTE, msgspec.json.encode(note) + b"\n")

    def notes(self) -> Iterator[Note]:
        """All of them that can be read; a damaged one is told, and holds up no other."""
        try:
            names = sorted(os.listdir(self.path))
        except FileNotFoundError:
            return
        for name in names:
            try:
                data = (self.path / name / _NOTE).read_bytes()
            except FileNotFoundError:
                continue  # it is being made, or removed
            try:
                yield _NOTES.decode(data)
            except msgspec.DecodeError as error:
                _LOG.error(
                    "%s is damaged, so nothing is done about its execution: %s; see what its record "
                    "says, then remove the directory",
                    self.path / name / _NOTE,
                    error,
                )

    def sweep(self) -> None:
        """Remove what has no note: a gateway was killed while it was made, or removed. For the start only."""
        for directory in self.path.glob("*"):
            if not (directory / _NOTE).exists():
                self.forget(directory.name)

    def forget(self, execution: str) -> None:
        """Remove what is noted of an execution."""
        directory = self.directory(execution)
        with suppress(FileNotFoundError):
            (directory / _NOTE).unlink()
        shutil.rmtree(directory, ignore_errors=True)


# msgspec learns a type at its first use; two threads at once would crash the process.
_NOTES = msgspec.json.Decoder(Note)
