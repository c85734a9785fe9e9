"""How clients reach the gateway: the beginning of the absolute URLs in answers."""

from __future__ import annotations

import re

from starlette.requests import Request

_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")


def base_url(request: Request, public_url: str) -> str:
    """``http://host:port`` or more, without a slash at the end: what is configured, else what the request
    was sent to by its own account.

    The account is the client's, and so is the answer: it harms nobody else.
    """
    if public_url:
        return public_url
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        name, port = request.scope.get("server") or ("localhost", None)
        name = f"[{name}]" if ":" in name else name
        host = name if port is None else f"{name}:{port}"
    return f"{request.scope['scheme']}://{host}"
