"""What was told of files, in memory: the oracle of the log's own."""

from __future__ import annotations

from agentfuse.events.arrivals import Seen


class KnownFiles:
    """A ``Known`` that is a dictionary."""

    def __init__(self) -> None:
        self.files: dict[bytes, Seen] = {}

    def get(self, path: bytes) -> Seen | None:
        """See ``Known``."""
        return self.files.get(path)

    def put(self, path: bytes, seen: Seen) -> None:
        """See ``Known``."""
        self.files[path] = seen

    def remove(self, path: bytes) -> None:
        """See ``Known``."""
        del self.files[path]

    def at(self, path: bytes) -> list[tuple[bytes, Seen]]:
        """See ``Known``."""
        below = path and path + b"/"
        return sorted(item for item in self.files.items() if item[0] == path or item[0].startswith(below))

    def names_of(self, ino: int) -> list[tuple[bytes, Seen]]:
        """See ``Known``."""
        return sorted(item for item in self.files.items() if item[1].ino == ino)
