"""Finishing what a killed daemon, a lost machine or an unreachable store left behind on this host.

Idempotent, needs no mount, and touches no home that a daemon holds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from agentfuse.config import Config
from agentfuse.errors import AgentfuseError, BusyError
from agentfuse.home.tree import Home, HomeRecord, list_homes, now
from agentfuse.killpoints import passing
from agentfuse.progress import Reporter
from agentfuse.regions import retained
from agentfuse.sync.stores import Stores
from agentfuse.sync.synced import SyncedRegions

Outcome = Literal["recovered", "mounted", "failed"]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of one home. ``error`` says why it ``failed``: it is as it was."""

    execution: str
    agent: str
    outcome: Outcome
    error: AgentfuseError | None = None

    def as_dict(self) -> dict[str, object]:
        """``{execution, agent, outcome, error}``, the last a text or None."""
        return {
            "execution": self.execution,
            "agent": self.agent,
            "outcome": self.outcome,
            "error": None if self.error is None else str(self.error),
        }


def recover(config: Config, reporter: Reporter, *, store: str | None = None) -> Iterator[Recovered]:
    """Finish every unfinished home of ``config.state``, one after another.

    ``store``: the URL that their stores have now, if it is another one than they were mounted with.
    A home that failed stays for the next time. Raises nothing for what one home has.
    """
    for home in list_homes(config.state):
        record = None
        try:
            record = home.record()
            if record is None or record.status == "clean":
                continue
            with held(home) as there:
                if there is None or there.status == "clean":
                    continue
                finish(config, home, msgspec.structs.replace(there, store=store or there.store), reporter)
            yield Recovered(record.execution, record.agent, "recovered")
        except BusyError:
            yield Recovered(home.execution, record.agent if record else "", "mounted")
        except AgentfuseError as error:
            yield Recovered(home.execution, record.agent if record else "", "failed", error)


def finish(config: Config, home: Home, record: HomeRecord, reporter: Reporter) -> None:
    """Bring into the store what a home holds whose daemon is gone; the caller holds its lock.

    Raises ``StoreError`` and its kinds, ``EnvironmentProblem``, ``BusyError``: the home is as it was.
    """
    if record.status == "live":
        reporter.say(f"finishing execution {record.execution}, which ended without its flush")
        passing("finish.begun")
        opened = Stores(config.state, cache_bytes=config.cache_bytes).open(record.store)
        regions = retained(config.regions) if record.is_retained else config.regions
        with SyncedRegions(regions, home, record, opened, owner_of(config)) as synced:
            synced.commit(reporter, "recovered", home.tree)
        passing("finish.committed")
    else:
        reporter.say(f"execution {record.execution} was never mounted: its memory is in the store")
    undelivered = bool(config.webhooks) and home.events.exists()  # which its daemon did not live to tell
    home.write_record(
        msgspec.structs.replace(record, status="clean", ended_at=now(), undelivered=undelivered)
    )


@contextlib.contextmanager
def held(home: Home) -> Iterator[HomeRecord | None]:
    """Hold a home's lock and have its record as it is then. Raises ``BusyError`` when a daemon holds it."""
    with home.locked():
        yield home.record()


def owner_of(config: Config) -> tuple[int, int] | None:
    """Whom files of a home are given to; None when this process cannot give files away."""
    return config.owner if os.geteuid() == 0 else None
