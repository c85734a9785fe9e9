"""The snapshots of a played seed as trees, read by the store's own code and without a mount."""

from __future__ import annotations

import os
from pathlib import Path

from crash.hosts import AGENT
from crash.steps import Node, Tree

from agentfuse.objectstore.local import LocalStore
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.history import History
from agentfuse.sync.contents import read_content


class Snapshots:
    """All of them, each read at most once, and each content."""

    def __init__(self, store: Path) -> None:
        self.store = LocalStore(store)
        self._history = History(self.store, AGENT, "shared")
        self._contents: dict[str, bytes] = {}

    def numbers(self) -> list[int]:
        return list(self._history.numbers())

    def read(self, number: int) -> tuple[Snapshot, Tree]:
        """A snapshot and its tree, without the rows of databases."""
        snapshot = self._history.read(number)
        tree = Tree()
        nodes: dict[int, Node] = {}
        for entry in snapshot.entries:
            if entry.path:
                node = nodes.get(entry.link) or self._node(entry)
                tree.names[os.fsdecode(entry.path)] = node
                if entry.link:
                    nodes[entry.link] = node
        return snapshot, tree

    def _node(self, entry: Entry) -> Node:
        if entry.type != "file":
            mode = entry.mode if entry.type == "dir" else 0
            return Node(entry.type, mode, target=os.fsdecode(entry.target))
        if entry.sha256 not in self._contents:
            self._contents[entry.sha256] = read_content(self.store, AGENT, entry)
        return Node("file", entry.mode, bytearray(self._contents[entry.sha256]))
