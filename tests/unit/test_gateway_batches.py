"""Batches: what waits while one is under way is done together."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from agentfuse.errors import NotFoundError
from agentfuse.gateway.batches import Batches


class Work:
    """Tells of the batches it gets, and holds each until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self._begun, self.batches = trio.open_memory_channel[list[int]](math.inf)

    def __call__(self, items: Sequence[int]) -> Sequence[int | Exception]:
        trio.from_thread.run_sync(self._begun.send_nowait, list(items))
        self.go.acquire()
        return [NotFoundError(str(item)) if item % 10 == 9 else item * 2 for item in items]


async def test_what_comes_while_a_batch_is_under_way_is_the_next_batch(nursery: trio.Nursery) -> None:
    work = Work()
    batches: Batches[int, int] = Batches(nursery, trio.CapacityLimiter(1), work, longest=4)
    results: dict[int, int] = {}

    async def ask(item: int) -> None:
        results[item] = await batches.submit(item)

    async with trio.open_nursery() as asking:
        asking.start_soon(ask, 0)
        assert await work.batches.receive() == [0]
        for item in (1, 2, 3, 4, 5):
            asking.start_soon(ask, item)
            await trio.testing.wait_all_tasks_blocked()
        work.go.release(3)
        assert [await work.batches.receive() for _ in range(2)] == [[1, 2, 3, 4], [5]]
    assert results == {item: item * 2 for item in range(6)}
    assert batches.is_idle


async def test_an_error_is_its_own_items_only(nursery: trio.Nursery) -> None:
    work = Work()
    work.go.release(3)
    batches: Batches[int, int] = Batches(nursery, trio.CapacityLimiter(1), work)
    with pytest.raises(NotFoundError, match="9"):
        await batches.submit(9)
    assert await batches.submit(1) == 2


async def test_what_the_work_raises_is_everybodys_and_the_next_batch_goes_on(nursery: trio.Nursery) -> None:
    calls = iter([ValueError("broken"), None])

    def work(items: Sequence[int]) -> Sequence[int]:
        error = next(calls)
        if error:
            raise error
        return items

    batches: Batches[int, int] = Batches(nursery, trio.CapacityLimiter(1), work)
    with pytest.raises(ValueError, match="broken"):
        await batches.submit(1)
    assert await batches.submit(2) == 2


async def test_who_gives_up_before_his_batch_is_left_out_of_it(nursery: trio.Nursery) -> None:
    work = Work()
    batches: Batches[int, int] = Batches(nursery, trio.CapacityLimiter(1), work)
    async with trio.open_nursery() as asking:
        asking.start_soon(batches.submit, 1)
        assert await work.batches.receive() == [1]
        with trio.CancelScope() as scope:
            scope.cancel()
            await batches.submit(2)
        asking.start_soon(batches.submit, 3)
        await trio.testing.wait_all_tasks_blocked()
        work.go.release(2)
        assert await work.batches.receive() == [3]
