"""What the policy keeps: days, pins and the grace period, and of runs all that tells what they changed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfuse.errors import UsageError
from agentfuse.snapshots.retention import DAY_S, End, Policy

STRICT = Policy(keep_last=1, keep_daily=0)
NOW = 995 * DAY_S + 20 * 3600


def ends(turns: str, there: set[int] | None = None) -> list[End]:
    """The ends of stretches, of executions named by a letter each that committed in this order."""
    found: list[End] = []
    bound = len(turns)
    for number in range(len(turns), 0, -1):
        if number <= bound and (there is None or number in there):
            before = turns[: number - 1]
            bound = len(before.rstrip(turns[number - 1]))
            found.append(End(number, turns[number - 1], bound))
    return found


def long_ago(turns: str) -> dict[int, float]:
    return dict.fromkeys(range(1, len(turns) + 1), 0.0)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Policy(keep_last=1, keep_daily=0), {8, 9, 10}),
        (Policy(keep_last=4, keep_daily=0), {6, 7, 8, 9, 10}),
        (Policy(keep_last=1, keep_daily=3), {6, 8, 9, 10}),
        (Policy(keep_last=1, keep_daily=100), {2, 4, 6, 8, 9, 10}),
        (Policy(keep_last=100, keep_daily=0), set(range(1, 11))),
        (Policy(keep_last=1, keep_daily=0, grace_s=2 * DAY_S), {6, 7, 8, 9, 10}),
    ],
)
def test_the_policy_keeps(policy: Policy, kept: set[int]) -> None:
    """Two snapshots a day, at 6 and 18 o'clock, and now it is 20 o'clock of the fifth day."""
    times = {n: (990 + (n + 1) // 2) * DAY_S + (6 if n % 2 else 18) * 3600 for n in range(1, 11)}
    assert policy.kept(times, NOW, ends("abcdefghij")) == kept


@pytest.mark.parametrize(
    ("turns", "keep_last", "kept"),
    [
        ("aaaaaaaa", 1, {8}),
        ("aaaabbbb", 1, {4, 8}),
        ("aaaabbbbcccc", 1, {8, 12}),
        ("aaaabbbbcccc", 2, {4, 8, 12}),
        ("abaab", 2, {1, 2, 4, 5}),
        ("abaab", 1, {1, 2, 4, 5}),
        ("aabbcbb", 1, {2, 4, 5, 7}),
        ("aabbccddddc", 1, {4, 6, 10, 11}),
    ],
)
def test_of_runs_the_ends_of_their_stretches_are_kept(turns: str, keep_last: int, kept: set[int]) -> None:
    assert Policy(keep_last, keep_daily=0).kept(long_ago(turns), 1e9, ends(turns)) == kept


def test_two_that_take_turns_push_no_other_run_out() -> None:
    turns = "xxyyzz" + "ab" * 100
    assert Policy(5, keep_daily=0).kept(long_ago(turns), 1e9, ends(turns)) >= {2, 4, 6}


def test_what_cannot_be_read_counts_as_a_run_of_its_own() -> None:
    told = [End(4, "b", 3), End(3, None, 0), End(2, None, 0), End(1, "a", 0)]
    assert Policy(2, keep_daily=0).kept(long_ago("aaab"), 1e9, told) == {3, 4}
    assert Policy(3, keep_daily=0).kept(long_ago("aaab"), 1e9, told) == {2, 3, 4}


def test_pins_are_kept_and_the_newest_always() -> None:
    assert STRICT.kept(long_ago("aaaaa"), 1e9, ends("aaaaa"), [2, 99]) == {2, 5}
    assert Policy(keep_last=0, keep_daily=0).kept(long_ago("aaaaa"), 1e9, ends("aaaaa")) == {5}
    assert STRICT.kept({}, 1e9) == set()


def test_what_was_the_newest_within_the_grace_period_is_kept() -> None:
    now = 1e9
    times = {1: now - 9 * DAY_S, 2: now - 8 * DAY_S, 3: now - 7 * DAY_S, 4: now - 60, 5: now - 30}
    assert STRICT.kept(times, now, ends("aaaaa")) == {3, 4, 5}


def test_a_grace_period_that_is_not_safe_is_refused() -> None:
    with pytest.raises(UsageError, match="under 3 hours"):
        Policy(grace_s=3600)


@given(
    st.text("abcde", min_size=1, max_size=40),
    st.lists(st.floats(0, DAY_S), min_size=40, max_size=40),
    st.sets(st.integers(1, 40)),
    st.integers(1, 5),
    st.integers(0, 4),
)
def test_whenever_it_is_collected_the_newest_runs_can_be_told_apart(
    turns: str, waits: list[float], collected_after: set[int], keep_last: int, keep_daily: int
) -> None:
    policy = Policy(keep_last, keep_daily)
    times: dict[int, float] = {}
    now = 0.0
    fell_out: set[str] = set()
    for number in range(1, len(turns) + 1):
        now += waits[number - 1]
        times[number] = now
        if number not in collected_after:
            continue
        so_far = turns[:number]
        newest = list(dict.fromkeys(reversed(so_far)))[:keep_last]
        told = ends(so_far, set(times))
        kept = policy.kept(times, now, told)
        assert kept == policy.kept({n: times[n] for n in kept}, now, ends(so_far, kept)), "it is stable"
        for newer, older in pairwise(sorted(times, reverse=True)):
            assert older in kept or times[newer] <= now - policy.grace_s
        fell_out |= set(so_far) - set(newest)
        times = {n: at for n, at in times.items() if n in kept}
        assert number in times
        for run in set(newest) - fell_out:
            changed = {n for n, who in enumerate(so_far, 1) if who == run}
            stretches = [end for end in ends(so_far, set(times)) if end.execution == run]
            assert changed == {n for end in stretches for n in range(end.follows + 1, end.number + 1)}
            assert all(end.follows == 0 or end.follows in times for end in stretches)
