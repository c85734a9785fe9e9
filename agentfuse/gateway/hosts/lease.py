"""This host's lease: it may own executions for as long as others cannot take it for dead.

Others count from when they see a renewal, which is after it was asked for; this host counts from before that,
and gives up two thirds into the lease: the last third is for ending what runs. After that it is dead to
itself, too, and begins anew in a later epoch. Nothing here asks what time it is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import trio

from agentfuse.admission import OnHostLost
from agentfuse.errors import EnvironmentProblem, StoreError
from agentfuse.gateway.hosts.clock import boot_time
from agentfuse.gateway.hosts.identity import Identity
from agentfuse.gateway.hosts.roster import Host, Roster

_LOG = logging.getLogger(__name__)

BEATS = 6
"""So many renewals fit into a lease."""
_HELD = 2 / 3
"""This part of it is relied upon."""
LEASE_FILE = "lease"
"""In STATE/gateway: until when launchers may run without hearing of the gateway, by ``boot_time``."""


class Tenure(Protocol):
    """Who has executions here (``executions.service``). None of these raises."""

    def count(self) -> int:
        """How many executions are not terminal."""

    async def fence(self) -> None:
        """The lease is lost: when this returns no launcher runs, and none begins before :meth:`adopt`."""

    async def adopt(self) -> None:
        """An epoch has begun: take over what is still this host's, end what is not. May be cancelled."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a host says of itself that does not change, see ``Host``."""

    url: str
    lease_s: float
    on_host_lost: OnHostLost
    executes: bool


class Lease:
    """The lease of a host in a cluster. Its file is in ``directory``."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        terms: Terms,
        *,
        directory: Path,
        now: Callable[[], float] = boot_time,
    ) -> None:
        self._identity = identity
        self._roster = roster
        self._terms = terms
        self._file = directory / LEASE_FILE
        self._now = now
        self._until = -math.inf
        self._is_begun = False
        self._incarnation = ""
        self._beat = 0
        self._problem = "this host has not begun to own executions yet"
        self._limiter = trio.CapacityLimiter(4)  # a request that hangs does not hold up the next ones

    @property
    def beat_s(self) -> float:
        """The time between two renewals."""
        return self._terms.lease_s / BEATS

    def problem(self) -> str | None:
        """Why this host may not own executions now; None if it may."""
        return None if self._is_begun and self._now() < self._until else self._problem

    async def acquire(self, tenure: Tenure) -> None:
        """Begin an epoch; returns when others can know, however long the store cannot be reached."""
        while True:
            # What an earlier epoch still has under way must not arrive in this one.
            while self._limiter.borrowed_tokens:  # noqa: ASYNC110  # threads set no event
                await trio.sleep(self.beat_s / 4)
            self._until = -math.inf
            try:
                with trio.fail_after(self._terms.lease_s):
                    await self._in_thread(self._begin_epoch)
                    await self._renew(tenure)
            except (trio.TooSlowError, StoreError, EnvironmentProblem, _TakenError) as error:
                self._doubt(error)
                await trio.sleep(self.beat_s)
            else:
                if self._now() < self._until:
                    self._is_begun = True
                    return

    async def keep(
        self, tenure: Tenure, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Renew it, after :meth:`acquire`; ready when what was here is adopted.

        When it is lost, what is here is ended, and it is acquired again.
        """
        is_ready = False

        async def adopt() -> None:
            nonlocal is_ready
            await tenure.adopt()
            if not is_ready:
                is_ready = True
                task_status.started()

        while True:
            # It is renewed meanwhile, however long that takes.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(adopt)
                is_only_one = await self._hold(tenure)
                nursery.cancel_scope.cancel()
            self._is_begun = False
            _LOG.warning("this host lost its lease, so what runs here is ended: %s", self._problem)
            await tenure.fence()
            if not is_only_one:
                break
            await self.acquire(tenure)
            _LOG.warning("this host has a lease again, in epoch %d", self._identity.epoch)
        _LOG.error("%s", self._problem)
        await trio.sleep_forever()
        raise AssertionError

    async def _hold(self, tenure: Tenure) -> bool:
        """Until it is lost; False if that is because another host goes by our id."""
        while self._now() < self._until:
            began = self._now()
            try:
                with trio.fail_after(self.beat_s):  # one that succeeds later counts, too
                    await self._renew(tenure)
            except (trio.TooSlowError, StoreError, EnvironmentProblem) as error:
                self._doubt(error)
            except _TakenError as error:
                self._until, self._problem = -math.inf, str(error)
                return False
            await trio.sleep(max(self.beat_s / 4, min(self._until, began + self.beat_s) - self._now()))
        return True

    async def _renew(self, tenure: Tenure) -> None:
        began = self._now()
        self._beat += 1
        host = Host(
            id=self._identity.id,
            epoch=self._identity.epoch,
            incarnation=self._incarnation,
            beat=self._beat,
            url=self._terms.url,
            lease_s=self._terms.lease_s,
            on_host_lost=self._terms.on_host_lost,
            executes=self._terms.executes,
            executions=tenure.count(),
            at=time.time(),
        )
        until = math.inf if host.on_host_lost == "wait" else began + host.lease_s * _HELD
        await self._in_thread(lambda: self._put(host, until))

    def _put(self, host: Host, until: float) -> None:
        there = self._roster.get(host.id)
        if there and there.epoch >= host.epoch and there.incarnation != host.incarnation:
            raise _TakenError(
                f"another host, at {there.url}, goes by this host's id {host.id}, as its state directory is "
                "a copy; remove gateway/host.id from the copy and start that one again"
            )
        self._roster.put(host)
        temporary = self._file.with_suffix(f".{threading.get_native_id()}.tmp")
        try:
            temporary.write_text(f"{max(self._until, until)}\n")
            temporary.rename(self._file)
        except OSError as error:  # launchers would end at the time that they know
            raise EnvironmentProblem(f"{self._file}: {error.strerror}") from error
        self._until = max(self._until, until)

    def _begin_epoch(self) -> None:
        there = self._roster.get(self._identity.id)
        self._identity.begin_epoch(0 if there is None else there.epoch)
        self._incarnation = str(uuid.uuid4())

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)

    def _doubt(self, error: Exception) -> None:
        why = "the object store does not answer" if isinstance(error, trio.TooSlowError) else str(error)
        self._problem = f"this host cannot renew its lease: {why}"
        _LOG.warning("the lease could not be renewed: %s", why)


class _TakenError(Exception):
    """Another host goes by our id."""
