"""Finding homes of this host that no daemon serves any more, by where they were mounted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from agentfuse.control.mountinfo import resolve_mountpoint
from agentfuse.errors import AgentfuseError, NotFoundError
from agentfuse.home.tree import Home, HomeRecord, list_homes


def find_ended(
    states: Iterable[Path], *, mountpoint: str | None = None, execution: str | None = None
) -> tuple[Home, HomeRecord]:
    """The newest home that was mounted there, or that is this execution's.

    Raises ``NotFoundError``: homes of runs that nobody comes back to are removed at their end.
    """
    where = None if mountpoint is None else str(resolve_mountpoint(mountpoint))
    found = [
        (home, record)
        for home, record in _recorded(states)
        if execution in (None, home.execution) and where in (None, record.mountpoint)
    ]
    if found:
        return max(found, key=lambda item: item[1].created_at)
    what = f"of execution {execution}" if execution else f"that was mounted at {where}"
    raise NotFoundError(
        f"this host keeps no home {what}",
        hint="agentfuse ps lists what is mounted and unflushed; homes with an --execution are kept after "
        "their end, for keep_ended; say where they are with --state",
    )


def _recorded(states: Iterable[Path]) -> Iterable[tuple[Home, HomeRecord]]:
    for state in states:
        for home in list_homes(state):
            try:
                record = home.record()
            except AgentfuseError:
                continue  # which fsck and ps tell of
            if record is not None:
                yield home, record
