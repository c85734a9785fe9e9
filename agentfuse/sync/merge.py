"""What becomes of the conflicts of a rebase: texts are fetched, merged by line, and held to be sent.

Whatever cannot be had or merged stays a conflict, with both versions kept.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import msgspec

from agentfuse.errors import IntegrityError, ObjectNotFoundError
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.entries import Entry, printable
from agentfuse.snapshots.rebase import Conflict, Listing, Rebased, rebase
from agentfuse.sync.contents import read_content
from agentfuse.sync.textmerge import MAX_TEXT_BYTES, merge_texts
from agentfuse.sync.upload import Readable

_log = logging.getLogger(__name__)

MAX_HELD_BYTES = 16 * 1024 * 1024
"""Merged texts are held until they are sent. What would go beyond this stays a conflict."""


@dataclass(frozen=True, slots=True)
class Merger:
    """Rebases listings of one agent. ``read_mine`` reads the content of an entry of this side, verified;
    None if it cannot be had any more. ``held``: contents of the others that the store has not, by hash."""

    store: ObjectStore
    agent: str
    execution: str
    read_mine: Callable[[Entry], bytes | None]
    held: Mapping[str, bytes] = field(default_factory=dict)

    def rebase(self, base: Listing, theirs: Listing, mine: Listing) -> tuple[Rebased, dict[bytes, bytes]]:
        """As ``rebase`` of ``snapshots``, with texts merged; the merged contents, by path.

        Raises ``StoreError`` when the store cannot be reached, and what ``read_mine`` raises.
        """
        rebased = rebase(base, theirs, mine, self.execution)
        texts = self._merge(rebased.conflicts)
        if texts:
            made = {path: (_hash(text), len(text)) for path, text in texts.items()}
            rebased = rebase(base, theirs, mine, self.execution, merged=made)
        return rebased, texts

    def _merge(self, conflicts: Iterable[Conflict]) -> dict[bytes, bytes]:
        texts: dict[bytes, bytes] = {}
        left = MAX_HELD_BYTES
        for conflict in conflicts:
            text = self._merge_one(conflict) if _may_merge(conflict) else None
            if text is not None and len(text) <= left:
                texts[conflict.path] = text
                left -= len(text)
        return texts

    def _merge_one(self, conflict: Conflict) -> bytes | None:
        assert conflict.theirs is not None
        base = None
        if conflict.base is not None and conflict.base.type == "file":
            base = self._read(conflict.base)
            if base is None:
                return None
        theirs = self._read(conflict.theirs)
        mine = self.read_mine(conflict.mine)
        return None if theirs is None or mine is None else merge_texts(base, theirs, mine)

    def _read(self, entry: Entry) -> bytes | None:
        """A stored content; None if the store has it no longer."""
        if entry.sha256 in self.held:
            return self.held[entry.sha256]
        if entry.size and not entry.object:
            return None
        try:
            return read_content(self.store, self.agent, entry)
        except (ObjectNotFoundError, IntegrityError) as error:
            _log.warning("%s is kept in both versions: %s", printable(entry.path), error)
            return None


def sources(
    texts: Mapping[bytes, bytes], entries: Listing
) -> tuple[list[Entry], dict[str, Callable[[], Readable]]]:
    """Merged texts as what an upload takes: one entry for each content, and what opens it."""
    files = {_hash(text): (path, text) for path, text in texts.items()}
    opens: dict[str, Callable[[], Readable]] = {
        sha256: partial(io.BytesIO, text) for sha256, (_, text) in files.items()
    }
    return [msgspec.structs.replace(entries[path], link=0) for path, _ in files.values()], opens


def _may_merge(conflict: Conflict) -> bool:
    versions = (conflict.base, conflict.theirs, conflict.mine)
    return (
        not conflict.is_part
        and conflict.theirs is not None
        and conflict.theirs.type == conflict.mine.type == "file"
        and all(version is None or version.size <= MAX_TEXT_BYTES for version in versions)
    )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
