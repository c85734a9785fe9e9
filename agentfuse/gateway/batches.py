"""Doing together what many requests ask for at a time: group commit, and reads that share a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from agentfuse.errors import BusyError

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(slots=True, eq=False)
class _Waiting(Generic[_T, _R]):
    item: _T
    done: trio.Event = field(default_factory=trio.Event)
    result: _R | None = None
    error: Exception | None = None


class Batches(Generic[_T, _R]):
    """Runs ``work`` in a thread, one batch at a time: all that was asked for while the last one ran.

    ``work`` gets the items in the order they came and returns for each its result, or the exception that
    is its own; what it raises is everybody's. What it finds out, it finds out after the item was given.
    Batches run in ``nursery``, whoever of those that wait is cancelled.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        limiter: trio.CapacityLimiter,
        work: Callable[[Sequence[_T]], Sequence[_R | Exception]],
        *,
        longest: int = 500,
    ) -> None:
        self._nursery = nursery
        self._limiter = limiter
        self._work = work
        self._longest = longest
        self._waiting: list[_Waiting[_T, _R]] = []
        self._is_running = False

    async def submit(self, item: _T) -> _R:
        """The result of an item. Cancelled before its batch begins, it is left out; then, it is awaited."""
        waiting: _Waiting[_T, _R] = _Waiting(item)
        self._waiting.append(waiting)
        if not self._is_running:
            self._is_running = True
            self._nursery.start_soon(self._run)
        try:
            await waiting.done.wait()
        except trio.Cancelled:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:
                with trio.CancelScope(shield=True):
                    await waiting.done.wait()
            raise
        if waiting.error is not None:
            raise waiting.error
        return waiting.result  # type: ignore[return-value]  # it is done, and there was no error

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits."""
        return not self._is_running

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[: self._longest], self._waiting[self._longest :]
                await self._run_batch(batch)
        finally:
            self._is_running = False

    async def _run_batch(self, batch: Sequence[_Waiting[_T, _R]]) -> None:
        items = [waiting.item for waiting in batch]
        try:
            outcomes = await trio.to_thread.run_sync(self._work, items, limiter=self._limiter)
        except Exception as error:  # noqa: BLE001  # it goes to those who asked
            outcomes = [error] * len(batch)
        except trio.Cancelled:
            for waiting in batch:
                waiting.error = BusyError("the gateway is ending", hint="ask again")
                waiting.done.set()
            raise
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                waiting.error = outcome
            else:
                waiting.result = outcome
            waiting.done.set()
