"""One execution on this host, from its record to its end: a row of steps, each of which may be done again.

    queued -> starting: mount -> attach -> launch -> running, paused -> (ends_as) unmount, flush -> terminal

Where it is follows from the record and from what is on this host, so a gateway that was killed at any moment
goes on with the next step after its restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import msgspec
import trio

from agentfuse.client import AsyncHome
from agentfuse.errors import AgentfuseError, BusyError, EnvironmentProblem, StoreError
from agentfuse.gateway.executions.archive import Archive
from agentfuse.gateway.executions.attachments import Attachments
from agentfuse.gateway.executions.journal import Journal, Note
from agentfuse.gateway.executions.launcher import Exit, Launchers
from agentfuse.gateway.executions.mounts import Mounts
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.records import Records
from agentfuse.gateway.executions.room import Room
from agentfuse.gateway.executions.whereabouts import Hints
from agentfuse.home.tree import now
from agentfuse.killpoints import passing

_LOG = logging.getLogger(__name__)

Phase = Literal["waiting", "starting", "live", "ending", "ended"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Where its files are: nowhere yet, in a mounted home (``live``), on their way to the store, in the store."""

_MOUNT_RETRIES = 3
_RETRY_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


@dataclass(frozen=True, slots=True)
class Means:
    """What the lives of a host are lived with. ``max_restarts``: how often a daemon that died is followed by
    another."""

    records: Records
    hints: Hints
    room: Room
    mounts: Mounts
    launchers: Launchers
    journal: Journal
    attachments: Attachments
    archive: Archive
    limiter: trio.CapacityLimiter
    max_restarts: int


class Life:
    """The life of an execution that this host owns. ``run`` lives it; everything else asks about it."""

    def __init__(self, record: Execution, means: Means) -> None:
        self.record = record
        self.phase: Phase = "waiting"
        self.trouble = ""
        self.ended = trio.Event()
        self._means = means
        self._is_done = False
        self._changed = trio.Event()
        self._told_to_end = trio.Event()
        self._changing = trio.Lock()
        self._pausing = trio.Lock()

    @property
    def id(self) -> str:
        """The execution's id."""
        return self.record.id

    async def changed(self) -> None:
        """Wait for another phase."""
        await self._changed.wait()

    async def change(self, change: Callable[[Execution], Execution]) -> Execution:
        """Change the record, see ``Records.change``."""
        async with self._changing:  # so that what is known of it never becomes older
            self.record = await trio.to_thread.run_sync(
                self._means.records.change,
                self.record.organization,
                self.id,
                change,
                limiter=self._means.limiter,
            )
            if self.record.ends_as is not None:
                self._told_to_end.set()
            return self.record

    async def end_as(self, status: Status, reason: str = "") -> None:
        """Have it end so, unless it ends already."""

        def ending(record: Execution) -> Execution:
            if record.ends_as is not None:
                return record
            return msgspec.structs.replace(record, ends_as=status, reason=reason)

        await self.change(ending)

    async def obey(self) -> None:
        """Have what runs in the home stop, or go on, as the record says."""
        async with self._pausing:
            await self._means.launchers.pause(self.id, paused=self.record.status is Status.PAUSED)

    async def run(self) -> None:
        """Live it. Returns when the record is terminal, and nothing of it is only here.

        Errors are told, and what failed is tried again.
        """
        failures = 0
        while not self._is_done:
            try:
                await self._live()
            except Exception as error:  # noqa: BLE001  # told here; the gateway lives on
                wait_s = _RETRY_S[min(failures, len(_RETRY_S) - 1)]
                failures += 1
                self._tell(error, wait_s)
                await trio.sleep(wait_s)
        self.trouble = ""
        self._enter("ended")
        self.ended.set()

    def _tell(self, error: Exception, wait_s: float) -> None:
        if isinstance(error, AgentfuseError):
            self.trouble = str(error)
            _LOG.warning("execution %s: %s; trying again in %g s", self.id, error, wait_s)
        else:
            self.trouble = f"unexpected {type(error).__name__}"
            _LOG.error("execution %s: trying again in %g s", self.id, wait_s, exc_info=error)

    async def _live(self) -> None:
        if self.record.ends_as is not None:
            self._told_to_end.set()
        elif self.record.status is Status.QUEUED and await self._has_room():
            await self.change(_starting)
        if self.record.ends_as is None:
            await self._run_home()
        await self._finish()

    async def _run_home(self) -> None:
        """Until the end has begun."""
        launchers = self._means.launchers
        while self.record.ends_as is None:
            if not await self._mount():
                return
            if not self.record.is_attached and not await self._attach():
                return
            if self.record.status is Status.STARTING:
                if launchers.is_configured:
                    await launchers.may_begin()  # it may have been failed by another host until then
                    if self.record.ends_as is not None:
                        return
                    await launchers.start(self.record, self._means.mounts.path(self.id))
                    passing("execution.launched")
                await self.change(_running)
                passing("execution.running")
            self._enter("live")
            self.trouble = ""
            await self.obey()
            found = await self._broken()
            if found is not None:
                await self.end_as(Status.FAILED if found.code != 0 else Status.COMPLETED, str(found))

    async def _mount(self) -> bool:
        """Have the home mounted; False when the execution ends instead."""
        mounts = self._means.mounts
        if not mounts.is_served(self.id):
            outcome = mounts.outcome(self.id)
            if outcome in ("flushed", "unflushed"):
                await self.end_as(Status.COMPLETED, "its home was unmounted")
                return False
            if outcome == "died" and not await self._may_restart():
                return False
        self._enter("starting")
        failures = 0
        while True:
            try:
                await mounts.start(self.record.agent, self.id)
            except (EnvironmentProblem, BusyError) as error:
                if failures == _MOUNT_RETRIES:
                    await self.end_as(Status.FAILED, str(error))
                    return False
                wait_s = _RETRY_S[failures]
                # Who holds the home finishes it, and will be done with that.
                failures += not isinstance(error, BusyError)
                _LOG.warning("execution %s: %s; trying again in %g s", self.id, error, wait_s)
                if await self._told_within(wait_s):
                    return False
            else:
                passing("execution.mounted")
                return True

    async def _may_restart(self) -> bool:
        """Count that the daemon died; False when that was once too often."""
        if self.record.restarts >= self._means.max_restarts:
            times = self.record.restarts + 1
            await self.end_as(Status.FAILED, f"the daemon of its mount died {times} times")
            return False
        _LOG.warning("execution %s: the daemon of its mount died; it is mounted again", self.id)
        await self.change(lambda record: msgspec.structs.replace(record, restarts=record.restarts + 1))
        return self.record.ends_as is None

    async def _attach(self) -> bool:
        """Bring in what it begins with; False when that cannot be done, and it ends."""
        attachments = self._means.attachments
        try:
            await attachments.attach(self.record, AsyncHome(self._means.mounts.path(self.id)))
        except StoreError:
            raise
        except AgentfuseError as error:
            if not self._means.mounts.is_served(self.id):
                raise  # its daemon died, which is seen to when all is tried again
            await self.end_as(Status.FAILED, f"its files cannot be attached: {error}")
            return False
        passing("execution.attached")
        await self.change(lambda record: msgspec.structs.replace(record, is_attached=True))
        await attachments.consume(self.record)
        return self.record.ends_as is None

    async def _broken(self) -> Exit | None:
        """Until the end has begun, the daemon is no more, or the launcher has ended: how that ended."""
        found: list[Exit] = []
        async with trio.open_nursery() as nursery:

            async def until_unmounted() -> None:
                await self._means.mounts.ended(self.id)
                nursery.cancel_scope.cancel()

            async def until_launched() -> None:
                found.append(await self._means.launchers.ended(self.id))
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_unmounted)
            if self._means.launchers.has_begun(self.id):
                nursery.start_soon(until_launched)
            await self._told_to_end.wait()
            nursery.cancel_scope.cancel()
        return found[0] if found else None

    async def _finish(self) -> None:
        """Bring everything into the store, then say so."""
        self._enter("ending")
        means = self._means
        await means.launchers.stop(self.id)
        passing("execution.ending")
        await means.mounts.end(self.id)
        passing("execution.flushed")
        await trio.to_thread.run_sync(means.archive.keep, self.record, limiter=means.limiter)
        await self.change(_terminal)
        passing("execution.terminal")
        await trio.to_thread.run_sync(self._leave, limiter=means.limiter)
        self._is_done = True

    def _leave(self) -> None:
        record = self.record
        self._means.hints.remove(record)
        self._means.mounts.remove(self.id)
        self._means.journal.write(
            Note(id=record.id, organization=record.organization, agent=record.agent, ended_at=now())
        )

    async def _has_room(self) -> bool:
        """Wait for its turn; False when the end has begun before."""
        async with trio.open_nursery() as nursery:

            async def until_told() -> None:
                await self._told_to_end.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_told)
            await self._means.room.wait(self.id, self.record.created_at)
            nursery.cancel_scope.cancel()
        return not self._told_to_end.is_set()

    async def _told_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._told_to_end.wait()
        return self._told_to_end.is_set()

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase:
            self.phase = phase
            self._changed.set()
            self._changed = trio.Event()


def _starting(record: Execution) -> Execution:
    is_next = record.status is Status.QUEUED and record.ends_as is None
    return record.with_status(Status.STARTING) if is_next else record


def _running(record: Execution) -> Execution:
    is_next = record.status is Status.STARTING and record.ends_as is None
    return record.with_status(Status.RUNNING) if is_next else record


def _terminal(record: Execution) -> Execution:
    if record.status.is_terminal:
        return record
    return record.with_status(record.ends_as or Status.FAILED)
