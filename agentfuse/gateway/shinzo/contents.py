"""Contents of many files: the small ones several at a time, for each costs a round trip or two."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from agentfuse.errors import NotFoundError, WrongTypeError
from agentfuse.gateway.filetree import Node
from agentfuse.gateway.shinzo.filesystem import Filesystem
from agentfuse.gateway.shinzo.matching import kill, python
from agentfuse.gateway.shinzo.searcher import RECORD
from agentfuse.gateway.together import together
from agentfuse.regions import MiB

SMALL_BYTES = 256 * 1024
"""What is no longer is held in memory."""

_WINDOW_FILES, _WINDOW_BYTES = 128, 8 * MiB
_AT_A_TIME = 16


def windows(nodes: Sequence[Node]) -> Iterator[Sequence[Node]]:
    """Some nodes at a time, in order; a file that is not small comes alone."""
    window: list[Node] = []
    size = 0
    for node in nodes:
        is_large = node.size > SMALL_BYTES
        if window and (is_large or len(window) == _WINDOW_FILES or size + node.size > _WINDOW_BYTES):
            yield window
            window, size = [], 0
        if is_large:
            yield [node]
        else:
            window.append(node)
            size += node.size
    if window:
        yield window


async def read_small(files: Filesystem, nodes: Sequence[Node]) -> Mapping[bytes, tuple[Node, bytes]]:
    """The contents of small files, by path, and what the files are by now; those that are gone are left out,
    and those that have become longer."""
    wanted = [node for node in nodes if node.type == "file"]
    found = {} if files.home is None else await _read_mounted(files.home, wanted)
    limiter = trio.CapacityLimiter(_AT_A_TIME)

    async def read(node: Node) -> None:
        async with limiter:
            place = files.place(node.path)
            try:
                opened = await place.tree.open(place.path)
            except (NotFoundError, WrongTypeError):
                return
            try:
                if opened.node.size <= SMALL_BYTES:
                    content = b"".join([piece async for piece in opened.stream()])
                    found[node.path] = (replace(opened.node, size=len(content)), content)
            finally:
                await opened.aclose()

    await together([partial(read, node) for node in wanted if node.path not in found])
    return found


async def _read_mounted(home: Path, nodes: Sequence[Node]) -> dict[bytes, tuple[Node, bytes]]:
    """What can be read through the mount at once; whatever is wrong with the others, its tree knows."""
    done = await trio.run_process(
        python("read", str(SMALL_BYTES), os.fspath(home)),
        stdin=b"".join(node.path + b"\0" for node in nodes),
        capture_stdout=True,
        stderr=subprocess.DEVNULL,
        check=False,
        deliver_cancel=kill,
    )
    found: dict[bytes, tuple[Node, bytes]] = {}
    if done.returncode:
        return found
    at = 0
    for node in nodes:
        size, mtime_ns, mode = RECORD.unpack_from(done.stdout, at)
        at += RECORD.size
        if size >= 0:
            content = done.stdout[at : at + size]
            found[node.path] = (replace(node, size=size, mtime_ns=mtime_ns, mode=mode), content)
            at += size
    return found
