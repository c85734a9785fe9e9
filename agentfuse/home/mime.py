"""What kind of file it is: by its content, then by its name."""

from __future__ import annotations

import codecs
import mimetypes
import os

import filetype

HEAD_BYTES = 8192
"""As much of a file's beginning as is worth reading."""

UNKNOWN = "application/octet-stream"
_TEXT = "text/plain"

# Without the host's own tables: the same file has the same type everywhere.
_BY_NAME = {**mimetypes.MimeTypes().types_map[True], ".md": "text/markdown", ".yaml": "application/yaml"}
_BY_CONTENT = {kind.mime for kind in filetype.types}


def type_of(path: bytes, head: bytes | None) -> str:
    """The MIME type of a file named so that begins with ``head``; None: it could not be read.

    A name does not make a file what its content shows it is not: text named ``a.pdf`` is text.
    """
    named = _BY_NAME.get(os.path.splitext(os.fsdecode(path))[1].lower())
    if not head:
        return named or UNKNOWN
    found = _guess(head)
    if found is not None:
        return found
    if _is_text(head):
        return _TEXT if named is None or named in _BY_CONTENT else named
    return named or UNKNOWN


def _guess(head: bytes) -> str | None:
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
