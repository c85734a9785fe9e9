"""What ended long ago goes, for good: the files of executions, and older revisions of their records."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from agentfuse.errors import AgentfuseError, StoreError
from agentfuse.gateway.executions.life import Means
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.executions.records import Records

_LOG = logging.getLogger(__name__)

_PURGE_S = 3600.0
_SETTLED_S = 3600.0

Change = Callable[[str, str, Callable[[Execution], Execution]], Awaitable[Execution]]
"""Changes the record of an organization's execution."""


async def purge_old(means: Means, change: Change, after_s: float | None) -> None:
    """Prune records, for ever and ever, and purge what ended so long ago (None: nothing); as many gateways
    may do that as like."""
    limiter, records = means.limiter, means.records
    while True:
        try:
            await trio.to_thread.run_sync(_prune, records, limiter=limiter)
        except StoreError as error:
            _LOG.warning("old revisions of records were not removed: %s", error)
        if after_s is not None:
            await _purge_all(means, change, time.time() - after_s)
        await trio.sleep(_PURGE_S * random.uniform(0.5, 1.0))


async def _purge_all(means: Means, change: Change, limit: float) -> None:
    try:
        old = await trio.to_thread.run_sync(_ended_before, means.records, limit, limiter=means.limiter)
    except StoreError as error:
        _LOG.warning("old executions were not purged: %s", error)
        return
    for record in old:
        try:
            await _purge(means, change, record)
        except AgentfuseError as error:
            _LOG.warning("execution %s was not purged: %s", record.id, error)
        else:
            _LOG.info("execution %s: purged", record.id)


def _ended_before(records: Records, limit: float) -> Sequence[Execution]:
    return [
        record
        for organization in records.organizations()
        for record in records.list(organization)
        if record.purged_at is None and record.terminal_at is not None and record.terminal_at < limit
    ]


def _prune(records: Records) -> None:
    for organization in records.organizations():
        if removed := records.prune(organization, _SETTLED_S):
            _LOG.info("organization %s: %d old revisions of records removed", organization, removed)


async def _purge(means: Means, change: Change, record: Execution) -> None:
    """Have the files of one that has ended gone, for good; their contents go with the next collection
    (``agentfuse gc``), if nothing else needs them."""

    def purged(record: Execution) -> Execution:
        return msgspec.structs.replace(record, purged_at=record.purged_at or time.time())

    # The record says so last: until then it is tried again.
    await trio.to_thread.run_sync(means.mounts.remove_home, record.id, limiter=means.limiter)
    await trio.to_thread.run_sync(means.archive.purge, record, limiter=means.limiter)
    await change(record.organization, record.id, purged)
