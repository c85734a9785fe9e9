"""What restoring and committing say of themselves: while they run, and when they are done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agentfuse.progress import Progress, Reporter
from agentfuse.snapshots.rebase import Conflict

_INTERVAL_S = 0.05
_Path = bytes  # a report has a field of that name


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """A restore that is durable. ``number`` is None when the agent has no snapshot yet.

    ``files`` counts names of files, ``bytes`` their contents (each inode once), ``requests`` the reads of
    contents that it took. ``frozen``: the paths of the files that are.
    """

    number: int | None
    files: int = 0
    bytes: int = 0
    requests: int = 0
    frozen: Sequence[_Path] = ()


@dataclass(frozen=True, slots=True)
class CommitReport:
    """A commit that is durable. ``number`` is None when nothing had changed and nothing was written.

    ``files`` and ``bytes`` are the snapshot's totals, ``objects_put`` and ``bytes_put`` what travelled.
    ``merged``: paths of texts that hold what this execution and others wrote; on this host they still are
    as this one left them. ``skipped``: paths of sockets and device nodes, which are not kept.
    """

    number: int | None
    files: int = 0
    bytes: int = 0
    objects_put: int = 0
    bytes_put: int = 0
    conflicts: tuple[Conflict, ...] = ()
    skipped: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """``{number, files, bytes, objects_put, bytes_put, conflicts}``, the last a number."""
        return {
            "number": self.number,
            "files": self.files,
            "bytes": self.bytes,
            "objects_put": self.objects_put,
            "bytes_put": self.bytes_put,
            "conflicts": len(self.conflicts),
        }


class Meter:
    """Counts one phase of work and tells the reporter, not more often than it wants to hear."""

    def __init__(
        self,
        reporter: Reporter,
        phase: Literal["restore", "scan", "flush", "verify"],
        *,
        total_files: int = 0,
        total_bytes: int = 0,
    ) -> None:
        self._reporter = reporter
        self._phase = phase
        self._totals = (total_files, total_bytes)
        self._files = 0
        self._bytes = 0
        self._told_at = 0.0

    def add(self, *, files: int = 0, size: int = 0) -> None:
        """Some of the work is done: ``size`` in bytes."""
        self._files += files
        self._bytes += size
        if time.monotonic() - self._told_at >= _INTERVAL_S:
            self.tell()

    def tell(self) -> None:
        """Report where the work is now; the last word of a phase."""
        self._told_at = time.monotonic()
        total_files, total_bytes = self._totals
        self._reporter.progress(Progress(self._phase, self._files, total_files, self._bytes, total_bytes))
