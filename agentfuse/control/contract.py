"""What the control API needs of a mount. Nothing here knows HTTP, or how a mount does it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from agentfuse.control.eventstream import EventLine
from agentfuse.control.messages import Level, OnCollision
from agentfuse.door.doors import Part
from agentfuse.regions import Creator

Lines = AsyncGenerator[dict[str, object], None]
Events = AsyncGenerator[Sequence[EventLine], None]


class Facts(Protocol):
    """What is known of one name: ``as_dict`` has the fields of ``messages.FileInfo``."""

    def as_dict(self) -> dict[str, object]: ...


class Page(NamedTuple):
    """Some of a listing, and where it goes on, None at its end."""

    entries: Sequence[Facts]
    after: bytes | None


class Content(Protocol):
    """An open file, to be closed by ``aclose``. ``etag``, without quotes, changes when the content does."""

    @property
    def size(self) -> int: ...
    @property
    def mime(self) -> str: ...
    @property
    def etag(self) -> str: ...
    @property
    def modified_at(self) -> float: ...

    async def read(self, offset: int, size: int) -> bytes:
        """So many bytes, or fewer at the end of the file."""

    async def aclose(self) -> None:
        """Close it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which requests somebody follows: all of what is set must hold.

    ``path`` is a glob below the mountpoint, whose ``*`` matches slashes, too.
    """

    operations: frozenset[str] = frozenset()
    path: str | None = None
    pid: int | None = None
    region: str | None = None
    errors: bool = False


class FilesControl(Protocol):
    """The files of a mount. Every method raises an AgentfuseError; a region's root has an empty path."""

    async def stat(self, region: str, path: bytes) -> Facts:
        """The facts of one name, a symlink's own."""

    async def list(
        self, region: str, path: bytes, *, recursive: bool, brief: bool, limit: int, after: bytes | None
    ) -> Page:
        """What a directory holds, behind ``after``: ``limit`` names at most, fewer when they take long."""

    async def open(self, region: str, path: bytes) -> Content:
        """The content of a file, which is fetched if it is not here."""

    async def put(
        self,
        region: str,
        path: bytes,
        content: AsyncIterator[bytes],
        *,
        creator: Creator,
        size: int | None,
        on_collision: OnCollision,
        mode: int,
        if_match: str | None,
    ) -> tuple[bytes, int]:
        """Make a file, whole or not at all: its path and size. ``if_match``: only in place of this etag."""

    async def put_parts(
        self, region: str, fd: int, parts: Sequence[Part], *, creator: Creator, on_collision: OnCollision
    ) -> Sequence[tuple[bytes, int, Facts | None]]:
        """Make files of parts of a descriptor, one after the other, each whole or not at all: their paths,
        sizes, and facts if they are there still."""

    async def mkdir(
        self, region: str, path: bytes, *, creator: Creator, parents: bool, exist_ok: bool
    ) -> None:
        """Make a directory."""

    async def annotate(
        self, region: str, path: bytes, *, creator: Creator, mode: int | None, labels: bytes | None
    ) -> None:
        """Change the permissions and labels of a file or directory; None leaves them."""

    async def set_frozen(self, region: str, path: bytes, *, frozen: bool) -> None:
        """Freeze a file, so that nobody can change it or take it away, or have done with that."""

    async def remove(self, region: str, path: bytes, *, creator: Creator, recursive: bool) -> None:
        """Remove a name."""

    async def move(
        self, old: tuple[str, bytes], new: tuple[str, bytes], *, creator: Creator, on_collision: OnCollision
    ) -> bytes:
        """Give a file another name: the path that it got."""

    async def copy(
        self, old: tuple[str, bytes], new: tuple[str, bytes], *, creator: Creator, on_collision: OnCollision
    ) -> bytes:
        """Make another file or directory of what there is: the path that it got."""


class MountControl(Protocol):
    """What a mount lets its operators do."""

    @property
    def files(self) -> FilesControl:
        """Its files."""

    def status(self) -> dict[str, object]:
        """The mount as JSON values; quick, without I/O."""

    async def metrics(self) -> bytes:
        """What is counted, in Prometheus' text format."""

    async def check(self) -> dict[str, object]:
        """Whether the home is sound, as JSON values; see ``inspection.HomeReport``."""

    def regions(self) -> list[dict[str, object]]:
        """The regions with their settings and their use."""

    async def set_quota(self, region: str, *, bytes_quota: int | None, files_quota: int | None) -> None:
        """Change what a region may hold, for as long as its execution is mounted on this host."""

    def trace(self, wanted: Wanted, *, for_s: float | None) -> AsyncGenerator[list[dict[str, object]], None]:
        """Requests of the kernel as they happen, for so long; an empty list while there are none."""

    def watch(self, *, interval_s: float, frames: int | None) -> Lines:
        """What happened in each of so many intervals; None: for as long as this is drawn."""

    def events(self, *, since: int | None, region: str | None, follow: bool) -> Events:
        """Events numbered higher than ``since``, as they come; an empty list while there are none.

        An AgentfuseError that comes before the first list is the answer; later it ends the answer.
        """

    def checkpoint(self) -> dict[str, dict[str, object]]:
        """Begin to commit what is changed, and wait for nothing: the state of each region that is synced."""

    def sync(self, *, timeout_s: float) -> Lines:
        """Wait until everything that was closed before is in the store, or raise after ``timeout_s``."""

    def drain(self, *, timeout_s: float, hold_s: float) -> Lines:
        """As :meth:`sync`, and then nothing changes until ``hold_s`` is over, or the generator closed.

        Yields often, so that a client that left is noticed.
        """

    def unmount(self, *, lazy: bool, timeout_s: float | None) -> Lines:
        """End the mount and tell how it goes, in the objects of the NDJSON answer.

        The generator only watches: the work belongs to the daemon and goes on when the generator is
        closed early. It is not closed because a client left. An AgentfuseError that it raises
        becomes the last line.
        """

    def set_log_level(self, level: Level) -> None:
        """Log from this level on."""

    def dump(self) -> str:
        """What every thread and every task does, for people."""
