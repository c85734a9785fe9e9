"""The lives of the executions that this host owns: begun, adopted, and tidied up after."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import trio

from agentfuse.errors import AgentfuseError, CapacityError, NotFoundError, StoreError
from agentfuse.gateway.executions.journal import Note
from agentfuse.gateway.executions.life import Life, Means
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.killpoints import passing

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

_ADOPT_AGAIN_S = 1.0
_TIDY_S = (1.0, 300.0)


class Lives:
    """Those that are lived now, by their execution's id; they are in ``nursery``, and cancelling them leaves
    mounts as they are. ``keep_ended_s``: how long an ended one leaves something on this host."""

    def __init__(self, means: Means, *, hosts: Hosts, keep_ended_s: float, nursery: trio.Nursery) -> None:
        self._means = means
        self._hosts = hosts
        self._keep_ended_s = keep_ended_s
        self._nursery = nursery
        self._lives: dict[str, Life] = {}
        self._beginning: set[str] = set()  # which have a note, and perhaps no record yet

    def get(self, execution: str) -> Life | None:
        """The life of an execution that has not ended, if it is this host's."""
        return self._lives.get(execution)

    def records(self) -> Sequence[Execution]:
        """What is known of all of them."""
        return [life.record for life in self._lives.values() if not life.ended.is_set()]

    async def begin(self, record: Execution, *, queues: bool) -> Execution:
        """Make a record, and have it lived, whether or not the client stays; it as it is then.

        Raises ``CapacityError`` when there is no room and it does not queue, ``UsageError`` when what it
        begins with cannot be had: then there is nothing of it.
        """
        status = Status.STARTING
        if not self._means.room.take(record.id):
            if not queues:
                raise CapacityError(
                    "the host has as many executions as it may have",
                    hint="ask again when one has ended, or have it queued",
                )
            status = Status.QUEUED
        record = record.with_status(status, at=record.created_at)
        self._beginning.add(record.id)
        with trio.CancelScope(shield=True):
            try:
                await self._create(record)
            except BaseException:
                self._means.room.leave(record.id)
                raise
            finally:
                self._beginning.discard(record.id)
            self._nursery.start_soon(self._live, record)
        return record

    async def _create(self, record: Execution) -> None:
        """Note it, claim what it begins with, and make its record; or leave nothing of it."""
        means, ids = self._means, [each.id for each in record.staged]
        note = Note(id=record.id, organization=record.organization, agent=record.agent, staged=ids)
        try:
            await self._in_thread(means.journal.write, note)
            passing("execution.noted")
            await means.attachments.claim(record.organization, record.id, record.staged)
            passing("execution.claimed")
            await self._in_thread(means.hints.put, record)
            await self._in_thread(means.records.create, record)
            passing("execution.created")
        except StoreError:
            # Whether the record came to be is unknown: who adopts it finds out.
            self._nursery.start_soon(self._adopt, note)
            raise
        except AgentfuseError:
            await self._in_thread(means.journal.forget, record.id)
            raise

    def count(self) -> int:
        """How many executions are not terminal here."""
        return len(self._lives)

    def count_in(self, phase: str) -> int:
        """How many of them are in a phase of their lives."""
        return sum(life.phase == phase for life in self._lives.values())

    async def adopt(self) -> None:
        """Take over what this host had begun in an earlier epoch."""
        for life in list(self._lives.values()):
            await self._renew(life)
        self._means.launchers.unfence()
        async with trio.open_nursery() as nursery:
            for note in await self._in_thread(lambda: list(self._means.journal.notes())):
                if note.ended_at is None and note.id not in self._lives and note.id not in self._beginning:
                    nursery.start_soon(self._adopt, note)

    async def _adopt(self, note: Note) -> None:
        means = self._means
        try:
            record = await self._in_thread(means.records.read, note.organization, note.id)
        except NotFoundError:  # it did not come to be
            await means.attachments.release(note.organization, note.id, note.staged)
            await self._in_thread(means.journal.forget, note.id)
        except StoreError as error:
            _LOG.warning("execution %s cannot be adopted yet: %s", note.id, error)
            self._nursery.start_soon(self._adopt_later, note)
        else:
            if record.status is not Status.QUEUED:
                means.room.hold(record.id)
            self._nursery.start_soon(partial(self._live, record, is_adopted=True))

    async def _adopt_later(self, note: Note) -> None:
        await trio.sleep(_ADOPT_AGAIN_S)
        if note.id not in self._lives:
            await self._adopt(note)

    async def _live(self, record: Execution, *, is_adopted: bool = False) -> None:
        if record.id in self._lives:
            return
        life = self._lives[record.id] = Life(record, self._means)
        try:
            if is_adopted:
                await self._renew(life)
            await life.run()
        finally:
            del self._lives[record.id]
            self._means.room.leave(record.id)

    async def _renew(self, life: Life) -> None:
        """Have the record say that it is ours in this epoch, unless it is terminal already."""
        epoch = self._hosts.epoch

        def renewed(record: Execution) -> Execution:
            return record if record.status.is_terminal else msgspec.structs.replace(record, epoch=epoch)

        while True:
            try:
                await life.change(renewed)
            except StoreError as error:
                _LOG.warning("execution %s cannot be adopted yet: %s", life.id, error)
                await trio.sleep(_ADOPT_AGAIN_S)
            else:
                return

    async def fence(self) -> None:
        """This host may own nothing until :meth:`adopt`: no launcher runs when this returns."""
        await self._means.launchers.fence(list(self._lives))

    async def tidy(self) -> None:
        """Remove from this host, for ever and ever, what ended as long ago as is configured."""
        while True:
            for note in await self._in_thread(lambda: list(self._means.journal.notes())):
                if note.ended_at is not None and note.ended_at + self._keep_ended_s <= time.time():
                    try:
                        await self._in_thread(self._remove_ended, note)
                    except AgentfuseError as error:
                        _LOG.warning("execution %s was not removed from this host: %s", note.id, error)
            await trio.sleep(max(_TIDY_S[0], min(self._keep_ended_s, _TIDY_S[1])))

    def _remove_ended(self, note: Note) -> None:
        self._means.mounts.remove(note.id)
        if self._means.mounts.remove_home(note.id):
            self._means.journal.forget(note.id)

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._means.limiter)
