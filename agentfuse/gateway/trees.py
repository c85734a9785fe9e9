"""The stored trees that this gateway works with, each once, so that requests share what is known."""

from __future__ import annotations

from collections import OrderedDict

import trio

from agentfuse.admission import Quota
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.storedtree import StoredTree
from agentfuse.objectstore.base import ObjectStore

_KEPT = 256
_KEPT_ENTRIES = 300_000
"""Listings are held in memory, some hundreds of bytes an entry: beyond this, trees that nobody asked for
lately are dropped."""


class Trees:
    """Makes trees and keeps those that are used. See ``StoredTree`` for the arguments."""

    def __init__(self, store: ObjectStore, *, committer: str, nursery: trio.Nursery, limits: Limits) -> None:
        self._store = store
        self._committer = committer
        self._nursery = nursery
        self._limits = limits
        self._trees: OrderedDict[tuple[str, str, Quota], StoredTree] = OrderedDict()

    def get(self, owner: str, region: str, quota: Quota) -> StoredTree:
        """The tree of a region of an owner."""
        key = (owner, region, quota)
        tree = self._trees.get(key)
        if tree is None:
            tree = self._trees[key] = StoredTree(
                self._store,
                owner,
                region,
                quota=quota,
                committer=self._committer,
                nursery=self._nursery,
                limits=self._limits,
            )
        self._trees.move_to_end(key)
        self._drop_idle()
        return tree

    def _drop_idle(self) -> None:
        entries = sum(tree.size for tree in self._trees.values())
        for key, tree in list(self._trees.items())[:-1]:
            if len(self._trees) <= _KEPT and entries <= _KEPT_ENTRIES:
                return
            if tree.is_idle:
                entries -= tree.size
                del self._trees[key]
