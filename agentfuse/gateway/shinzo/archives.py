"""Archives: made of an agent's files, and extracted to them."""

from __future__ import annotations

import posixpath
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import trio
from starlette.requests import Request
from starlette.responses import Response

from agentfuse.errors import ExistsError, NotFoundError, QuotaExceededError, UsageError, WrongTypeError
from agentfuse.gateway.bodies import JsonAnswer, read_json
from agentfuse.gateway.filetree import NewFile, Node
from agentfuse.gateway.shinzo.contents import SMALL_BYTES, read_small, windows
from agentfuse.gateway.shinzo.desk import Desk, flag, number
from agentfuse.gateway.shinzo.filesystem import USER, Filesystem, Place
from agentfuse.gateway.shinzo.packing import FORMATS, Format, Packer, format_of, packer
from agentfuse.gateway.shinzo.paths import absolute, path_in
from agentfuse.gateway.shinzo.unpacking import Contents, unpack
from agentfuse.gateway.spool import Spool, Spooled
from agentfuse.gateway.together import together
from agentfuse.home.walk import join
from agentfuse.snapshots.entries import parent_of, printable

_MAX_PATHS = 1000
_LEVEL = 6
_PUTS_AT_A_TIME = 4


class Archives:
    """What the routes do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def pack(self, request: Request) -> Response:
        """Make an archive of files and directories. Names in it begin where the paths part. Symbolic links
        and the like are left out. Without a `format` the name of the archive says it, else it is tar.gz."""
        body = await read_json(request)
        paths = _paths_of(body)
        output = path_in(body, "outputPath", "output_path")
        kind, level = _format_of(body, output), number(body, "compressionLevel", "compression_level")
        if level is not None and level > 9:
            raise UsageError("compressionLevel must be 0 to 9")
        overwrite = flag(body, "overwrite")
        files = await self._desk.open(request)
        place = files.place(output)
        await _require_free(place, overwrite=overwrite)
        nodes = await _nodes_at(files, paths)
        nodes.pop(output, None)
        with Spool(self._desk.spool) as spool:
            archive = await trio.to_thread.run_sync(spool.begin, limiter=self._desk.limits.spool)
            writer = packer(kind, archive, _LEVEL if level is None else level)
            max_bytes = (await place.tree.usage()).bytes_quota
            start, packed = _start_of_names(paths), 0
            for window in windows([node for node in nodes.values() if node.type in ("file", "dir")]):
                packed += await self._add(files, window, start, writer)
                if archive.size > max_bytes:
                    raise QuotaExceededError(f"the archive is larger than {place.region} may be")
            await self._in_thread(writer.close)
            (made,) = await place.tree.put(
                [NewFile(place.path, archive)],
                creator=USER,
                on_collision="replace" if overwrite else "refuse",
            )
        answer = {"path": absolute(output), "size": made.size, "format": kind}
        return JsonAnswer(answer | {"skipped": len(nodes) - packed}, 201)

    async def extract(self, request: Request) -> Response:
        """Extract an archive, of a kind that its content tells, into a directory. Everything in it is checked
        before anything is written. Symbolic links in it are left out."""
        body = await read_json(request)
        source, output = (
            path_in(body, "archivePath", "archive_path"),
            path_in(body, "outputPath", "destination"),
        )
        overwrite = flag(body, "overwrite")
        files = await self._desk.open(request)
        archive, target = files.place(source), files.place(output)
        with Spool(self._desk.spool) as spool:
            fetched = await self._fetched(archive, spool)
            usage = await target.tree.usage()
            work = partial(unpack, fetched, spool, max_bytes=usage.bytes_quota, max_files=usage.files_quota)
            found = await trio.to_thread.run_sync(work, limiter=self._desk.limits.archives)
            replaced = await _collisions(target, found, overwrite=overwrite)
            if found.bytes - replaced > usage.bytes_quota - usage.bytes:
                raise QuotaExceededError(
                    f"{found.bytes:,} bytes are in the archive, for which there is no room"
                )
            placed = [NewFile(join(target.path, f.path), f.body, f.mode) for f in found.files.values()]
            directories = [join(target.path, path) for path in sorted(found.directories)]
            if target.path:
                directories.insert(0, target.path)
            put = partial(target.tree.put, creator=USER, on_collision="replace" if overwrite else "refuse")
            if files.home is None:
                await put(placed, directories=directories)
            else:
                await _put_live(put, placed, directories)
        answer = {"destination": absolute(output), "files_extracted": len(placed)}
        return JsonAnswer(answer | {"skipped": len(found.skipped)})

    async def _add(self, files: Filesystem, window: Sequence[Node], start: int, writer: Packer) -> int:
        """Pack some nodes, whose names begin at ``start``; how many there were still."""
        if window[0].size > SMALL_BYTES:
            return await self._add_long(files, window[0], start, writer)
        contents = await read_small(files, window)

        def write() -> int:
            packed = 0
            for node in window:
                name = node.path[start:]
                if node.is_dir:
                    writer.directory(name, node)
                elif node.path in contents:
                    opened, content = contents[node.path]
                    writer.begin(name, opened)
                    writer.write(content)
                    writer.end()
                else:
                    continue
                packed += 1
            return packed

        return await trio.to_thread.run_sync(write, limiter=self._desk.limits.spool)

    async def _add_long(self, files: Filesystem, node: Node, start: int, writer: Packer) -> int:
        place = files.place(node.path)
        opened = await place.tree.open(place.path)
        try:
            await self._in_thread(writer.begin, node.path[start:], opened.node)
            async for piece in opened.stream():
                await self._in_thread(writer.write, piece)
            await self._in_thread(writer.end)
        finally:
            await opened.aclose()
        return 1

    async def _fetched(self, place: Place, spool: Spool) -> Spooled:
        opened = await place.tree.open(place.path)
        try:
            body: Spooled = await self._in_thread(spool.begin)
            async for piece in opened.stream():
                await self._in_thread(body.write, piece)
        finally:
            await opened.aclose()
        return body

    async def _in_thread(self, work: Any, *arguments: Any) -> Any:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._desk.limits.spool)


async def _put_live(
    put: Callable[..., Awaitable[object]], files: Sequence[NewFile], directories: Sequence[bytes]
) -> None:
    """Put files into a live tree, which takes each by itself, so several at a time."""
    await put([], directories=directories)
    parts = [files[number::_PUTS_AT_A_TIME] for number in range(_PUTS_AT_A_TIME)]
    await together([partial(put, part) for part in parts])


def _paths_of(body: dict[str, Any]) -> list[bytes]:
    paths = body.get("paths")
    if not isinstance(paths, list) or not 0 < len(paths) <= _MAX_PATHS:
        raise UsageError(f"paths must be a list of 1 to {_MAX_PATHS} paths")
    return [path_in({"paths": path}, "paths") for path in paths]


def _format_of(body: dict[str, Any], output: bytes) -> Format:
    kind = body.get("format")
    if kind is None:
        return format_of(output)
    if kind not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}")
    return next(each for each in FORMATS if each == kind)


def _start_of_names(paths: Sequence[bytes]) -> int:
    """Where names begin: in the deepest directory that all of the paths are in."""
    parent = posixpath.commonpath([parent_of(path) for path in paths])
    return len(parent) + 1 if parent else 0


async def _nodes_at(files: Filesystem, paths: Sequence[bytes]) -> dict[bytes, Node]:
    """What is at the paths and below, each once, in order."""
    found: dict[bytes, Node] = {}
    for path in paths:
        node = await files.stat(path)
        if path:
            found[path] = node
        if node.is_dir:
            found |= {each.path: each for each in await files.list(path, recursive=True)}
    return dict(sorted(found.items(), key=lambda item: item[0].split(b"/")))


async def _require_free(place: Place, *, overwrite: bool) -> None:
    try:
        there = await place.tree.stat(place.path)
    except NotFoundError:
        return
    shown = printable(place.whole(there).path)
    if there.is_dir:
        raise WrongTypeError(f"{shown!r} is a directory", hint="name a file in it")
    if not overwrite:
        raise ExistsError(f"{shown!r} exists already")


async def _collisions(target: Place, found: Contents, *, overwrite: bool) -> int:
    """How many bytes are replaced. Raises ``ExistsError`` for what must not be."""
    try:
        top = await target.tree.stat(target.path)
    except NotFoundError:
        return 0
    if not top.is_dir:
        raise WrongTypeError(f"{printable(target.whole(top).path)!r} is no directory")
    start = len(target.path) + 1 if target.path else 0
    replaced = 0
    for node in await target.tree.list(target.path, recursive=True):
        name = node.path[start:]
        is_taken = name in found.files and (not overwrite or node.is_dir)
        if is_taken or (name in found.directories and not node.is_dir):
            raise ExistsError(f"{printable(target.whole(node).path)!r} exists already")
        if name in found.files:
            replaced += node.size
    return replaced
