"""What happens in one seed: drawn from ``random.Random(seed)`` and from nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from agentfuse.killpoints import STEPS

# Steps are drawn by what they belong to, so that those passed seldom have their turn, too.
_WHILE_MOUNTED = (
    "create write truncate unlink rename close",
    "capture",
    "upload send checkpoint intent commit",
    "note record end",
    "restore fill settle",
    "finish remove",
)
_WHILE_FINISHING = ("finish remove", "upload intent commit note record")

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
    """One daemon, and what its agent does meanwhile. ``after_ms``: how long after the one before.

    ``syncs``: before which actions to ask for a sync; ``background``: whether the agent goes on meanwhile.
    """

    after_ms: int
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
    journal_mode: Literal["wal", "delete"]
    lives: tuple[Life, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Finishing what is unfinished on a host, by a mount or by ``agentfuse recover``, which may be killed."""

    by: Literal["mount", "recover"]
    kill: Kill | None


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    hosts: int
    sync_delay_s: float
    checkpoint_interval_s: float
    keep_ended_s: float
    actors: tuple[Actor, ...]
    sweeps: tuple[Sweep, ...]
    """After all lives, on each host, until nothing is unfinished."""

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: {self.hosts} hosts, sync delay {self.sync_delay_s} s, checkpoints every "
            f"{self.checkpoint_interval_s} s, ended homes kept for {self.keep_ended_s} s"
        ]
        for actor in self.actors:
            lines.append(f"  {actor.execution} on host {actor.host}, databases in mode {actor.journal_mode}:")
            lines += [f"    {life}" for life in actor.lives]
        lines += [f"  {sweep}" for sweep in self.sweeps]
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
        sweeps=tuple(_sweep(rng) for _ in range(rng.choice((0, 1, 2)))),
    )


def _actor(rng: random.Random, number: int, hosts: int) -> Actor:
    return Actor(
        execution=f"e{number}",
        host=rng.randrange(hosts),
        journal_mode=rng.choice(("wal", "wal", "delete")),
        lives=tuple(_life(rng) for _ in range(rng.choice((1, 2, 2, 3)))),
    )


def _life(rng: random.Random) -> Life:
    actions = rng.choice((0, 5, 15, 30, 60))
    kill = _kill(rng, actions) if rng.random() < 0.7 else None
    faults = [_fault(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    if kill and kill.step == "commit.answer-lost":
        faults.append(Fault("answer-lost", percent=60))
    return Life(
        after_ms=rng.choice((0, 0, 30, 200, 600)),
        actions=actions,
        seed=rng.randrange(2**32),
        pause_ms=rng.choice((0, 1, 5, 10)),
        kill=kill,
        faults=tuple(faults),
        syncs=tuple(sorted(rng.randrange(actions + 1) for _ in range(rng.choice((0, 1, 2))))),
        background=rng.random() < 0.5,
        end=rng.choice(("umount", "umount", "sigterm")),
    )


def _sweep(rng: random.Random) -> Sweep:
    kill = _at_step(rng, _WHILE_FINISHING, (1, 1, 2))
    return Sweep(rng.choice(("mount", "recover")), kill if rng.random() < 0.8 else None)


def _at_step(rng: random.Random, groups: tuple[str, ...], passings: tuple[int, ...]) -> Kill:
    group = rng.choice(groups).split()
    return Kill(rng.choice([step for step in STEPS if step.partition(".")[0] in group]), rng.choice(passings))


def _kill(rng: random.Random, actions: int) -> Kill:
    how = rng.random()
    if how < 0.7:
        return _at_step(rng, _WHILE_MOUNTED, (1, 1, 2, 3, 7))
    if how < 0.85:
        return Kill(action=rng.randrange(actions + 1))
    return Kill(after_ms=rng.randrange(5, 400))


def _fault(rng: random.Random) -> Fault:
    kind: FaultKind = rng.choice(("refused", "dropped", "answer-lost", "slow", "outage"))
    if kind == "outage":
        first = rng.randrange(60)
        return Fault(kind, first=first, last=first + rng.randrange(1, 40))
    return Fault(kind, percent=rng.choice((5, 15, 30)))
