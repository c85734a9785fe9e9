"""The files of a mounted home for who is outside: read from the backing tree, written through the mount.

What reads does so in threads, and never through the mount, for which a thread of ours could wait forever. A
content that is not here is fetched first, as for everybody else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import AsyncExitStack, aclosing, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from agentfuse.control.contract import Content, Page
from agentfuse.control.messages import OnCollision
from agentfuse.door.doors import MAX_DOORS, Doors, Part, Put
from agentfuse.errors import BusyError, ChangedError, NotFoundError, StoreError, WrongTypeError
from agentfuse.freezing import Freezer
from agentfuse.home.files import FileFacts, Files, etag_of, shown, told
from agentfuse.home.mime import type_of
from agentfuse.home.walk import Cursor, join, open_to_fill
from agentfuse.regions import LOOSE, PLATFORM, Creator
from agentfuse.sync.hydration import Hydration

PAGE_S = 1.0
"""How long a page of a listing may take once it has an entry."""

_READERS = 4
_OPENINGS = 5
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class LiveFiles:
    """The files of one mount. The trio thread's; ``files`` reads what is below ``tree``.

    ``content_of``: what a file of the platform's directory holds that is made when it is opened, by its name.
    """

    def __init__(
        self,
        files: Files,
        tree: Path,
        hydration: Hydration,
        doors: Doors,
        content_of: Callable[[bytes], bytes | None],
        *,
        freezer: Freezer | None = None,
    ) -> None:
        self._content_of = content_of
        self._files = files
        self._tree = tree
        self._hydration = hydration
        self._doors = doors
        self._freezer = freezer
        self._readers = trio.CapacityLimiter(_READERS)
        # However slowly contents come: what else is to be written finds a door.
        self._puts = trio.CapacityLimiter(MAX_DOORS - 1)
        self._conditional = trio.Lock()

    async def stat(self, region: str, path: bytes) -> FileFacts:
        """See ``Files.stat``."""
        facts = await trio.to_thread.run_sync(self._files.stat, region, path, limiter=self._readers)
        return self._as_of_now(facts)

    async def list(
        self, region: str, path: bytes, *, recursive: bool, brief: bool, limit: int, after: bytes | None
    ) -> Page:
        """What a directory holds, behind the path ``after``; raises as ``Files.list`` does.

        Fewer than ``limit`` when they take longer than ``PAGE_S``, but not none unless there are no more.
        Nobody waits for the thread of a listing that was cancelled, which ends at its next name.
        """
        listing = partial(self._files.list, region, path, recursive=recursive, brief=brief)
        page = partial(_page, listing, path, limit=limit, after=after)
        entries, last = await trio.to_thread.run_sync(page, limiter=self._readers, abandon_on_cancel=True)
        if region == LOOSE:
            entries = [self._as_of_now(facts) for facts in entries]
        return Page(entries, last)

    def _made_now(self, region: str, path: bytes) -> bytes | None:
        """The content of a file that is made when it is opened, None for every other."""
        directory, _, name = path.rpartition(b"/")
        if region != LOOSE or directory != PLATFORM.name.encode():
            return None
        return self._content_of(name)

    def _as_of_now(self, facts: FileFacts) -> FileFacts:
        content = self._made_now(facts.region, facts.path)
        if content is None:
            return facts
        return replace(
            facts,
            size=len(content),
            mime=type_of(facts.path, content),
            modified_at=time.time(),
            etag=hashlib.sha256(content).hexdigest(),
        )

    async def open(self, region: str, path: bytes) -> Content:
        """The content of a file; the caller closes it.

        Raises as ``Files.stat`` does, ``WrongTypeError`` for what is no file, ``StoreError`` when its content
        cannot be had, ``BusyError`` when others have its name again and again meanwhile.
        """
        for _ in range(_OPENINGS):
            facts = await self.stat(region, path)
            if facts.type != "file":
                raise WrongTypeError(
                    f"{shown(region, path)} is a {facts.type}, not a file",
                    hint="list it" if facts.type == "dir" else "symbolic links are not followed",
                )
            if (made := self._made_now(region, path)) is not None:
                return MadeFile(made, facts)
            where = where_of(region, path)
            try:
                fd = await trio.to_thread.run_sync(open_content, self._tree, where, limiter=self._readers)
                try:
                    await self._fetched(fd, where)
                    return OpenFile(fd, facts.mime or "application/octet-stream", self._readers)
                except BaseException:
                    os.close(fd)
                    raise
            except BusyError:
                continue  # something else has its name since a moment ago
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise StoreError(
                    f"the content of {shown(region, path)} cannot be had: {error.strerror}",
                    hint="if it is still in the object store only, the daemon's log says why",
                ) from error
        raise BusyError(f"{shown(region, path)} is being replaced all the time", hint="try again")

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
        """See ``Doors.put``. ``if_match``: the etag of what is replaced, or ``ChangedError`` is raised.

        Of those who ask so at a time the first one gets through; a process in the home is not held up.
        """
        self._require(region, path)
        async with self._puts, AsyncExitStack() as until_placed:
            if if_match is not None:
                content = self._unless_changed(content, region, path, if_match, until_placed)
            labels = await self._labels(region, path) if on_collision == "replace" else b""
            placed = await self._doors.put(
                region, path, content, creator=creator, size=size, on_collision=on_collision, mode=mode
            )
            if labels:
                await self._label(region, path, labels)
        return placed.path, placed.size_bytes

    async def put_parts(
        self, region: str, fd: int, parts: Sequence[Part], *, creator: Creator, on_collision: OnCollision
    ) -> Sequence[tuple[bytes, int, FileFacts | None]]:
        """See ``Doors.put_parts``: their paths, sizes, and facts if they are there still."""
        for part in parts:
            self._require(region, part.path)
        made: list[Put] = []
        async with self._puts:
            labels: list[bytes] = []
            if on_collision == "replace":
                labels = [each.labels if each else b"" for each in await self._facts(region, parts)]
            making = self._doors.put_parts(region, fd, parts, creator=creator, on_collision=on_collision)
            async with aclosing(making):
                async for some in making:
                    for put, kept in zip(some, labels[len(made) :], strict=False):
                        if kept:
                            await self._label(region, put.path, kept)
                    made += some
        facts = await self._facts(region, made)
        return [(put.path, put.size_bytes, found) for put, found in zip(made, facts, strict=True)]

    async def _facts(self, region: str, wanted: Sequence[Part | Put]) -> Sequence[FileFacts | None]:
        """Those of some paths; None where nothing is."""

        def look() -> list[FileFacts | None]:
            return [self._facts_now(region, each.path) for each in wanted]

        return await trio.to_thread.run_sync(look, limiter=self._readers)

    def _facts_now(self, region: str, path: bytes) -> FileFacts | None:
        try:
            return self._files.stat(region, path)
        except (NotFoundError, WrongTypeError):
            return None

    async def _labels(self, region: str, path: bytes) -> bytes:
        """Those of what has a path now."""
        try:
            return (await self.stat(region, path)).labels
        except NotFoundError:
            return b""

    async def _label(self, region: str, path: bytes, labels: bytes) -> None:
        """On the backing file: the mount itself may have no extended attributes."""
        label = partial(self._files.label, region, path, labels)
        ino = await trio.to_thread.run_sync(label, limiter=self._readers)
        self._doors.account(region).changed(ino)

    async def _unless_changed(
        self,
        content: AsyncIterator[bytes],
        region: str,
        path: bytes,
        if_match: str,
        until_placed: AsyncExitStack,
    ) -> AsyncIterator[bytes]:
        """The content, of which the end comes only if what it replaces is still the same."""
        async for piece in content:
            yield piece
        await until_placed.enter_async_context(self._conditional)
        try:
            found = (await self.stat(region, path)).etag
        except NotFoundError:
            found = ""
        if found != if_match:
            raise ChangedError(
                f"{shown(region, path)} is not what it was when it was read", hint="read it again"
            )

    async def mkdir(
        self, region: str, path: bytes, *, creator: Creator, parents: bool, exist_ok: bool
    ) -> None:
        """See ``Doors.mkdir``."""
        self._require(region, path)
        await self._doors.mkdir(region, path, creator=creator, parents=parents, exist_ok=exist_ok)

    async def annotate(
        self, region: str, path: bytes, *, creator: Creator, mode: int | None, labels: bytes | None
    ) -> None:
        """Change the permissions and labels of a file or directory; None leaves them."""
        self._require(region, path)
        if labels is not None:
            await self._label(region, path, labels)
        if mode is not None:
            await self._doors.set_mode(region, path, mode, creator=creator)

    async def remove(self, region: str, path: bytes, *, creator: Creator, recursive: bool) -> None:
        """See ``Doors.remove``."""
        self._require(region, path)
        await self._doors.remove(region, path, creator=creator, recursive=recursive)

    async def move(
        self, old: tuple[str, bytes], new: tuple[str, bytes], *, creator: Creator, on_collision: OnCollision
    ) -> bytes:
        """See ``Doors.move``."""
        self._require(*old)
        self._require(*new)
        return await self._doors.move(old, new, creator=creator, on_collision=on_collision)

    async def copy(
        self, old: tuple[str, bytes], new: tuple[str, bytes], *, creator: Creator, on_collision: OnCollision
    ) -> bytes:
        """See ``Doors.copy``."""
        self._require(*old)
        self._require(*new)
        async with self._puts:
            path = await self._doors.copy(old, new, creator=creator, on_collision=on_collision)
        list_labels = partial(_labels_below, self._files, *old)
        for below, labels in await trio.to_thread.run_sync(list_labels, limiter=self._readers):
            with suppress(NotFoundError, WrongTypeError):  # it is something else already
                await self._label(new[0], path + below, labels)
        return path

    async def set_frozen(self, region: str, path: bytes, *, frozen: bool) -> None:
        """See ``Freezer.set_frozen``."""
        assert self._freezer
        self._require(region, path)
        with told(region, path):
            ino = await self._freezer.set_frozen(where_of(region, path), frozen=frozen)
        self._doors.account(region).changed(ino)

    def _require(self, region: str, path: bytes) -> None:
        """Only what is in a region: not the platform's own directory, which has doors as well."""
        self._files.require(region, path)

    async def _fetched(self, fd: int, where: bytes) -> None:
        """Wait until the content of an open file is here. Raises ``OSError`` as ``Hydration.need`` does."""
        ino = os.fstat(fd).st_ino
        while (item := self._hydration.absent.by_ino.get(ino)) is not None and not item.allows(writing=False):
            await self._hydration.need(item, lambda: self._open_to_fill(where), writing=False)

    def _open_to_fill(self, where: bytes) -> int:
        with Cursor(self._tree) as cursor:
            directory_fd, name = cursor.parent(where)
            return open_to_fill(name, directory_fd)


def open_content(tree: Path, where: bytes, *, unlocks: bool = True) -> int:
    """Open a file of a backing tree for reading, never through a symlink. Raises ``OSError``, ``BusyError``.

    ``unlocks``: whether a mode may be changed for a moment to get at what its owner locked.
    """
    with Cursor(tree, unlocks=unlocks, only_looks=True) as cursor:
        return cursor.open_file(where)


class OpenFile:
    """An open file whose content is here."""

    def __init__(self, fd: int, mime: str, limiter: trio.CapacityLimiter) -> None:
        found = os.fstat(fd)
        self.size = found.st_size
        self.mime = mime
        self.etag = etag_of(found)
        self.modified_at = found.st_mtime
        self._fd = fd
        self._limiter = limiter

    async def read(self, offset: int, size: int) -> bytes:
        """So many bytes, or fewer at the end of the file."""
        return await trio.to_thread.run_sync(os.pread, self._fd, size, offset, limiter=self._limiter)

    async def aclose(self) -> None:
        """Close it; again is no mistake."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class MadeFile:
    """A file whose content was made for who opened it."""

    def __init__(self, content: bytes, facts: FileFacts) -> None:
        self.size = len(content)
        self.mime = facts.mime or "application/octet-stream"
        self.etag = hashlib.sha256(content).hexdigest()
        self.modified_at = facts.modified_at
        self._content = content

    async def read(self, offset: int, size: int) -> bytes:
        """So many bytes, or fewer at the end of the file."""
        return self._content[offset : offset + size]

    async def aclose(self) -> None:
        """Nothing is open."""


def _page(
    list_files: Callable[..., Generator[FileFacts, None, None]],
    directory: bytes,
    *,
    limit: int,
    after: bytes | None,
) -> tuple[list[FileFacts], bytes | None]:
    """The next entries, and the path below the directory to go on behind, None if those were all."""
    entries: list[FileFacts] = []
    ends_at = time.monotonic() + PAGE_S

    def check() -> None:
        trio.from_thread.check_cancelled()
        if entries and time.monotonic() >= ends_at:
            raise _TimeOverError

    def last() -> bytes:
        path = entries[-1].path
        return path[len(directory) + 1 :] if directory else path or entries[-1].name

    with closing(list_files(after=after or b"", check=check)) as listing:
        try:
            for facts in listing:
                if len(entries) == limit:
                    return entries, last()
                entries.append(facts)
        except _TimeOverError:
            return entries, last()
    return entries, None


def where_of(region: str, path: bytes) -> bytes:
    """Where a path of a region is, from the backing tree's root."""
    return path if region == LOOSE else join(region.encode(), path)


def _labels_below(files: Files, region: str, path: bytes) -> list[tuple[bytes, bytes]]:
    """The labels of a path and of what is in it, by what follows the path."""
    try:
        top = files.stat(region, path)
        below = files.list(region, path, recursive=True, brief=True) if top.type == "dir" else ()
        return [(each.path[len(path) :], each.labels) for each in (top, *below) if each.labels]
    except (NotFoundError, WrongTypeError):
        return []


class _TimeOverError(Exception):
    """A page has taken long enough."""
