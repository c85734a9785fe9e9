"""Forms as browsers send them, without files."""

from __future__ import annotations

from urllib.parse import parse_qs

from starlette.requests import Request

from agentfuse.errors import UsageError
from agentfuse.gateway.bodies import pieces

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
