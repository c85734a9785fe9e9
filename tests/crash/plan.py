"""What happens in one seed: drawn from ``random.Random(seed)`` and from nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from agentfuse.killpoints import STEPS

FaultKind = Literal["refused", "dropped", "answer-lost", "slow", "outage"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with a store: with ``percent`` of the requests; an outage with all of them between
    two requests, by their number in the life of a daemon.
    """

    kind: FaultKind
    percent: int = 100
    first: int = 0
    last: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Kill:
    """When a daemon dies: at a passing of a step, before an action of its agent, or after a time."""

    step: str = ""
    passing: int = 1
    action: int | None = None
    after_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Life:
    """One daemon, and what its agent does meanwhile. ``syncs``: before which actions to ask for a sync;
    ``background``: whether the agent goes on meanwhile.
    """

    actions: int
    seed: int
    pause_ms: int
    kill: Kill | None = None
    faults: tuple[Fault, ...] = ()
    syncs: tuple[int, ...] = ()
    background: bool = False
    end: Literal["umount", "sigterm"] = "umount"


@dataclass(frozen=True, slots=True)
class Actor:
    """One execution, on one host, life after life."""

    execution: str
    host: int
    start_after_ms: int
    journal_mode: Literal["wal", "delete"]
    lives: tuple[Life, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    hosts: int
    sync_delay_s: float
    checkpoint_interval_s: float
    keep_ended_s: float
    actors: tuple[Actor, ...]
    sweeps: tuple[Kill | None, ...] = field(default=())
    """After all lives, on each host a mount finishes what is unfinished; these ones die at it first."""

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: {self.hosts} hosts, sync delay {self.sync_delay_s} s, checkpoints every "
            f"{self.checkpoint_interval_s} s, ended homes kept for {self.keep_ended_s} s"
        ]
        for actor in self.actors:
            lines.append(
                f"  {actor.execution} on host {actor.host} after {actor.start_after_ms} ms, "
                f"databases in mode {actor.journal_mode}:"
            )
            lines += [f"    {life}" for life in actor.lives]
        lines += [f"  sweep: {kill}" for kill in self.sweeps]
        return "\n".join(lines)


def make_plan(seed: int) -> Plan:
    rng = random.Random(seed)
    hosts = rng.choice((1, 1, 2))
    actors = tuple(_actor(rng, number, hosts) for number in range(rng.choice((1, 2, 2, 3, 4))))
    return Plan(
        seed=seed,
        hosts=hosts,
        sync_delay_s=rng.choice((0.01, 0.05, 0.3)),
        checkpoint_interval_s=rng.choice((0.02, 0.1, 0.5)),
        keep_ended_s=rng.choice((0.0, 3600.0)),
        actors=actors,
        sweeps=tuple(Kill(rng.choice(STEPS), rng.choice((1, 1, 2, 5))) for _ in range(rng.choice((0, 0, 1)))),
    )


def _actor(rng: random.Random, number: int, hosts: int) -> Actor:
    return Actor(
        execution=f"e{number}",
        host=rng.randrange(hosts),
        start_after_ms=rng.choice((0, 0, 30, 200, 600)),
        journal_mode=rng.choice(("wal", "wal", "delete")),
        lives=tuple(_life(rng) for _ in range(rng.choice((1, 2, 2, 3)))),
    )


def _life(rng: random.Random) -> Life:
    actions = rng.choice((0, 5, 15, 30, 60))
    return Life(
        actions=actions,
        seed=rng.randrange(2**32),
        pause_ms=rng.choice((0, 1, 5, 10)),
        kill=_kill(rng, actions) if rng.random() < 0.7 else None,
        faults=tuple(_fault(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))),
        syncs=tuple(sorted(rng.randrange(actions + 1) for _ in range(rng.choice((0, 1, 2))))),
        background=rng.random() < 0.5,
        end=rng.choice(("umount", "umount", "sigterm")),
    )


def _kill(rng: random.Random, actions: int) -> Kill:
    how = rng.random()
    if how < 0.7:
        return Kill(rng.choice(STEPS), rng.choice((1, 1, 1, 2, 3, 7, 20)))
    if how < 0.85:
        return Kill(action=rng.randrange(actions + 1))
    return Kill(after_ms=rng.randrange(5, 400))


def _fault(rng: random.Random) -> Fault:
    kind: FaultKind = rng.choice(("refused", "dropped", "answer-lost", "slow", "outage"))
    if kind == "outage":
        first = rng.randrange(60)
        return Fault(kind, first=first, last=first + rng.randrange(1, 40))
    return Fault(kind, percent=rng.choice((5, 15, 30)))
