"""The files that an execution begins with: staged ones, and copies from the tenant's store, in ``uploads/``.

What is asked for is checked and claimed before there is an execution. It is attached after the mount, before
anybody else may write there: a file whose name is there already was attached, so that doing it again, after
this gateway was killed, adds what is missing.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count

import trio

from agentfuse.admission import Quota
from agentfuse.client import AsyncHome
from agentfuse.door.worker import numbered
from agentfuse.errors import NotFoundError, QuotaExceededError, StoreError, UsageError
from agentfuse.gateway.executions.record import Execution, StagedFile
from agentfuse.gateway.filetree import FileTree, clean
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.staging import Staged, Staging
from agentfuse.regions import Creator

REGION = "uploads"
_MAX_FILES = 1000


class Attachments:
    """Checks, claims and attaches. ``tree_of``: the store of a tenant; ``quota``: that of ``uploads/``."""

    def __init__(
        self, staging: Staging, tree_of: Callable[[str], FileTree], quota: Quota, limits: Limits
    ) -> None:
        self._staging = staging
        self._tree_of = tree_of
        self._quota = quota
        self._limits = limits

    async def check(
        self, organization: str, tenant: str, staged: Sequence[str], files: Sequence[str]
    ) -> tuple[list[StagedFile], list[str]]:
        """What an execution may begin with, as its record has it: nothing is claimed yet.

        Raises ``UsageError`` for what is not there or is nobody's to use, ``QuotaExceededError`` for more
        than a home can hold.
        """
        if len(staged) + len(files) > _MAX_FILES:
            raise UsageError(f"an execution begins with {_MAX_FILES} files at most")
        if len({each.lower() for each in staged}) < len(staged):
            raise UsageError("a temp file is named twice", hint="each can be used once")
        found = [await self._find(organization, each) for each in staged]
        tree = self._tree_of(tenant)
        paths = [clean(path) for path in files]
        sizes = [await _size_of(tree, path) for path in paths]
        size = sum(each.size for each in found) + sum(sizes)
        if size > self._quota.bytes or len(found) + len(paths) > self._quota.files:
            raise QuotaExceededError(
                f"{len(found) + len(paths)} files of {size:,} bytes are more than {REGION}/ may hold",
                hint=f"it may hold {self._quota.files:,} files and {self._quota.bytes:,} bytes",
            )
        return [StagedFile(each.id, each.name) for each in found], [os.fsdecode(path) for path in paths]

    async def claim(self, organization: str, execution: str, staged: Sequence[StagedFile]) -> None:
        """Take staged files for an execution, all or none. Raises ``UsageError``."""
        try:
            for each in staged:
                await trio.to_thread.run_sync(
                    self._staging.claim, organization, each.id, execution, limiter=self._limits.lives
                )
        except NotFoundError as error:
            await self.release(organization, execution, [each.id for each in staged])
            raise UsageError(error.message, hint=error.hint) from None
        except StoreError:
            await self.release(organization, execution, [each.id for each in staged])
            raise

    async def release(self, organization: str, execution: str, staged: Sequence[str]) -> None:
        """Give back what was claimed for an execution that did not come to be; as far as that can be done.

        What is not given back is removed an hour later, as if it had not been used.
        """
        for file_id in staged:
            with suppress(StoreError, NotFoundError):
                await trio.to_thread.run_sync(
                    self._staging.give_back, organization, file_id, execution, limiter=self._limits.lives
                )

    async def attach(self, record: Execution, home: AsyncHome) -> None:
        """Bring everything into a home; what is there already is left alone."""
        names = iter(names_of(record))
        for each in record.staged:
            staged = await self._claimed(record, each)
            pieces = self._staging.pieces(staged)
            await self._put(home, next(names), _from_thread(pieces, self._limits.downloads))
        tree = self._tree_of(record.tenant)
        for path in record.files:
            file = await tree.open(os.fsencode(path))
            try:
                await self._put(home, next(names), file.stream())
            finally:
                await file.aclose()

    async def consume(self, record: Execution) -> None:
        """Staged files are in the home, durably: they are not needed any more."""
        for each in record.staged:
            with suppress(StoreError, NotFoundError):  # what is left is swept
                staged = await self._claimed(record, each)
                await trio.to_thread.run_sync(self._staging.remove, staged, limiter=self._limits.lives)

    async def _put(self, home: AsyncHome, name: bytes, pieces: AsyncIterator[bytes]) -> None:
        target = f"{REGION}/{os.fsdecode(name)}"
        try:
            await home.stat(target)
        except NotFoundError:
            await home.put(pieces, target, creator=Creator.USER, on_collision="refuse")

    async def _find(self, organization: str, file_id: str) -> Staged:
        try:
            return await trio.to_thread.run_sync(
                self._staging.find, organization, file_id, limiter=self._limits.reads
            )
        except NotFoundError as error:
            raise UsageError(error.message, hint=error.hint) from None

    async def _claimed(self, record: Execution, staged: StagedFile) -> Staged:
        return await trio.to_thread.run_sync(
            self._staging.claimed, record.organization, staged.id, record.id, limiter=self._limits.lives
        )


def names_of(record: Execution) -> list[bytes]:
    """What the files are called in the home, staged ones first: one whose name is taken gets a number."""
    names: dict[bytes, None] = {}
    for text in (*(each.name for each in record.staged), *record.files):
        name = os.fsencode(text).rpartition(b"/")[2]
        if name in names:
            name = next(each for each in (numbered(name, n) for n in count(1)) if each not in names)
        names[name] = None
    return list(names)


async def _size_of(tree: FileTree, path: bytes) -> int:
    try:
        node = await tree.stat(path)
    except NotFoundError as error:
        raise UsageError(error.message, hint="upload it to the tenant's store first") from None
    if node.type != "file":
        raise UsageError(f"{os.fsdecode(path)!a} is no file", hint="name the files of a directory one by one")
    return node.size


async def _from_thread(pieces: Iterator[bytes], limiter: trio.CapacityLimiter) -> AsyncIterator[bytes]:
    while piece := await trio.to_thread.run_sync(next, pieces, b"", limiter=limiter):
        yield piece
