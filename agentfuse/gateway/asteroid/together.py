"""Several things at a time, of which the first failure counts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio

from agentfuse.errors import AgentfuseError


async def together(tasks: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Do all of them. Raises what the first that failed raised, when all have ended: never a group."""
    failures: list[AgentfuseError] = []

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except AgentfuseError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task)
    if failures:
        raise failures[0]
