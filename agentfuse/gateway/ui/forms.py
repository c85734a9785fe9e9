"""What forms and links say: fields, and numbers of pages."""

from __future__ import annotations

from urllib.parse import parse_qs

from starlette.requests import Request

from agentfuse.errors import UsageError
from agentfuse.gateway.bodies import pieces, query_of

_MAX_BYTES = 64 * 1024


async def read_fields(request: Request) -> dict[str, str]:
    """The fields of a form; bytes that are not UTF-8 are lone surrogates. Raises ``UsageError``."""
    body = b"".join([piece async for piece in pieces(request, _MAX_BYTES)])
    if (
        request.headers.get("content-type", "").partition(";")[0].strip()
        != "application/x-www-form-urlencoded"
    ):
        raise UsageError("this is not what a form sends")
    try:
        found = parse_qs(
            body.decode("latin-1"), keep_blank_values=True, errors="surrogateescape", max_num_fields=50
        )
    except ValueError:
        raise UsageError("the form has too many fields") from None
    return {name: values[-1] for name, values in found.items()}


def number_of(request: Request, name: str) -> int:
    """A number that the query says, 0 for anything else."""
    return whole(query_of(request, name))


def whole(text: str) -> int:
    """A number, 0 for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0
