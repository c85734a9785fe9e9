"""What pages say: names that hide nothing, sizes, times. Whatever came from a client or an agent goes through
here or is escaped by the templates.
"""

from __future__ import annotations

import datetime
import math
from itertools import pairwise
from urllib.parse import quote

from markupsafe import Markup, escape

_ENDS = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def visible(text: bytes | str) -> Markup:
    """A name or line so that one sees what it is: what has no glyph (control characters, marks that turn the
    direction of writing, bytes that are not UTF-8) is shown as an escape, set off from what is written so.
    """
    decoded = text.decode(errors="surrogateescape") if isinstance(text, bytes) else text
    if decoded.isprintable():
        return escape(decoded)
    return Markup("").join(_shown(run, is_plain) for run, is_plain in _runs(decoded))


def name(text: bytes | str) -> Markup:
    """As :func:`visible`, in a direction of writing that ends with it."""
    return Markup('<bdi class="name">{}</bdi>').format(visible(text))


def printable(text: str) -> str:
    """As :func:`visible`, where there can be no marks."""
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def lines(text: str) -> Markup:
    """A text of several lines, as :func:`visible` but for tabs and ends of lines."""
    parts = text.replace("\r\n", "\n").split("\n")
    tabbed = (Markup("\t").join(visible(cell) for cell in part.split("\t")) for part in parts)
    return Markup("\n").join(tabbed)


def _runs(text: str) -> list[tuple[str, bool]]:
    runs: list[tuple[str, bool]] = []
    start = 0
    for index in range(1, len(text) + 1):
        if index == len(text) or text[index].isprintable() != text[start].isprintable():
            runs.append((text[start:index], text[start].isprintable()))
            start = index
    return runs


def _shown(run: str, is_plain: bool) -> Markup:
    if is_plain:
        return escape(run)
    return Markup('<span class="escape">{}</span>').format("".join(map(_escaped, run)))


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return _ENDS.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def path_query(path: bytes) -> str:
    """A path in a query."""
    return quote(path, safe="/")


def time(at: float | datetime.datetime | None) -> Markup:
    """A moment; the script turns it into the reader's own time."""
    if at is None:
        return Markup('<span class="none">–</span>')
    try:
        moment = (
            at if isinstance(at, datetime.datetime) else datetime.datetime.fromtimestamp(at, datetime.UTC)
        )
        moment = moment.astimezone(datetime.UTC)
    except (OverflowError, ValueError, OSError):  # an agent may give a file any time
        return Markup("far away")
    return Markup('<time datetime="{}">{}</time>').format(
        moment.strftime("%Y-%m-%dT%H:%M:%SZ"), moment.strftime("%Y-%m-%d %H:%M UTC")
    )


def duration(seconds: float) -> str:
    """How long something took: ``42 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    whole = max(0, math.floor(seconds))
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (size, unit), (smaller, its_unit) in pairwise(units):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit} {rest} {its_unit}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def share(used: int, quota: int) -> float:
    """Per cent of a quota, from 0 to 100."""
    return 100.0 if used >= quota else round(100 * used / quota, 1)
