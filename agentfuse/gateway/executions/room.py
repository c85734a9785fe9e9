"""How many executions a host has at a time, and whose turn it is next. Knows only their ids."""

from __future__ import annotations

import heapq
import math

import trio


class Room:
    """Places for ``size`` executions; None: for any number."""

    def __init__(self, size: int | None) -> None:
        self._size = math.inf if size is None else size
        self._held: set[str] = set()
        self._queue: list[tuple[float, str, trio.Event]] = []

    def take(self, execution: str) -> bool:
        """Take a place, if there is one that nobody waits for."""
        if len(self._held) >= self._size or self._queue:
            return False
        self._held.add(execution)
        return True

    def hold(self, execution: str) -> None:
        """Take a place although there may be none: it runs already."""
        self._held.add(execution)

    async def wait(self, execution: str, since: float) -> None:
        """Take a place when there is one; who waits for longest is first."""
        if execution in self._held or self.take(execution):
            return
        mine = (since, execution, trio.Event())
        heapq.heappush(self._queue, mine)
        try:
            await mine[2].wait()
        except trio.Cancelled:
            if mine in self._queue:
                self._queue.remove(mine)
                heapq.heapify(self._queue)
            raise

    def leave(self, execution: str) -> None:
        """Give a place back, if it has one."""
        self._held.discard(execution)
        while self._queue and len(self._held) < self._size:
            _, next_one, turn = heapq.heappop(self._queue)
            self._held.add(next_one)
            turn.set()
