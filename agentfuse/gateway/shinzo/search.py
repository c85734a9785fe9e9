"""Search by name and by content, within bounds of time, memory and disk."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import trio
from starlette.requests import Request
from starlette.responses import Response

from agentfuse.errors import UsageError
from agentfuse.gateway.bodies import JsonAnswer, read_json
from agentfuse.gateway.filetree import Node
from agentfuse.gateway.shinzo.desk import Desk, flag, kind_of, number
from agentfuse.gateway.shinzo.filesystem import Filesystem
from agentfuse.gateway.shinzo.gathering import MAX_FILE_BYTES, Heap
from agentfuse.gateway.shinzo.matching import Matcher, find_ripgrep
from agentfuse.gateway.shinzo.paths import absolute, path_in
from agentfuse.regions import MiB

_MAX_QUERY = 1000
_RESULTS, _MAX_RESULTS = 100, 1000
_MAX_LINES = 50  # of one file
_BATCH_FILES, _BATCH_BYTES = 1000, 32 * MiB
_GLOB = re.compile(r"[*?\[]")

Where = Literal["filename", "content", "both"]
_WHERES: tuple[Where, ...] = ("filename", "content", "both")
_Test = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for. ``path``: where; ``file_pattern``: only in files of such names, empty: in all."""

    text: str
    where: Where
    path: bytes
    file_pattern: str
    case_sensitive: bool
    max_results: int

    @classmethod
    def of(cls, body: dict[str, Any]) -> Query:
        """What a request says. Raises ``UsageError``."""
        text, file_pattern = _text_in(body, "query", "pattern"), _text_in(body, "filePattern", "file_pattern")
        if not text:
            raise UsageError("query is missing")
        limit = number(body, "maxResults", "max_results")
        if limit == 0:
            raise UsageError("maxResults must be 1 or more")
        return cls(
            text,
            _where_of(body),
            path_in(body, "path", default=""),
            file_pattern,
            flag(body, "caseSensitive", "case_sensitive"),
            _RESULTS if limit is None else min(limit, _MAX_RESULTS),
        )


class Search:
    """What the routes do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._ripgrep = find_ripgrep()

    async def search(self, request: Request) -> Response:
        """Search for files by name, content or both. A name is looked for as a glob if it has `*`, `?` or
        `[`, else as a part of it; in contents a regular expression, or text if it is none. Binary files and
        those over 10 MiB are skipped. `truncated`: it took too long, or there are more than `maxResults`."""
        query = Query.of(await read_json(request))
        files = await self._desk.open(request)
        async with self._desk.limits.searches:
            nodes = await _nodes_at(files, query.path)
            selected = await trio.to_thread.run_sync(_selected, query, nodes, limiter=self._desk.limits.reads)
            found = _Found(query.max_results)
            if query.where == "filename":
                found.add_all(selected)
            else:
                with trio.move_on_after(self._desk.search_s) as deadline:
                    await self._search_contents(files, query, selected, found)
                found.is_cut_off = found.is_cut_off or deadline.cancelled_caught
        return JsonAnswer(found.answer())

    async def _search_contents(
        self, files: Filesystem, query: Query, selected: Sequence[_Selected], found: _Found
    ) -> None:
        matcher = Matcher(query.text, case_sensitive=query.case_sensitive, ripgrep=self._ripgrep)
        limits = self._desk.limits
        with Heap(self._desk.spool, limits.spool) as heap:
            for batch in _batches(selected):
                lines: dict[bytes, list[str]] = {}
                try:
                    if "\n" not in query.text:  # else no line has it
                        await _match(files, batch, heap, matcher, lines)
                finally:
                    found.add_all(batch, lines)  # also what was found when the time was over
                if found.is_full:
                    found.is_cut_off = found.is_cut_off or batch[-1] is not selected[-1]
                    return


@dataclass(frozen=True, slots=True)
class _Selected:
    """A node, whether its name is one that is looked for, and whether its content is looked at."""

    node: Node
    is_named: bool
    is_read: bool


class _Found:
    def __init__(self, max_results: int) -> None:
        self.is_cut_off = False
        self._max_results = max_results
        self._results: list[dict[str, Any]] = []
        self._total = 0

    @property
    def is_full(self) -> bool:
        return self._total >= self._max_results

    def add_all(self, batch: Sequence[_Selected], lines: dict[bytes, list[str]] | None = None) -> None:
        """Those of a batch that were found, by name, or by the lines of their content."""
        for each in batch:
            matches = (lines or {}).get(each.node.path)
            if not each.is_named and matches is None:
                continue
            self._total += 1
            if len(self._results) < self._max_results:
                node = each.node
                result = {"path": absolute(node.path), "type": kind_of(node), "size": node.size}
                self._results.append(result if matches is None else result | {"matches": matches})

    def answer(self) -> dict[str, Any]:
        is_cut_off = self.is_cut_off or self._total > len(self._results)
        return {"results": self._results, "total": self._total, "truncated": is_cut_off}


async def _match(
    files: Filesystem,
    batch: Sequence[_Selected],
    heap: Heap,
    matcher: Matcher,
    lines: dict[bytes, list[str]],
) -> None:
    """Note the lines of a batch's files that match."""
    await heap.fill(files, [each.node for each in batch if each.is_read])
    if not heap.nodes:
        return
    async with aclosing(matcher.lines(heap.fd)) as found:
        async for line in found:
            of_file = lines.setdefault(heap.node_at(line.at).path, [])
            if len(of_file) < _MAX_LINES:
                of_file.append(line.text)


def _batches(selected: Sequence[_Selected]) -> list[Sequence[_Selected]]:
    """Some nodes at a time, in order."""
    batches: list[list[_Selected]] = [[]]
    files = size = 0
    for each in selected:
        if each.is_read:
            files += 1
            size += each.node.size
            if files > _BATCH_FILES or size > _BATCH_BYTES:
                batches.append([])
                files, size = 1, each.node.size
        batches[-1].append(each)
    return [batch for batch in batches if batch]


def _selected(query: Query, nodes: Sequence[Node]) -> list[_Selected]:
    """Which nodes are looked at, and how."""
    is_named = _name_test(query.text, query) if query.where != "content" else None
    is_of_kind = _name_test(query.file_pattern, query, glob=True) if query.file_pattern else None
    start = len(query.path) + 1 if query.path else 0
    found = []
    for node in nodes:
        name, relative = os.fsdecode(node.name), os.fsdecode(node.path[start:] or node.name)
        if is_of_kind is not None and (node.is_dir or not is_of_kind(name, relative)):
            continue
        named = is_named is not None and is_named(name, relative)
        read = query.where != "filename" and node.type == "file" and 0 < node.size <= MAX_FILE_BYTES
        if named or read:
            found.append(_Selected(node, named, read))
    return found


def _name_test(text: str, query: Query, *, glob: bool = False) -> Callable[[str, str], bool]:
    """Whether a name, or with a slash in the text a relative path, is one that is looked for."""
    test: _Test
    if glob or _GLOB.search(text):
        flags = 0 if query.case_sensitive else re.IGNORECASE
        match = re.compile(fnmatch.translate(text), flags).match

        def test(name: str) -> bool:
            return match(name) is not None
    elif query.case_sensitive:

        def test(name: str) -> bool:
            return text in name
    else:
        lower = text.lower()

        def test(name: str) -> bool:
            return lower in name.lower()

    by_path = "/" in text
    return lambda name, relative: test(relative if by_path else name)


async def _nodes_at(files: Filesystem, path: bytes) -> list[Node]:
    node = await files.stat(path)
    return await files.list(path, recursive=True) if node.is_dir else [node]


def _where_of(body: dict[str, Any]) -> Where:
    """Where to look; a request in the reference's words says it by ``content_search``."""
    where = body.get("type")
    if where is not None:
        if where not in _WHERES:
            raise UsageError("type must be filename, content or both")
        return next(each for each in _WHERES if each == where)
    if body.get("query") is None or body.get("content_search") is not None:
        return "content" if flag(body, "content_search") else "filename"
    return "both"


def _text_in(body: dict[str, Any], *names: str) -> str:
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, str) or len(value) > _MAX_QUERY or "\0" in value:
            raise UsageError(f"{name} must be a string of up to {_MAX_QUERY} characters, without NUL")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise UsageError(f"{name} is not valid Unicode")
        return value
    return ""
