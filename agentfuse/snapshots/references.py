"""How people name a snapshot: ``AGENT@12``, ``AGENT@latest``, ``AGENT@-1``; ``AGENT@12:path`` a path in it.

``AGENT/EXECUTION/REGION@12`` is one of a region that an execution kept. And how they find what they named.
Knows no contents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from agentfuse.errors import NotFoundError, ObjectNotFoundError, UsageError
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry, printable
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import TENANT_FILES, TENANTS_PREFIX, check_id, execution_region

MEMORY = "shared"
"""The region that snapshots are of unless another is named."""


def main_region(owner: str) -> str:
    """The region that an owner has of his own: an agent's memory, a tenant's file store."""
    return TENANT_FILES if owner.startswith(TENANTS_PREFIX) else MEMORY


_SYNTAX = (
    "write AGENT@NUMBER, AGENT@latest or AGENT@-1 (the one before the latest), with :PATH for a path in it"
)
_REFERENCE = re.compile(rb"([^@:]+)@(latest|-?[0-9]{1,18})(?::(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reference:
    """A snapshot of a region of an agent. ``number``: 0 is the newest, -1 the one before it. ``path`` is
    None if none was given; the root's is empty. ``region`` is its place in keys, see ``layout``.
    """

    agent: str
    number: int
    path: bytes | None
    region: str = MEMORY

    @property
    def is_memory(self) -> bool:
        """Whether it is of the agent's memory, rather than of a region of one execution."""
        return self.region == MEMORY


def parse_reference(text: bytes) -> Reference:
    """Read a reference. Raises ``UsageError`` that states the syntax."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise UsageError(f"{printable(text)!r} names no snapshot", hint=_SYNTAX)
    agent, region = _parse_whose(match[1].decode(errors="surrogateescape"))
    if match[2] in (b"0", b"-0"):
        raise UsageError(f"{printable(text)!r}: snapshots count from 1", hint=_SYNTAX)
    number = 0 if match[2] == b"latest" else int(match[2])
    return Reference(agent, number, None if match[3] is None else clean_path(match[3]), region)


def _parse_whose(text: str) -> tuple[str, str]:
    """The agent, and the region's place in keys."""
    agent, *rest = text.split("/")
    check_id("agent", agent)
    if not rest:
        return agent, MEMORY
    if len(rest) != 2:
        raise UsageError(f"{text!r} names no region", hint="write AGENT, or AGENT/EXECUTION/REGION")
    return agent, execution_region(*rest)


def clean_path(path: bytes) -> bytes:
    """A path as listings have it: without slashes at its ends, or twice, or ``.`` components."""
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if b".." in names:
        raise UsageError(
            f"{printable(path)!r}: '..' leads nowhere in a snapshot", hint="write the path itself"
        )
    return b"/".join(names)


def whose(agent: str, region: str) -> str:
    """What stands before the @ in the names of a region's snapshots."""
    return agent if region == main_region(agent) else f"{agent}/{region.partition('/')[2]}"


def resolve(history: History, reference: Reference) -> int:
    """The number of the snapshot that is meant, which may not be there. Raises ``NotFoundError``."""
    if reference.number > 0:
        return reference.number
    newest = require_newest(history, reference.agent)
    if reference.number == 0:
        return newest
    # Counting back needs the numbers there are, and they have gaps: all of them, newest first.
    older = sorted(history.numbers(), reverse=True)
    found = next(islice(older, -reference.number, None), None)
    if found is None:
        raise NotFoundError(
            f"agent {reference.agent} has only {len(older)} snapshots", hint=_see_log(reference.agent)
        )
    return found


def require_newest(history: History, agent: str) -> int:
    """The number of the newest snapshot. Raises ``NotFoundError`` when there is none."""
    newest = history.newest()
    if not newest:
        raise NotFoundError(
            f"agent {agent} has no snapshot in {history.store_url}",
            hint="is the name right, and is it this --store that its memory is in?",
        )
    return newest


def read_snapshot(history: History, agent: str, number: int) -> Snapshot:
    """A snapshot that somebody asked for. Raises ``NotFoundError`` when it is not, or no longer, there."""
    try:
        return history.read(number)
    except ObjectNotFoundError as error:
        newest = require_newest(history, agent)
        problem = "there is none yet" if number > newest else "it was collected, or never was"
        raise NotFoundError(
            f"agent {agent} has no snapshot {number}: {problem} (the newest is {newest})",
            hint=_see_log(agent),
        ) from error


def open_snapshot(store: ObjectStore, reference: Reference) -> Snapshot:
    """The snapshot that a reference names. Raises ``NotFoundError``."""
    history = History(store, reference.agent, reference.region)
    return read_snapshot(history, reference.agent, resolve(history, reference))


def find(snapshot: Snapshot, path: bytes) -> Entry:
    """The entry of a path. Raises ``NotFoundError``."""
    for entry in snapshot.entries:
        if entry.path == path:
            return entry
    raise NotFoundError(
        f"{printable(path)} is not in snapshot {snapshot.number} of agent {snapshot.agent}",
        hint=f"agentfuse show {snapshot.agent}@{snapshot.number}: lists what is",
    )


def below(entries: Mapping[bytes, Entry], path: bytes) -> dict[bytes, Entry]:
    """A path and everything below it."""
    prefix = path + b"/"
    return {p: e for p, e in entries.items() if not path or p == path or p.startswith(prefix)}


def _see_log(agent: str) -> str:
    return f"agentfuse log --agent {agent} lists the snapshots that there are"
