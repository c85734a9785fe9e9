"""Files that come in a form, on their way into a tree: all of them or none, as far as the tree can."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from agentfuse.door.doors import OnCollision
from agentfuse.errors import AgentfuseError, QuotaExceededError, UsageError
from agentfuse.gateway.bodies import TooLargeError
from agentfuse.gateway.edge import StatedError, problem_of
from agentfuse.gateway.filetree import FileTree, NewFile, Node
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.multipart import Part, read_form
from agentfuse.gateway.spool import Spool
from agentfuse.gateway.storedtree import StoredTree
from agentfuse.regions import Creator
from agentfuse.snapshots.entries import MAX_NAME_BYTES


@dataclass(frozen=True, slots=True)
class Uploads:
    """Takes forms. ``spool`` is where bodies wait."""

    spool: Path
    limits: Limits
    max_request_bytes: int

    @asynccontextmanager
    async def files(self, request: Request, *, max_file_bytes: int) -> AsyncIterator[list[NewFile]]:
        """The files of a request, one at least, by their names. Raises ``UsageError``, ``TooLargeError``."""
        with Spool(self.spool) as spool:
            form = await read_form(
                request,
                spool,
                self.limits.spool,
                files="files",
                max_file_bytes=max_file_bytes,
                max_bytes=self.max_request_bytes,
            )
            if not form.files:
                raise UsageError("no files", hint="send them as parts named 'files' of multipart/form-data")
            files = [_named(part) for part in form.files]
            if any(part.is_too_large for part in form.files):
                raise TooLargeError(f"a file is larger than {max_file_bytes:,} bytes")
            yield files


async def put_all(tree: FileTree, files: Sequence[NewFile], *, on_collision: OnCollision) -> Sequence[Node]:
    """Put a user's files into a tree: all of them, or none.

    That a live tree has no room is found before anything is put. What only turns up later, because others
    write there as well, or the home ends, leaves there what was put before: somebody may have seen it
    by then, and work with it. The error then says how many they are.
    """
    if isinstance(tree, StoredTree):
        return await tree.put(files, creator=Creator.USER, on_collision=on_collision)
    if on_collision == "number":  # nothing is replaced: all of it is new
        await _require_room(tree, files)
    nodes: list[Node] = []
    for file in files:
        try:
            nodes += await tree.put([file], creator=Creator.USER, on_collision=on_collision)
        except AgentfuseError as error:
            problem = problem_of(error)
            if not nodes or problem is None:
                raise
            message = f"only {len(nodes)} of {len(files)} files were uploaded: {problem.message}"
            raise StatedError(message, problem.status) from error
    return nodes


async def _require_room(tree: FileTree, files: Sequence[NewFile]) -> None:
    usage, needed = await tree.usage(), sum(file.body.size for file in files)
    left = max(0, usage.bytes_quota - usage.bytes)
    if needed > left:
        raise QuotaExceededError(f"this needs {needed:,} bytes, and there are {left:,} left")
    if len(files) > usage.files_quota - usage.files:
        raise QuotaExceededError(f"there is no room for {len(files)} more files")


def _named(part: Part) -> NewFile:
    name = part.name
    if name in (b"", b".", b"..") or b"\0" in name or len(name) > MAX_NAME_BYTES:
        raise UsageError("a part without a name that a file can have")
    return NewFile(name, part.body)
