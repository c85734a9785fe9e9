"""One webhook's endpoint: a signed POST, and what its answer means. Knows no events.

Signed as the Standard Webhooks specification has it, so that receivers have libraries. Nothing that is
logged or told of it holds the URL, the secret, or what the other side sent.
"""

from __future__ import annotations

import base64
import binascii
import email.utils
import hashlib
import hmac
import http
import logging
import os
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import trio

from agentfuse import __version__
from agentfuse.bindings import Webhook
from agentfuse.errors import ConfigError
from agentfuse.home.tree import now

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

CONNECT_S = 10.0
ANSWER_S = 10.0
MOST_RETRY_AFTER_S = 3600.0
_ANSWER_BYTES = 64 * 1024
_SECRET_BYTES = 4096
_PREFIX = "whsec_"
_HOW = 'make one with: echo "whsec_$(openssl rand -base64 32)"'


class Answer(NamedTuple):
    """What became of a POST. ``error`` is empty when it was taken, ``retry_after_s`` what was asked for."""

    error: str = ""
    is_gone: bool = False
    retry_after_s: float = 0.0


def read_key(hook: Webhook, environ: Mapping[str, str]) -> bytes:
    """The key that a webhook's messages are signed with. Raises ``ValueError`` that does not show it."""
    if hook.secret_env is not None:
        text = environ.get(hook.secret_env)
        if text is None:
            raise ValueError(f"secret_env: {hook.secret_env} is not set; set it where agentfuse mount is run")
    else:
        assert hook.secret_file is not None
        try:
            with open(hook.secret_file, "rb") as file:
                text = file.read(_SECRET_BYTES).decode("ascii", "replace")
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise ValueError(
                f"secret_file: {hook.secret_file}: {why}; correct the path or its permissions"
            ) from None
    try:
        key = base64.b64decode(text.strip().removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < 24:
        raise ValueError(f"the secret is not the base64 of 24 bytes or more; {_HOW}")
    return key


def open_endpoints(hooks: tuple[Webhook, ...], environ: Mapping[str, str]) -> list[Endpoint]:
    """What all webhooks need of this host: secrets, authorities. Raises ConfigError with all mistakes."""
    endpoints: list[Endpoint] = []
    problems: list[str] = []
    for hook in hooks:
        try:
            endpoints.append(Endpoint(hook, read_key(hook, environ), _authorities(hook)))
        except ValueError as error:
            problems.append(f"webhooks {hook.name}: {error}")
    if problems:
        raise ConfigError(problems)
    return endpoints


def _authorities(hook: Webhook) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=hook.ca_file)
    except (OSError, ssl.SSLError) as error:
        why = error.strerror or "there are no certificates in it"
        raise ValueError(f"ca_file: {hook.ca_file}: {why}; give a file of PEM certificates") from None


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``."""
    mac = hmac.new(key, b"%s.%d.%s" % (message_id.encode(), timestamp, body), hashlib.sha256)
    return "v1," + base64.b64encode(mac.digest()).decode()


class Endpoint:
    """Where one webhook's messages go. Use it as an async context manager; it keeps a connection."""

    def __init__(self, hook: Webhook, key: bytes, authorities: ssl.SSLContext) -> None:
        self.hook = hook
        self._key = key
        self._authorities = authorities
        self._client: httpx.AsyncClient

    async def __aenter__(self) -> Endpoint:
        self._client = await trio.to_thread.run_sync(self._make_client)
        return self

    def _make_client(self) -> httpx.AsyncClient:
        import httpx  # noqa: PLC0415  # a tenth of a second, for those who have webhooks

        for name in ("httpx", "httpcore"):  # they log URLs and headers
            logging.getLogger(name).setLevel(logging.WARNING)
        return httpx.AsyncClient(
            verify=self._authorities,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            follow_redirects=False,
            trust_env=not self.hook.is_local,  # the host's proxies
            headers={"user-agent": f"agentfuse/{__version__}", "content-type": "application/json"},
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.move_on_after(1.0, shield=True):
            await self._client.aclose()

    async def post(self, message_id: str, body: bytes) -> Answer:
        """Send a message once. Never raises but for cancellation."""
        try:
            with trio.fail_after(CONNECT_S + ANSWER_S):
                return await self._post(message_id, body)
        except Exception as error:  # whatever it is, the mount lives on
            told = _told(error)
            if not told:
                log.exception("webhook %s: unexpected error", self.hook.name)
            return Answer(told or f"unexpected {type(error).__name__}")

    async def _post(self, message_id: str, body: bytes) -> Answer:
        timestamp = int(now())
        headers = {
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._key, message_id, timestamp, body),
        }
        async with self._client.stream("POST", self.hook.url, content=body, headers=headers) as response:
            answer = _judge(response)
            await _drain(response)
        self._client.cookies.clear()
        return answer


def _told(error: Exception) -> str:
    """Why a POST failed; empty for what nobody expected."""
    import httpx  # noqa: PLC0415

    match error:
        case httpx.ConnectTimeout() | httpx.PoolTimeout():
            return f"no connection within {CONNECT_S:g} s"
        case httpx.TimeoutException() | trio.TooSlowError():
            return f"no answer within {ANSWER_S:g} s"
        case httpx.ConnectError():
            return f"cannot connect: {_reason(error)}"
        case httpx.ProtocolError():
            return "the answer is not HTTP, or broke off"
        case httpx.TransportError():
            return f"the connection failed: {type(error).__name__}"
    return ""


def _reason(error: BaseException | None) -> str:
    """What the first that says anything, of an error and its causes, says."""
    while error is not None and not str(error):
        error = error.__cause__ or error.__context__
    return "".join(c if c.isprintable() else "?" for c in str(error)[:200])


async def _drain(response: httpx.Response) -> None:
    """Read a short answer to its end, so that the connection can be used again; nobody looks at it."""
    import httpx  # noqa: PLC0415

    received = 0
    try:
        with trio.move_on_after(1.0):
            async for piece in response.aiter_raw():
                received += len(piece)
                if received > _ANSWER_BYTES:
                    return
    except httpx.TransportError:
        return  # the status has said what there was to say


def _judge(response: httpx.Response) -> Answer:
    status = response.status_code
    if 200 <= status < 300:
        return Answer()
    try:
        told = f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        told = str(status)
    if 300 <= status < 400:
        return Answer(f"{told}: redirects are not followed; set url to where the endpoint is now")
    if status == http.HTTPStatus.GONE:
        return Answer(
            f"{told}: the endpoint wants no more; it is asked again at the next mount", is_gone=True
        )
    return Answer(told, retry_after_s=_retry_after_s(response.headers.get("retry-after", "")))


def _retry_after_s(value: str) -> float:
    """Seconds, of a number of them or a date; 0 when it is neither."""
    if value.isascii() and value.isdecimal() and len(value) < 10:
        seconds = float(value)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), MOST_RETRY_AFTER_S)
