"""Whether the log of events and the tree agree: every complete file was told of, as it is, and no other."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from agentfuse.errors import IntegrityError
from agentfuse.events.arrivals import Seen, is_temporary
from agentfuse.events.log import EventLog
from agentfuse.home.tree import regular_files


def wrong_numbers(log: EventLog) -> Iterator[str]:
    """What is wrong with the log itself, a line each."""
    try:
        gaps = log.gaps()
    except IntegrityError as error:
        yield error.message
    else:
        if gaps:
            yield f"the event log's numbers have gaps: {gaps} are missing"


def untold(
    log: EventLog,
    tree: Path,
    region: str,
    *,
    unfinished: Collection[int],
    held: Collection[bytes],
) -> Iterator[str]:
    """Where a region's files are not what was told of them, a line each.

    ``unfinished``: the inodes that are being written; ``held``: the paths that are not told of yet.
    """
    known = log.known(region) if log.exists() else {}
    for path, st in regular_files(tree, os.fsencode(region)):
        below = path[len(region) + 1 :]
        before = known.pop(below, None)
        if is_temporary(below) or st.st_ino in unfinished or below in held:
            continue
        name = os.fsdecode(path)
        if before is None:
            yield f"{name!r}: nobody was told of it"
        elif before != Seen(st.st_ino, st.st_size, st.st_mtime_ns):
            yield f"{name!r}: it has changed, and nobody was told of that"
    for path in known:
        yield f"{os.path.join(region, os.fsdecode(path))!r}: it is gone, and nobody was told of that"
