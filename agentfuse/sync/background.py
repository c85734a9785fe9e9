"""Syncing during the run: what agents close goes to the store soon, and into a snapshot a little later.

Changes are noticed by their ``Changes``, captured at one moment (``scan.Capture``) and committed by their
``Memory``, in a thread; FUSE is only asked to stand still, for as long as copying takes what changed since
the look before. A failure costs a warning and another try: local work never waits for the store.

    clean --change--> waiting --due--> capturing --> sending | committing --> clean | waiting | failing
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import trio

from agentfuse.config import count, format_size
from agentfuse.errors import AgentfuseError, UnflushedError
from agentfuse.home.changes import Changes
from agentfuse.home.walk import local_disk
from agentfuse.killpoints import passing
from agentfuse.progress import Silent
from agentfuse.snapshots.entries import printable
from agentfuse.sync.conflicts import kept_below, path_of_kept
from agentfuse.sync.engine import Memory, Moment
from agentfuse.sync.reports import CommitReport
from agentfuse.sync.spool import Spool

log = logging.getLogger(__name__)
_T = TypeVar("_T")

EARLY = 0.6
"""Work begins after this share of an interval, so that it is done when the interval is over."""

_MOST_TOLD = 100
"""Conflicts that a status lists."""

RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""How long to wait after the first failure in a row, the second, and so on."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How soon, in seconds, what was closed is in the store, and what was changed in a snapshot."""

    sync_delay_s: float
    checkpoint_interval_s: float


class Gauges(NamedTuple):
    """What is not in a snapshot and for how long, the snapshots of this run, when (of the epoch) a region was
    last synced, and how often in a row that has failed since.
    """

    dirty_files: int
    dirty_bytes: int
    oldest_unsynced_s: float
    snapshots: int
    synced_at: float | None
    failures: int


class RegionSync:
    """Keeps one region of a mounted home in the store. The trio thread's, but for what it says it is not.

    ``still``: held while nothing in the home may change; ``spool_in``: a directory on the home's disk.
    ``is_unknown``: the region may hold what no snapshot does, from a run that did not end.
    """

    def __init__(
        self,
        name: str,
        memory: Memory,
        changes: Changes,
        *,
        still: Callable[[], AbstractContextManager[None]],
        spool_in: Path,
        pace: Pace,
        is_unknown: bool,
    ) -> None:
        self.name = name
        self._memory = memory
        self._root = memory.root
        self._changes = changes
        self._still = still
        self._spool_in = spool_in
        self._pace = pace
        self._limiter = trio.CapacityLimiter(1)
        self._wake = trio.Event()
        self._moved = trio.Event()
        self._stopping = False
        self._state: Literal["idle", "capturing", "sending", "committing", "failing"] = "idle"
        self._failures = 0
        self._retry_at = -math.inf
        self._committed_at = -math.inf
        self._committed_version = -1 if is_unknown else changes.version
        self._wanted_version = self._committed_version
        self._error: AgentfuseError | None = None
        self._last: CommitReport | None = None
        self._last_time: float | None = None
        self._conflicts: set[bytes] = set()
        self._snapshots = 0
        if is_unknown:
            changes.since = time.monotonic()
        changes.on_change = self._wake_up

    async def run(self) -> None:
        """Sync until :meth:`stop`; what is under way then is finished."""
        while not self._stopping:
            self._wake = trio.Event()
            due_at, commits = self._due()
            with trio.move_on_at(trio.current_time() + max(0.0, due_at - time.monotonic())):
                await self._wake.wait()
                continue
            await self._sync(commits=commits)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping = True
        self._wake_up()

    def hurry(self) -> int:
        """Begin to commit everything changed so far, which is the version returned."""
        wanted = self._changes.version
        self._wanted_version = max(self._wanted_version, wanted)
        self._retry_at = -math.inf
        self._wake_up()
        return wanted

    async def barrier(self, *, deadline: float) -> CommitReport | None:
        """Return when everything changed before the call is in a snapshot: the commit that it took, if any.

        ``deadline`` is by trio's clock. Raises ``UnflushedError`` that says why when it passes before.
        """
        before = self._committed_version
        wanted = self.hurry()
        with trio.move_on_at(deadline):
            while self._committed_version < wanted and not self._stopping:
                moved = self._moved
                await moved.wait()
        if self._committed_version < wanted:
            raise self._unsynced()
        return self._last if self._committed_version > before else None

    def as_dict(self) -> dict[str, object]:
        """The state as JSON values: sizes in bytes, ``*_at`` in seconds since the epoch, ages in seconds."""
        files, size = self._changes.totals()
        age_s = self._changes.age_s()
        return {
            "state": self._state,
            "dirty_files": files,
            "dirty_bytes": size,
            "oldest_unsynced_s": None if age_s is None else round(age_s, 1),
            "snapshot": self._last.number if self._last else None,
            "synced_at": self._last_time,
            "error": None if self._error is None else self._error.message,
            "failures": self._failures,
            "conflicts": [
                {"path": printable(path_of_kept(place)), "kept_at": printable(place)}
                for place in sorted(self._conflicts | set(kept_below(self._root, _MOST_TOLD)))[:_MOST_TOLD]
            ],
        }

    def gauges(self) -> Gauges:
        """The state in numbers, without a look at the disk."""
        files, size = self._changes.totals()
        age_s = self._changes.age_s()
        return Gauges(files, size, age_s or 0.0, self._snapshots, self._last_time, self._failures)

    # -- when

    def _wake_up(self) -> None:
        self._wake.set()

    def _due(self) -> tuple[float, bool]:
        """When the next step is due by the monotonic clock, and whether it is a commit."""
        if self._wanted_version > self._committed_version:
            return self._retry_at, True
        changes, pace = self._changes, self._pace
        send_at = _after(changes.closed_since, EARLY * pace.sync_delay_s)
        commit_at = _after(changes.since, EARLY * pace.checkpoint_interval_s)
        # One change now and then gets its snapshot at once; many share one.
        commit_at = max(min(send_at, commit_at), self._committed_at + EARLY * pace.checkpoint_interval_s)
        if changes.since is None:
            return math.inf, False
        if send_at < commit_at:
            return max(send_at, self._retry_at), False
        return max(commit_at, self._retry_at), True

    # -- what

    async def _sync(self, *, commits: bool) -> None:
        try:
            with contextlib.ExitStack() as stack, local_disk(self._spool_in):
                spool = stack.enter_context(Spool(self._spool_in))
                try:
                    await self._sync_through(spool, commits=commits)
                except trio.Cancelled:
                    stack.pop_all()  # an abandoned thread may still use it, and the process is about to end
                    raise
            self._succeeded()
        except AgentfuseError as error:
            self._failed(error)
        except Exception as error:  # a mistake of ours must not take the mount with it
            log.exception("%s/: unexpected error while syncing", self.name)
            self._failed(AgentfuseError(f"unexpected {type(error).__name__}: {error}"))
        self._moved.set()
        self._moved = trio.Event()

    async def _sync_through(self, spool: Spool, *, commits: bool) -> None:
        self._state = "capturing"
        moment, version = await self._capture(spool)
        if commits:
            self._state = "committing"
            report = await self._in_thread(lambda: self._memory.commit(Silent(), "checkpoint", moment))
            passing("checkpoint.committed")
            self._changes.captured_is_committed()
            self._committed_version = version
            self._note_commit(report)
        else:
            self._state = "sending"
            await self._in_thread(lambda: self._memory.send(moment, Silent()))
            passing("send.sent")
            self._changes.captured_is_lost()  # it is in no snapshot yet

    async def _capture(self, spool: Spool) -> tuple[Moment, int]:
        """One moment of the region, and the version that it is of."""
        moment = await self._in_thread(lambda: self._memory.moment(Silent(), spool))
        version = self._changes.capture()
        with contextlib.suppress(AgentfuseError):  # what moves under our eyes may look impossible
            await self._in_thread(moment.look)
            passing("capture.looked")
            if self._changes.version == version:
                return moment, version
        with self._still():
            passing("capture.still")
            version = self._changes.capture()
            await self._in_thread(moment.look)
            passing("capture.taken")
        passing("capture.moving")
        return moment, version

    def _note_commit(self, report: CommitReport) -> None:
        self._committed_at = time.monotonic()
        self._last_time = time.time()
        self._snapshots += report.number is not None
        if report.number is not None or self._last is None:
            self._last = report
        self._conflicts |= {each.kept_at for each in report.conflicts}

    def _succeeded(self) -> None:
        if self._failures:
            log.warning("%s/ is synced again", self.name)
        self._state, self._failures, self._error, self._retry_at = "idle", 0, None, -math.inf

    def _failed(self, error: AgentfuseError) -> None:
        self._changes.captured_is_lost()
        if self._error is None or self._error.message != error.message:
            log.warning("%s/ is not synced, and will be tried again: %s", self.name, error)
        wait_s = RETRY_S[min(self._failures, len(RETRY_S) - 1)]
        self._state, self._error = "failing", error
        self._failures += 1
        self._retry_at = time.monotonic() + wait_s

    def _unsynced(self) -> UnflushedError:
        files, size = self._changes.totals()
        why = self._error.message if self._error else f"it is still {self._state}"
        return UnflushedError(
            f"{self.name}/: {count(files, 'changed file')}, {format_size(size)}, in no snapshot yet: {why}",
            hint="they are safe on this host, and are tried again; see agentfuse status",
        )

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)


def _after(since: float | None, delay_s: float) -> float:
    return math.inf if since is None else since + delay_s
