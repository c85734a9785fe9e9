"""What each region may hold and what it holds: plain arithmetic, exact to the byte.

An ``Account`` is charged before bytes or names come to be and refunded when they are gone. There is
no lock: whoever checks, acts on the local tree and books does so without a checkpoint in between
(see docs/development.md). The truth is the tree; ``agentfuse.home.tree.weigh`` recomputes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from agentfuse.errors import QuotaExceededError
from agentfuse.home.changes import Changes
from agentfuse.home.observer import Observer
from agentfuse.regions import LOOSE, PLATFORM, Region, SyncPolicy

NEARLY_FULL = 0.8
"""The fraction of a quota from which on its use is worth a warning."""


def fraction(used: int, quota: int) -> float:
    """How much of a quota is used; 1 of none at all."""
    return used / quota if quota else float(used > 0)


def fraction_used(use: Mapping[str, int]) -> float:
    """How full an account is by its ``as_dict``: in bytes or in files, whichever is more."""
    return max(
        fraction(use["bytes_used"], use["bytes_quota"]), fraction(use["files_used"], use["files_quota"])
    )


class Account:
    """Use of one region: logical bytes of its regular files, and inodes that have a name in it.

    An inode that is unlinked but still open stays charged until its last close. ``refusals`` counts
    how often the quota said no, and ``on_refusal`` is called then with what there was no room for.
    ``bytes_read`` and ``bytes_written`` are what went through the mount since it began (what the kernel
    answers from its cache does not). ``changes`` is None for a region that is not synced during the run,
    ``observer`` for one whose files nobody is told of. ``creator``: see ``Region``.
    """

    __slots__ = (
        "bytes_quota",
        "bytes_read",
        "bytes_used",
        "bytes_written",
        "changes",
        "creator",
        "files_quota",
        "files_used",
        "is_platforms",
        "name",
        "observer",
        "on_refusal",
        "refusals",
    )

    def __init__(self, region: Region) -> None:
        self.name = region.name
        self.creator = region.creator
        self.is_platforms = region is PLATFORM
        self.bytes_quota = region.bytes_quota
        self.files_quota = region.files_quota
        self.bytes_used = 0
        self.files_used = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.refusals = 0
        self.on_refusal: Callable[[Account, str], None] | None = None
        self.changes = Changes() if region.sync is SyncPolicy.CONTINUOUS else None
        self.observer: Observer | None = None

    def room(self) -> int:
        """Bytes that may still be added; 0 when the region is full or over its quota."""
        return max(0, self.bytes_quota - self.bytes_used)

    def refuse(self, what: str) -> QuotaExceededError:
        """Count a refusal and return the error to raise."""
        self.refusals += 1
        if self.on_refusal is not None:
            self.on_refusal(self, what)
        return QuotaExceededError(
            f"{self.name}: the quota has no room for {what}",
            hint=f"remove what is not needed, or raise it: agentfuse quota MOUNTPOINT {self.name} --help",
        )

    def require(self, bytes_more: int, files_more: int) -> None:
        """Raise ``QuotaExceededError`` unless that much more fits. What shrinks is never refused."""
        if bytes_more > 0 and self.bytes_used + bytes_more > self.bytes_quota:
            raise self.refuse(f"{bytes_more} more bytes")
        if files_more > 0 and self.files_used + files_more > self.files_quota:
            raise self.refuse(f"{files_more} more files")

    def add(self, bytes_more: int, files_more: int) -> None:
        """Book what has come (or, negative, gone)."""
        self.bytes_used += bytes_more
        self.files_used += files_more

    def changed(self, ino: int, size_bytes: int | None = None) -> None:
        """A name or an attribute of the inode ``ino`` in this region has changed; see ``Changes.note``."""
        if self.changes is not None:
            self.changes.note(ino, size_bytes)
            self.changes.note_complete()

    def as_dict(self) -> dict[str, int]:
        """``{bytes_used, bytes_quota, files_used, files_quota, refusals}``."""
        return {
            "bytes_used": self.bytes_used,
            "bytes_quota": self.bytes_quota,
            "files_used": self.files_used,
            "files_quota": self.files_quota,
            "refusals": self.refusals,
        }


class Ledger:
    """The accounts of one home: one per region directory, and the loose one for everything else.

    ``platform`` is that of the platform's own directory, which is not among them: nobody is told of its use.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        accounts = {region.name: Account(region) for region in regions}
        self.loose = accounts.pop(LOOSE)
        self.platform = Account(PLATFORM)
        self.by_directory: dict[bytes, Account] = {name.encode(): a for name, a in accounts.items()}

    def accounts(self) -> list[Account]:
        """All accounts, the loose one last."""
        return [*self.by_directory.values(), self.loose]

    def of_root_entry(self, name: bytes) -> Account:
        """The account that an entry of the home's root is charged to."""
        return self.by_directory.get(name) or (self.platform if name == _PLATFORM else self.loose)

    def is_root(self, name: bytes) -> bool:
        """Whether an entry of the home's root is the directory of a region, or the platform's own."""
        return name in self.by_directory or name == _PLATFORM


_PLATFORM = PLATFORM.name.encode()
