"""The stores that this host uses, and which it has used before: a store that vanished is not an empty one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from agentfuse.home.tree import write_durably
from agentfuse.objectstore import ObjectStore, open_store


class Stores:
    """Opens stores for a state directory, and remembers them there (``STATE/stores/``)."""

    def __init__(self, state: Path) -> None:
        self._directory = state / "stores"

    def open(self, url: str) -> ObjectStore:
        """The store at ``url``; one that was remembered must still be there. Raises ``StoreError``."""
        return open_store(url, is_known=self._memo(url).exists())

    def remember(self, url: str) -> None:
        """The store at ``url`` is used from now on."""
        memo = self._memo(url)
        if not memo.exists():
            memo.parent.mkdir(mode=0o700, exist_ok=True)
            write_durably(memo, url.encode() + b"\n")

    def _memo(self, url: str) -> Path:
        return self._directory / hashlib.sha256(url.encode()).hexdigest()[:16]
