"""The stores that this host uses, and which it has used before: a store that vanished is not an empty one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from agentfuse.home.tree import write_durably
from agentfuse.objectstore import ObjectStore, open_store
from agentfuse.objectstore.cache import with_cache
from agentfuse.objectstore.counted import CountedStore, Traffic
from agentfuse.snapshots.layout import is_object_key


class Stores:
    """Opens stores for a state directory, and remembers them there (``STATE/stores/``).

    All share a cache of ``cache_bytes`` in ``STATE/cache/``, and ``traffic`` counts what goes to them.
    """

    def __init__(self, state: Path, *, cache_bytes: int, traffic: Traffic | None = None) -> None:
        self.traffic = traffic or Traffic()
        self._directory = state / "stores"
        self._cache = state / "cache"
        self._cache_bytes = cache_bytes

    def open(self, url: str) -> ObjectStore:
        """The store at ``url``; one that was remembered must still be there. Raises ``StoreError``."""
        store = open_store(url, is_known=self._memo(url).exists())
        return with_cache(
            CountedStore(store, self.traffic),
            self._cache,
            self._cache_bytes,
            is_kept=is_object_key,
            traffic=self.traffic,
        )

    def remember(self, url: str) -> None:
        """The store at ``url`` is used from now on."""
        memo = self._memo(url)
        if not memo.exists():
            memo.parent.mkdir(mode=0o700, exist_ok=True)
            write_durably(memo, url.encode() + b"\n")

    def _memo(self, url: str) -> Path:
        return self._directory / hashlib.sha256(url.encode()).hexdigest()[:16]
