"""Several things at a time, of which the first failure counts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio


async def together(works: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Do all of them at a time. The first that fails ends the others, and its error is raised."""
    failures: list[Exception] = []

    async def attempt(work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001  # it is raised below, alone
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(attempt, work)
    if failures:
        raise failures[0]
