"""Contents to be searched: copied, some at a time, one after the other into a nameless file.

What is live is read from the mount, by a process that can be killed; what is stored from the store.
"""

from __future__ import annotations

import os
import subprocess
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import trio

from agentfuse.errors import BusyError, NotFoundError
from agentfuse.gateway.filetree import Node
from agentfuse.gateway.shinzo.contents import SMALL_BYTES, read_small, windows
from agentfuse.gateway.shinzo.filesystem import Filesystem
from agentfuse.gateway.shinzo.matching import kill, python
from agentfuse.gateway.spool import on_disk
from agentfuse.regions import MiB
from agentfuse.sync.spool import nameless_file

MAX_FILE_BYTES = 10 * MiB


@dataclass(slots=True)
class Heap:
    """Contents one after the other in ``fd``, each ended by a line break. Use it as a context manager."""

    directory: Path
    limiter: trio.CapacityLimiter
    fd: int = -1
    starts: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    _end: int = 0

    def __enter__(self) -> Heap:
        with on_disk(self.directory):
            self.fd = nameless_file(self.directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def node_at(self, offset: int) -> Node:
        """Whose content is there."""
        return self.nodes[bisect_right(self.starts, offset) - 1]

    async def fill(self, files: Filesystem, nodes: Sequence[Node]) -> None:
        """Have the contents of these, and no others, but for those that are binary, too long or gone."""
        self.starts, self.nodes, self._end = [], [], 0
        await trio.to_thread.run_sync(os.ftruncate, self.fd, 0, limiter=self.limiter)
        if files.home is not None:
            await self._fill_from(files.home, nodes)
            return
        for window in windows(nodes):
            if window[0].size > SMALL_BYTES:
                await self._add(window, [await self._long(files, window[0])])
            else:
                small = await read_small(files, window)
                await self._add(window, [small[n.path][1] if n.path in small else None for n in window])

    async def _add(self, nodes: Sequence[Node], contents: Sequence[bytes | None]) -> None:
        """Put contents behind the others; None, and what is binary, is left out."""
        added = bytearray()
        for node, content in zip(nodes, contents, strict=True):
            if content is None or b"\0" in content:
                continue
            self.starts.append(self._end + len(added))
            self.nodes.append(node)
            added += content
            if not content.endswith(b"\n"):
                added += b"\n"
        await trio.to_thread.run_sync(self._write, bytes(added), limiter=self.limiter)

    async def _fill_from(self, home: Path, nodes: Sequence[Node]) -> None:
        done = await trio.run_process(
            python("gather", str(self.fd), str(MAX_FILE_BYTES), os.fspath(home)),
            stdin=b"".join(node.path + b"\0" for node in nodes),
            capture_stdout=True,
            stderr=subprocess.DEVNULL,
            check=False,
            pass_fds=(self.fd,),
            deliver_cancel=kill,
        )
        if done.returncode:
            raise BusyError("the agent's home is not there any more", hint="ask again")
        for node, place in zip(nodes, map(int, done.stdout.split()), strict=True):
            if place >= 0:
                self.starts.append(place)
                self.nodes.append(node)

    async def _long(self, files: Filesystem, node: Node) -> bytes | None:
        place = files.place(node.path)
        try:
            opened = await place.tree.open(place.path)
        except NotFoundError:
            return None
        content = bytearray()
        try:
            async for piece in opened.stream():
                content += piece
                if b"\0" in piece or len(content) > MAX_FILE_BYTES:
                    return None
        finally:
            await opened.aclose()
        return bytes(content)

    def _write(self, content: bytes) -> None:
        with on_disk(self.directory):
            left = memoryview(content)
            while left:
                written = os.pwrite(self.fd, left, self._end)
                self._end += written
                left = left[written:]
