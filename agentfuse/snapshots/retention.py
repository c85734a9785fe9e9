"""Which snapshots to keep. Knows numbers, times and who made what; no store.

What counts is runs, not snapshots: one that changes its memory all day makes a thousand of them. Of what one
execution did without another in between, a *stretch*, the last snapshot tells the result and, beside the one
that it follows, everything that was changed; the ones inside tell only how it came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from agentfuse.errors import UsageError

DAY_S = 86400.0
MIN_GRACE_S = 3 * 3600.0
"""Uploaders rely on objects that no snapshot names for an hour, and on those that were there for another."""


class End(NamedTuple):
    """The newest snapshot that there is of a stretch; ``execution`` is None if it cannot be read."""

    number: int
    execution: str | None
    follows: int


@dataclass(frozen=True, slots=True)
class Policy:
    """Which snapshots to keep: what each of the ``keep_last`` newest runs left and began with, whenever
    another came in between; the newest one of each of the last ``keep_daily`` days (UTC); all pinned ones;
    and always the newest, and whatever was the newest within ``grace_s`` seconds. Times are those of
    writing, by the store's clock.
    """

    keep_last: int = 20
    keep_daily: int = 30
    grace_s: float = DAY_S

    def __post_init__(self) -> None:
        if self.grace_s < MIN_GRACE_S:
            raise UsageError(
                "a grace period under 3 hours is not safe beside commits that are under way",
                hint="give --grace 3h or more; 24h is the default",
            )

    def kept(
        self, times: Mapping[int, float], now: float, ends: Iterable[End] = (), pinned: Iterable[int] = ()
    ) -> set[int]:
        """Of snapshots, given as number and time of writing, those that stay. ``ends``: the newest first."""
        newest_first = sorted(times, reverse=True)
        kept = {*newest_first[:1], *self._of_runs(ends), *pinned}
        days: dict[int, int] = {}
        for number in newest_first:
            day = int(times[number] // DAY_S)
            if now // DAY_S - day < self.keep_daily:
                days.setdefault(day, number)
        kept.update(days.values())
        for newer, number in pairwise(newest_first):
            if times[newer] > now - self.grace_s:
                kept.add(number)
        return kept & times.keys()

    def _of_runs(self, ends: Iterable[End]) -> Iterator[int]:
        runs: set[str | int] = set()
        for end in ends:
            run = end.number if end.execution is None else end.execution
            if run in runs or len(runs) < self.keep_last:
                runs.add(run)
                yield end.number
                yield end.follows
