"""Who looks at the page: sessions that every host can verify, and that only our own pages make requests.

A session is a cookie that names a key by its id, never the key, with an end, signed with the secret of links.
Nothing is kept: a key that the configuration has no more ends its sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from urllib.parse import quote, urlsplit

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from agentfuse.admission import ApiKey
from agentfuse.gateway.auth import Keyring
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.ui.pages import BASE

SESSION_S = 12 * 3600
SCOPES = ("asteroid", "shinzo")
"""What a key must be for, at least to read."""

_COOKIE = "agentfuse_session"
_SAFE = ("GET", "HEAD")


class Sessions:
    """The sessions of a gateway; ``now``: in seconds since the epoch."""

    def __init__(
        self,
        secret: bytes,
        keyring: Keyring,
        *,
        is_https: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._secret = secret
        self._keyring = keyring
        self._is_https = is_https
        self._now = now

    def begin(self, request: Request, response: Response, presented: str) -> ApiKey:
        """Sign in with a key. Raises ``DeniedError``."""
        key = self._keyring.find(presented.strip())
        if key is None:
            raise DeniedError("This key is not known here. Copy it again, whole.", 401)
        if not may_read(key):
            raise DeniedError(
                "This key is for tenant files only: the page needs one for asteroid or shinzo.", 403
            )
        expires = int(self._now()) + SESSION_S
        self._set(request, response, f"{key.id}.{expires}.{self._sign(key.id, str(expires))}", SESSION_S)
        return key

    def end(self, request: Request, response: Response) -> None:
        """Sign out."""
        self._set(request, response, "", 0)

    def find(self, request: Request) -> ApiKey | None:
        """The key of a request's session, if that is good."""
        key_id, _, rest = request.cookies.get(_COOKIE, "").partition(".")
        expires, _, signature = rest.partition(".")
        expected = self._sign(key_id, expires).encode()
        if not hmac.compare_digest(expected, signature.encode(errors="replace")):
            return None
        key = self._keyring.with_id(key_id) if int(expires) > self._now() else None
        return key if key is not None and may_read(key) else None

    async def require(self, request: Request) -> None:
        """A dependency of routes: the request is from our own pages, and somebody is signed in, whose key
        ``auth.key_of`` tells. Raises what leads to signing in, and ``DeniedError``."""
        own_pages_only(request)
        key = self.find(request)
        if key is None:
            if request.method in _SAFE:
                raise HTTPException(303, headers={"Location": self.sign_in_address(request)})
            raise DeniedError("Your session has ended. Sign in and do it again.", 401)
        if request.method not in _SAFE and not may_change(key):
            raise DeniedError("This key may look at things, not change them.", 403)
        request.state.key = key

    @staticmethod
    def sign_in_address(request: Request) -> str:
        """Where to sign in, and then come back."""
        query = request.scope["query_string"].decode("latin-1")
        here = quote(request.scope["path"]) + (f"?{query}" if query else "")
        return f"{BASE}/sign-in?next={quote(here, safe='')}"

    def _set(self, request: Request, response: Response, value: str, seconds: int) -> None:
        is_https = self._is_https or request.headers.get("origin", "").startswith("https://")
        response.set_cookie(
            _COOKIE, value, max_age=seconds, path=BASE, secure=is_https, httponly=True, samesite="strict"
        )

    def _sign(self, key_id: str, expires: str) -> str:
        message = f"page session\n{key_id}\n{expires}".encode(errors="replace")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


def may_read(key: ApiKey) -> bool:
    """Whether the page is open to a key."""
    return any(scope.partition(":")[0] in SCOPES for scope in key.scopes)


def may_change(key: ApiKey) -> bool:
    """Whether it may change things there."""
    return any(scope in SCOPES for scope in key.scopes)


def may_run(key: ApiKey) -> bool:
    """Whether it may pause, resume and end executions, as by their API."""
    return "asteroid" in key.scopes


def own_pages_only(request: Request) -> None:
    """Raise ``DeniedError`` for what would change something and comes from another site, or does not say.

    ``Sec-Fetch-Site`` is the browser's word, which no proxy rewrites, but only given over https and on this
    host; else the origin must be the host that was asked.
    """
    if request.method in _SAFE:
        return
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        is_own = site == "same-origin"
    else:
        origin = urlsplit(request.headers.get("origin", ""))
        is_own = bool(origin.netloc) and origin.netloc == request.headers.get("host")
    if not is_own:
        raise DeniedError("This request did not come from this page, so it was refused.", 403)
