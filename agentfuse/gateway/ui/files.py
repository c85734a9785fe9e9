"""Files as pages show them: rows of a directory, previews, contents. What an agent made is never active here:
of a few types only, as what its bytes are, in a sandbox; all else is only ever downloaded.
"""

from __future__ import annotations

import codecs
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Generic, Literal, TypeVar
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from agentfuse.gateway.downloads import send_file
from agentfuse.gateway.filetree import Node, OpenedFile
from agentfuse.home.mime import HEAD_BYTES, UNKNOWN, type_of
from agentfuse.regions import Creator
from agentfuse.snapshots.entries import Kind

SHOWN_BYTES = 256 * 1024
"""So much of a text is shown; the rest is for who downloads it."""

_ROWS = 500

_IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "image/bmp")
_PDF = "application/pdf"
_TEXT = "text/plain; charset=utf-8"

Opened = Callable[[], Awaitable[OpenedFile]]
"""Opens a file, as often as it is asked."""

T = TypeVar("T")

Href = Callable[[bytes], str]
"""The address of a path."""


@dataclass(frozen=True, slots=True)
class Step:
    """A crumb of the way to here; the last one is here."""

    text: bytes | str
    href: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A name in a directory. ``at`` is in seconds since the epoch."""

    label: bytes
    href: str
    type: Kind
    size: int
    at: float
    created_by: Creator
    what: str
    target: bytes = b""


@dataclass(frozen=True, slots=True)
class Preview:
    """What of a file is shown; ``media_type``: what it is."""

    kind: Literal["text", "image", "pdf", "none"]
    media_type: str
    text: str = ""
    href: str = ""
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Paged(Generic[T]):
    """One of the pages of a list; ``total``: how many rows there are in all."""

    rows: Sequence[T]
    number: int
    pages: int
    total: int


def paged(found: Sequence[T], number: int, size: int) -> Paged[T]:
    """A page of so many rows; a number that there is none of is the nearest one."""
    pages = max(1, ceil(len(found) / size))
    number = min(pages, max(1, number))
    return Paged(found[(number - 1) * size : number * size], number, pages, len(found))


def listing(
    nodes: Sequence[Node], href: Href, number: int, targets: Mapping[bytes, bytes] | None = None
) -> Paged[Row]:
    """A page of a directory, directories first; ``targets``: where links lead."""
    ordered = sorted(nodes, key=lambda node: (not node.is_dir, node.name.lower(), node.name))
    found = paged(ordered, number, _ROWS)
    rows = [_row(node, href(node.path), (targets or {}).get(node.path, b"")) for node in found.rows]
    return Paged(rows, found.number, found.pages, found.total)


def _row(node: Node, href: str, target: bytes) -> Row:
    at, what = node.mtime_ns / 1e9, _what(node)
    return Row(node.name, href, node.type, node.size, at, node.created_by, what, target)


def steps(first: Sequence[Step], path: bytes, href: Href) -> list[Step]:
    """The crumbs to a path below ``first``, of which the last stands for the root."""
    names = path.split(b"/") if path else []
    found = list(first)
    for index, name in enumerate(names):
        found.append(Step(name, href(b"/".join(names[: index + 1]))))
    return found


async def preview(file: OpenedFile, href: str) -> Preview:
    """What to show of a file, whose content is at ``href``. Lets go of it."""
    node = file.node
    head = await _read(file, SHOWN_BYTES)
    media_type = type_of(node.path, head[:HEAD_BYTES])
    if media_type in _IMAGES:
        return Preview("image", media_type, href=href)
    if _is_pdf(media_type, head):
        return Preview("pdf", media_type, href=href)
    if not node.size:
        return Preview("none", media_type, "The file is empty.")
    text = _text(head)
    if text is None:
        return Preview("none", media_type, "There is no preview of this type of file.")
    return Preview("text", media_type, text, is_cut=node.size > len(head))


async def send_content(request: Request, opened: Opened, *, as_download: bool) -> Response:
    """A file's content for the browser: shown where that is harmless, else to be saved.

    The policy keeps whatever a browser might make of it from scripts, forms and this origin. A PDF alone is
    without the sandbox, in which Chromium does not show any: it is sent as that and nothing else, for a
    viewer that has no access to pages.
    """
    file = await opened()
    node = file.node
    head = await _read(file, HEAD_BYTES)
    media_type = type_of(node.path, head)
    policy = "default-src 'none'; sandbox"
    if media_type in _IMAGES:
        shown = media_type
    elif _is_pdf(media_type, head):
        shown = _PDF
        policy = "default-src 'none'; object-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'self'"
    elif _text(head) is not None and node.size:
        shown = _TEXT
    else:
        shown = ""
    file = await opened()
    response = await send_file(request, file, shown if shown and not as_download else UNKNOWN)
    response.headers["Content-Security-Policy"] = policy
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    if shown and not as_download:
        response.headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(node.name, safe='')}"
    return response


async def _read(file: OpenedFile, size: int) -> bytes:
    """The beginning of a file, of which it lets go."""
    head = bytearray()
    try:
        async for piece in file.stream(0, min(size, file.node.size)):
            head += piece
    finally:
        await file.aclose()
    return bytes(head)


def _is_pdf(media_type: str, head: bytes) -> bool:
    return media_type == _PDF and head.startswith(b"%PDF-")


def _text(head: bytes) -> str | None:
    """The text that a file begins with, if it is one."""
    if b"\0" in head:
        return None
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError:
        return None


_KINDS: dict[Kind, str] = {"dir": "directory", "symlink": "link", "fifo": "pipe"}


def _what(node: Node) -> str:
    """What it is, by its name alone: a listing opens no files."""
    if node.type != "file":
        return _KINDS[node.type]
    named = type_of(node.path, None)
    return "file" if named == UNKNOWN else named
