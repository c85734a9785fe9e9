"""Who asks: keys, which are known by their hashes, and what they are for."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, Sequence

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from agentfuse.admission import ApiKey, sha256_of
from agentfuse.gateway.edge import DeniedError

Authenticate = Callable[[Request], Awaitable[None]]
"""A dependency that lets a request pass, whose key :func:`key_of` then tells."""

_READS = ("GET", "HEAD")
_MAX_KEY = 1024


class Keyring:
    """The keys there are."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(keys)

    def find(self, presented: str) -> ApiKey | None:
        """The entry of a key. Takes as long for a wrong key as for a right one."""
        if len(presented) > _MAX_KEY:
            return None
        claimed = sha256_of(presented).encode()
        found = None
        for key in self._keys:
            if hmac.compare_digest(claimed, key.sha256.encode()):
                found = key
        return found

    def with_id(self, key_id: str) -> ApiKey | None:
        """The key of an id, which is no secret."""
        return next((key for key in self._keys if key.id == key_id), None)


def key_dependency(keyring: Keyring, family: str, headers: Sequence[str]) -> Authenticate:
    """What all routes of an API family depend on: that the request has a key that is for that family.

    ``headers`` are those that may hold it, in lower case, the first one that is there counting; a leading
    ``Bearer`` is taken off, which ``authorization`` must have. Raises ``DeniedError``.
    """

    async def authenticate(request: Request) -> None:
        presented = next(filter(None, (_presented(request, header) for header in headers)), "")
        key = keyring.find(presented) if presented else None
        if key is None:
            raise DeniedError("Unauthorized", 401)
        may_read = request.method in _READS and f"{family}:read" in key.scopes
        if family not in key.scopes and not may_read:
            raise DeniedError(f"this key is not for {request.method} of {family}", 403)
        request.state.key = key

    return authenticate


def key_of(request: Request) -> ApiKey:
    """The key of a request that was let pass."""
    key = request.state.key
    assert isinstance(key, ApiKey)
    return key


def _presented(request: Request, header: str) -> str:
    value = request.headers.get(header, "").strip()
    scheme, _, rest = value.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    return "" if header == "authorization" else value


ASTEROID_HEADERS = ("x-api-key", "x-asteroid-agents-api-key", "authorization")
TENANT_HEADERS = ("authorization",)
SHINZO_HEADERS = ("authorization", "x-shinzo-api-key")

# For the OpenAPI document only: the dependency above does the work, before any body is read.
DESCRIBED_BEARER = [Depends(HTTPBearer(scheme_name="Bearer", auto_error=False))]
DESCRIBED_ASTEROID = [
    Depends(APIKeyHeader(name="X-Api-Key", scheme_name="ApiKeyAuth", auto_error=False)),
    Depends(APIKeyHeader(name="X-Asteroid-Agents-Api-Key", scheme_name="OldApiKeyAuth", auto_error=False)),
    *DESCRIBED_BEARER,
]
