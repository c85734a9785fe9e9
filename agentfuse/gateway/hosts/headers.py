"""Which headers go from host to host, and which ones a client may not send."""

from __future__ import annotations

from collections.abc import Iterable

from agentfuse.errors import UsageError

Header = tuple[bytes, bytes]
"""Name, in lower case, and value."""

OURS = b"x-agentfuse-"
"""Headers between hosts begin so; a client's are dropped."""

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",  # was answered where it came
        b"date",  # each server writes its own
    )
)


def end_to_end(headers: Iterable[Header]) -> list[Header]:
    """What is for the far end: without what is for the next hop, what ``Connection`` names, and ours."""
    headers = [(name.lower(), value) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }
    return [
        (name, value)
        for name, value in headers
        if name not in _HOP_BY_HOP and name not in named and not name.startswith(OURS)
    ]


def without_ours(headers: Iterable[Header]) -> list[Header]:
    """What a client may have sent."""
    return [(name, value) for name, value in headers if not name.lower().startswith(OURS)]


def values(headers: Iterable[Header], wanted: bytes) -> list[bytes]:
    """All values of a header."""
    return [value for name, value in headers if name.lower() == wanted]


def check_framing(headers: Iterable[Header]) -> None:
    """Refuse what two servers might cut into different requests. Raises ``UsageError``."""
    headers = list(headers)
    lengths = values(headers, b"content-length")
    if len(lengths) > 1 or not all(length.isdigit() for length in lengths):
        raise UsageError("Content-Length must be there once at most, and a number")
    if lengths and values(headers, b"transfer-encoding"):
        raise UsageError("Content-Length and Transfer-Encoding must not be there both")
