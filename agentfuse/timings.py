"""How long things took, counted in powers of two of nanoseconds: an addition to a list, nothing else.

What becomes of the counts (a metric, a percentile) is for whoever reads them, when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence

_BUCKETS = 64
_SUM = -1


def new_timing() -> list[int]:
    """Counts by the bit length of a duration in nanoseconds, and, last, the durations' sum.

    To count one: ``timing[spent_ns.bit_length()] += 1; timing[-1] += spent_ns``.
    """
    return [0] * (_BUCKETS + 1)


def add_to(timing: list[int], spent_ns: int) -> None:
    """Count a duration, where a call more does not matter."""
    timing[spent_ns.bit_length()] += 1
    timing[_SUM] += spent_ns


def number_of(timing: Sequence[int]) -> int:
    """How many durations were counted."""
    return sum(timing[:_SUM])


def seconds_of(timing: Sequence[int]) -> float:
    """The sum of the durations."""
    return timing[_SUM] / 1e9


def buckets(timing: Sequence[int], first: int, last: int) -> list[tuple[float, int]]:
    """(seconds, how many took at most so long) for bit lengths ``first`` to ``last``, then infinity."""
    total = sum(timing[:first])
    found = []
    for bits in range(first, last + 1):
        total += timing[bits]
        found.append((2**bits / 1e9, total))
    return [*found, (float("inf"), number_of(timing))]
