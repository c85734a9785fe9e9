"""The file tree that the gateway's APIs work on: one interface, whether the home is mounted or not.

*Stored* trees (``storedtree``) are snapshots in the object store: of tenants, of ended executions, of idle
agents. *Live* ones are mounted homes, reached through ``agentfuse.client``. So the interface promises only
what both can keep, and is asynchronous; what differs is said here.

Paths are bytes relative to the tree's root, whose own path is empty, as snapshots have them: names are bytes,
and what an API writes instead of those that are not UTF-8 is the API's affair (``clean`` reads what it gets).
Symbolic links are shown as what they are and never followed.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from agentfuse.door.doors import OnCollision
from agentfuse.errors import UsageError
from agentfuse.regions import Creator
from agentfuse.snapshots.entries import MAX_NAME_BYTES, Kind
from agentfuse.sync.upload import Readable

MAX_PATH_BYTES = 4095

MAX_LABELS_BYTES = 2048
"""Some filesystems have 4 KiB for all attributes of a file."""


@dataclass(frozen=True, slots=True)
class Node:
    """One path. ``size`` is in bytes, of files only; ``mtime_ns`` nanoseconds since the epoch.

    ``etag`` is a strong validator of a file's content, without quotes. ``labels``: what
    :meth:`FileTree.annotate` was given last. ``created_ns``: when a live file came to its host; in the store
    no time but the mtime is known. ``is_frozen``: see :meth:`FileTree.set_frozen`.
    """

    path: bytes
    type: Kind
    size: int
    mode: int
    mtime_ns: int
    created_by: Creator
    etag: str = ""
    labels: bytes = b""
    created_ns: int = 0
    is_frozen: bool = False

    @property
    def name(self) -> bytes:
        """What a listing of its directory calls it."""
        return self.path.rpartition(b"/")[2]

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return self.type == "dir"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tree holds and may hold; ``files`` counts directories, too."""

    bytes: int
    files: int
    bytes_quota: int
    files_quota: int


class Body(Protocol):
    """A content on its way into a tree: on this host's disk, read as often as need be."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def sha256(self) -> str:
        """Of the content, in hexadecimal."""

    def open(self) -> Readable:
        """From its beginning; several may be open at a time, in any thread."""


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be put."""

    path: bytes
    body: Body
    mode: int = 0o644


class OpenedFile(Protocol):
    """A file as it was when it was opened, or, of a live home, as it is being read."""

    @property
    def node(self) -> Node:
        """Its facts then."""

    def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """The content, or a part of it, in pieces. Raises ``StoreError`` when it cannot be had, also in
        the middle; it is never silently cut short."""

    async def aclose(self) -> None:
        """Let go of what it holds."""


class FileTree(Protocol):
    """A tree of files with a quota.

    Every method raises ``StoreError`` when the store failed, and ``UsageError`` for what makes no sense;
    ``FrozenError`` what would change or move a frozen file, a directory that holds one included.
    What changes the tree is there for every gateway when it returns. ``creator``: who does it, to
    whom what is made belongs, copies included; what is moved stays whose it was.
    """

    async def stat(self, path: bytes) -> Node:
        """The facts of a path. Raises ``NotFoundError``."""

    async def list(self, path: bytes, *, recursive: bool = False) -> Sequence[Node]:
        """What a directory holds, in order of path. Raises ``NotFoundError``, ``WrongTypeError``."""

    async def open(self, path: bytes) -> OpenedFile:
        """A file to be read. Raises ``NotFoundError``, ``WrongTypeError``."""

    async def put(
        self,
        files: Sequence[NewFile],
        *,
        creator: Creator,
        on_collision: OnCollision = "replace",
        directories: Sequence[bytes] = (),
        if_match: str = "",
    ) -> Sequence[Node]:
        """Make files, and the directories that they need: each whole or not at all; where they are then.

        A file whose name is taken replaces the file there, whose labels it keeps, is refused, or becomes
        ``name (1)``. ``directories`` are made as well, those that are not there yet. ``if_match``: the etag
        that each of the files must have until it is replaced, else ``ChangedError``.

        A stored tree takes all of them or none, in one step with the quota. A live one takes them in
        order, and those before a failure stay. Raises ``QuotaExceededError``, ``ExistsError`` (with
        ``refuse``), ``WrongTypeError`` for a directory of that name or a file in the way.
        """

    async def delete(self, path: bytes, *, creator: Creator, recursive: bool = False) -> None:
        """Remove a path. Raises ``NotFoundError``, ``NotEmptyError`` (a directory, unless ``recursive``)."""

    async def move(self, source: bytes, target: bytes, *, creator: Creator, overwrite: bool = False) -> None:
        """Give a path another name, making the directories that it needs; onto itself changes nothing.

        Raises ``NotFoundError``, ``ExistsError`` (also for a directory of that name with ``overwrite``),
        ``UsageError`` for a directory into itself.
        """

    async def copy(self, source: bytes, target: bytes, *, creator: Creator, overwrite: bool = False) -> None:
        """As :meth:`move`, of which the source stays. Raises ``QuotaExceededError``, too."""

    async def mkdir(
        self, path: bytes, *, creator: Creator, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Make a directory. Raises ``ExistsError``, ``NotFoundError`` (no parent), ``WrongTypeError`` for a
        file in the way, ``QuotaExceededError``."""

    async def annotate(
        self, path: bytes, *, creator: Creator, mode: int | None = None, labels: bytes | None = None
    ) -> Node:
        """Set the permissions and labels of a file or directory; None leaves them. Its facts then.

        Labels are some bytes of an API's, up to ``MAX_LABELS_BYTES``, that go wherever the file goes. Raises
        ``NotFoundError``, ``WrongTypeError`` for what is neither a file nor a directory."""

    async def set_frozen(self, path: bytes, frozen: bool, *, creator: Creator) -> Node:
        """Freeze a file: nobody changes it, or takes it away, until it is thawed. Its facts then.

        A copy of it is not frozen. Raises ``NotFoundError``, ``WrongTypeError`` for what is no file, and of
        a live tree ``BusyError`` while somebody has it open for writing.
        """

    async def usage(self) -> Usage:
        """What it holds."""


def clean(text: str | bytes) -> bytes:
    """A path of a client's as trees have it: relative, without empty and ``.`` components.

    Text stands for bytes as ``os.fsdecode`` makes it. Raises ``UsageError`` for ``..``, NUL, and for what no
    filesystem could hold.
    """
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError("the path is not valid Unicode", hint="send it as UTF-8") from None
    names = [name for name in raw.split(b"/") if name not in (b"", b".")]
    if b"\0" in raw or b".." in names:
        raise UsageError("a path must not contain '..' or NUL", hint="write it from the root of the tree")
    if any(len(name) > MAX_NAME_BYTES for name in names) or len(raw) > MAX_PATH_BYTES:
        raise UsageError(f"a name is longer than {MAX_NAME_BYTES} bytes or a path than {MAX_PATH_BYTES}")
    return b"/".join(names)
