"""What kind of file it is: by its content, then by its name.

The tables are made when the first file asks: a megabyte and 20 ms that a mount need not have to be ready.
"""

from __future__ import annotations

import codecs
import os
from functools import cache

HEAD_BYTES = 8192
"""As much of a file's beginning as is worth reading."""

UNKNOWN = "application/octet-stream"
_TEXT = "text/plain"


def type_of(path: bytes, head: bytes | None) -> str:
    """The MIME type of a file named so that begins with ``head``; None: it could not be read.

    A name does not make a file what its content shows it is not: text named ``a.pdf`` is text.
    """
    named = _by_name().get(os.path.splitext(os.fsdecode(path))[1].lower())
    if not head:
        return named or UNKNOWN
    found = _guess(head)
    if found is not None:
        return found
    if _is_text(head):
        return _TEXT if named is None or named in _by_content() else named
    return named or UNKNOWN


@cache
def _by_name() -> dict[str, str]:
    import mimetypes  # noqa: PLC0415

    # Without the host's own tables: the same file has the same type everywhere.
    known = mimetypes.MimeTypes().types_map[True]
    return {**known, ".md": "text/markdown", ".yaml": "application/yaml"}


@cache
def _by_content() -> frozenset[str]:
    import filetype  # noqa: PLC0415

    return frozenset(kind.mime for kind in filetype.types)


def _guess(head: bytes) -> str | None:
    import filetype  # noqa: PLC0415

    try:
        kind = filetype.guess(head)
    except Exception:  # noqa: BLE001  # strangers' bytes in somebody else's parser
        return None
    return None if kind is None else str(kind.mime)


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return b"\0" not in head
