"""Bringing all absent contents of a home without a mount, for tests."""

from __future__ import annotations

import trio

from agentfuse.sync.absent import Absent
from agentfuse.sync.backfill import Backfill
from agentfuse.sync.hydration import Hydration


def bring_all(absent: Absent) -> dict[str, object]:
    """Fill everything and make it durable, as a mount does in the background; what it says of itself then."""

    async def bring() -> dict[str, object]:
        hydration = Hydration(absent)
        backfill = Backfill(hydration)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hydration.run)
            await backfill.run()
            nursery.cancel_scope.cancel()
        return backfill.as_dict()

    return trio.run(bring)
