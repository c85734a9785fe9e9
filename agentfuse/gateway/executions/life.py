"""One execution on this host, from its record to its end: a row of steps, each of which may be done again.

    queued -> starting: mount -> attach -> running, paused -> (ends_as) unmount, flush -> archive -> terminal

Where it is follows from the record and from what is on this host, so a gateway that was killed at any moment
goes on with the next step after its restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
import trio

from agentfuse.client import AsyncHome
from agentfuse.errors import AgentfuseError, BusyError, EnvironmentProblem, StoreError
from agentfuse.gateway.executions.archive import Archive
from agentfuse.gateway.executions.attachments import Attachments
from agentfuse.gateway.executions.journal import Journal, Note
from agentfuse.gateway.executions.mounts import Mounts
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.records import Records
from agentfuse.home.tree import now

_LOG = logging.getLogger(__name__)

Phase = Literal["waiting", "starting", "live", "ending", "ended"]
"""Where its files are: nowhere yet, in a mounted home (``live``), on their way to the store, in the store."""

_RETRY_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_MOST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class Means:
    """What the lives of a host are lived with. ``max_restarts``: how often a daemon that died is followed by
    another."""

    records: Records
    mounts: Mounts
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
        self._is_done = False
        self._means = means
        self._changed = trio.Event()
        self._told_to_end = trio.Event()

    @property
    def id(self) -> str:
        """The execution's id."""
        return self.record.id

    async def changed(self) -> None:
        """Wait for another phase."""
        await self._changed.wait()

    async def change(self, change: Callable[[Execution], Execution]) -> Execution:
        """Change the record, see ``Records.change``."""
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

    async def end_as(self, status: Status, reason: str = "", result: dict[str, object] | None = None) -> None:
        """Have it end so, unless it ends already."""

        def ending(record: Execution) -> Execution:
            if record.ends_as is not None or record.status.is_terminal:
                return record
            return msgspec.structs.replace(
                record, ends_as=status, reason=reason, result=record.result if result is None else result
            )

        await self.change(ending)

    async def run(self) -> None:
        """Live it. Returns when the record is terminal, and nothing of it is only here.

        Errors are told, and what failed is tried again.
        """
        failures = 0
        while not self._is_done:
            try:
                await self._live()
            except Exception as error:  # noqa: BLE001  # told below; the gateway lives on
                known = isinstance(error, AgentfuseError)
                self.trouble = str(error) if known else f"unexpected {type(error).__name__}"
                wait_s = _RETRY_S[failures] if failures < len(_RETRY_S) else _MOST_RETRY_S
                if known:
                    _LOG.warning("execution %s: %s; trying again in %g s", self.id, error, wait_s)
                else:
                    _LOG.exception("execution %s: unexpected error; trying again in %g s", self.id, wait_s)
                failures += 1
                await trio.sleep(wait_s)
        self.trouble = ""
        self._enter("ended")
        self.ended.set()

    async def _live(self) -> None:
        if self.record.ends_as is None:
            await self._run_home()
        await self._finish()

    async def _run_home(self) -> None:
        """Until the end has begun."""
        while self.record.ends_as is None:
            if not await self._mount():
                return
            if not self.record.is_attached and not await self._attach():
                return
            if self.record.status is Status.STARTING:
                await self.change(_running)
            self._enter("live")
            self.trouble = ""
            await self._watch()

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
        for wait_s in (*_RETRY_S[:3], None):
            try:
                await mounts.start(self.record.agent, self.id)
            except (EnvironmentProblem, BusyError) as error:
                if wait_s is None:
                    await self.end_as(Status.FAILED, str(error))
                    return False
                _LOG.warning("execution %s: %s; trying again in %g s", self.id, error, wait_s)
                if await self._told_within(wait_s):
                    return False
            else:
                return True
        raise AssertionError

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
                return True  # its daemon died: seen to by who watches it
            await self.end_as(Status.FAILED, f"its files cannot be attached: {error}")
            return False
        await self.change(lambda record: msgspec.structs.replace(record, is_attached=True))
        await attachments.consume(self.record)
        return self.record.ends_as is None

    async def _watch(self) -> None:
        """Until the daemon is no more, or the end has begun."""
        async with trio.open_nursery() as nursery:

            async def until_unmounted() -> None:
                await self._means.mounts.ended(self.id)
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_unmounted)
            await self._told_to_end.wait()
            nursery.cancel_scope.cancel()

    async def _finish(self) -> None:
        """Bring everything into the store, then say so."""
        self._enter("ending")
        means = self._means
        await means.mounts.end(self.id)
        await trio.to_thread.run_sync(means.archive.keep, self.record, limiter=means.limiter)
        await self.change(_terminal)
        await trio.to_thread.run_sync(self._leave, limiter=means.limiter)
        self._is_done = True

    def _leave(self) -> None:
        self._means.mounts.remove(self.id)
        record = self.record
        self._means.journal.write(
            Note(id=record.id, organization=record.organization, agent=record.agent, ended_at=now())
        )

    async def _told_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._told_to_end.wait()
        return self._told_to_end.is_set()

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase:
            self.phase = phase
            self._changed.set()
            self._changed = trio.Event()


def _running(record: Execution) -> Execution:
    if record.status is not Status.STARTING:
        return record
    return record.with_status(Status.RUNNING)


def _terminal(record: Execution) -> Execution:
    if record.status.is_terminal:
        return record
    return record.with_status(record.ends_as or Status.FAILED)
