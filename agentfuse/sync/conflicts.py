"""The versions of files that lost to another execution's, as a region on disk has them from earlier runs."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from agentfuse.errors import AgentfuseError
from agentfuse.home.walk import Cursor, join, local_disk, read_directory
from agentfuse.snapshots.rebase import CONFLICTS


def kept_below(root: Path, limit: int) -> list[bytes]:
    """Paths of what lies below ``.conflicts/``, ``limit`` at most; what moves meanwhile may be missing."""
    found: list[bytes] = []
    if (root / CONFLICTS.decode()).is_dir():
        with contextlib.suppress(AgentfuseError):
            found.extend(islice(_files_below(root), limit))
    return found


def path_of_kept(place: bytes) -> bytes:
    """The path that a version had which is kept at ``place``: ``.conflicts/<execution>/<path>``."""
    return place.split(b"/", 2)[-1]


def _files_below(root: Path) -> Iterator[bytes]:
    with local_disk(root), Cursor(root, only_looks=True) as cursor:
        pending = [CONFLICTS]
        while pending:
            directory = pending.pop()
            for name, found in read_directory(cursor.enter(directory)):
                if stat.S_ISDIR(found.st_mode):
                    pending.append(join(directory, name))
                else:
                    yield join(directory, name)
