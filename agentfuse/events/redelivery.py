"""Delivering what webhooks of homes whose mount has ended have not taken yet."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from agentfuse.errors import AgentfuseError
from agentfuse.events.bookmarks import Bookmarks
from agentfuse.events.endpoint import Endpoint
from agentfuse.events.feed import EventFeed
from agentfuse.events.log import EventLog
from agentfuse.events.webhooks import Webhooks
from agentfuse.home.tree import Home, list_homes


class Redelivered(NamedTuple):
    """What became of the backlog of one home."""

    execution: str
    delivered: int
    is_left: bool


def deliver_left(state: Path, endpoints: list[Endpoint]) -> Iterator[Redelivered]:
    """Try once to deliver the backlog of every home that no daemon holds. Homes without one are left out."""
    for home in list_homes(state) if endpoints else []:
        with contextlib.suppress(AgentfuseError), home.locked():  # who is mounted delivers by itself
            record = home.record()
            if record is not None and home.events.exists():
                found = _deliver(home, record.agent, endpoints)
                if record.undelivered and not found.is_left:
                    home.write_record(msgspec.structs.replace(record, undelivered=False))
                if found.delivered or found.is_left:
                    yield found


def _deliver(home: Home, agent: str, endpoints: list[Endpoint]) -> Redelivered:
    log = EventLog(home.events, home.tree)
    bookmarks = Bookmarks(log)
    # Of a webhook that had nothing to do with the run, this is not the time.
    own = [endpoint for endpoint in endpoints if bookmarks.place(endpoint.hook.name) is not None]
    feed = EventFeed(log, execution=home.execution, agent=agent)
    webhooks = Webhooks(own, feed, bookmarks, execution=home.execution, agent=agent)
    over = trio.Event()
    over.set()
    trio.run(partial(webhooks.run, over, follow=False, grace_s=math.inf))
    log.close()
    return Redelivered(home.execution, webhooks.delivered, webhooks.has_backlog)
