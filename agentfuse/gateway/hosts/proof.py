"""What hosts of a cluster show each other: that they know the secret, of each request and of each answer.

A request is signed over its method, target and headers, who sends it to whom, in which epoch of the
receiver, when, and a nonce; an answer over the nonce, its status and its headers. Bodies are not: the
network between the hosts must be one that nobody else writes to. A request counts once, within a window of
time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

import msgspec

from agentfuse.gateway.edge import DeniedError, StatedError
from agentfuse.gateway.hosts.headers import Header

REQUEST_HEADER = b"x-agentfuse-forward"
ANSWER_HEADER = b"x-agentfuse-proof"
WINDOW_S = 60
"""How far the clocks of two hosts may be apart, with the time on the way."""

_MAX_NONCES = 200_000
_FORM = re.compile(rb"([0-9a-f-]{36}) ([0-9a-f-]{36}) (\d{1,15}) (\d{1,12}) ([0-9a-f]{32}) ([0-9a-f]{64})")


class Proofs:
    """Signs and checks. ``here`` is this host's id, ``epoch`` tells its epoch, ``now`` the time since the
    epoch."""

    def __init__(
        self, secret: bytes, here: str, epoch: Callable[[], int], now: Callable[[], float] = time.time
    ) -> None:
        self._secret = secret
        self._here = here
        self._epoch = epoch
        self._now = now
        self._nonces: OrderedDict[str, float] = OrderedDict()

    def sign_request(
        self, method: str, target: bytes, headers: Iterable[Header], *, to: str, epoch: int
    ) -> tuple[str, Header]:
        """The nonce and the header that proves a request of ours to another host."""
        nonce = secrets.token_hex(16)
        said = f"{self._here} {to} {epoch} {int(self._now())} {nonce}".encode()
        return nonce, (REQUEST_HEADER, b"%s %s" % (said, self._of_request(said, method, target, headers)))

    def check_request(self, value: bytes, method: str, target: bytes, headers: Iterable[Header]) -> str:
        """The nonce of a request that another host forwards to us. Raises ``DeniedError``,
        ``StatedError``."""
        said, _, signature = value.rpartition(b" ")
        form = _FORM.fullmatch(value)
        if form is None or not hmac.compare_digest(
            self._of_request(said, method, target, headers), signature
        ):
            raise DeniedError("this is not forwarded by a host of the cluster", 403)
        sender, to, epoch, at, nonce = (part.decode() for part in form.groups()[:5])
        if to != self._here:
            raise DeniedError(f"this is forwarded to host {to}, which is not here", 403)
        if abs(self._now() - int(at)) > WINDOW_S:
            raise StatedError(f"the clocks of hosts {sender} and {to} are more than {WINDOW_S} s apart", 503)
        if int(epoch) != self._epoch():
            raise StatedError("this host has begun anew meanwhile; ask again", 503)
        self._use(nonce)
        return nonce

    def sign_answer(self, nonce: str, status: int, headers: Iterable[Header]) -> Header:
        """The header that proves an answer of ours."""
        return ANSWER_HEADER, self._of_answer(nonce, status, headers)

    def is_answer(self, value: bytes, nonce: str, status: int, headers: Iterable[Header]) -> bool:
        """Whether an answer comes from who knows the secret and was asked."""
        return hmac.compare_digest(self._of_answer(nonce, status, headers), value)

    def _use(self, nonce: str) -> None:
        oldest = self._now() - 2 * WINDOW_S
        while self._nonces and next(iter(self._nonces.values())) < oldest:
            self._nonces.popitem(last=False)
        if nonce in self._nonces:
            raise DeniedError("this was forwarded before", 403)
        if len(self._nonces) >= _MAX_NONCES:
            raise StatedError("too many requests are forwarded to this host", 503)
        self._nonces[nonce] = self._now()

    def _of_request(self, said: bytes, method: str, target: bytes, headers: Iterable[Header]) -> bytes:
        return self._digest([b"request", said, method.encode(), target, *_flat(headers)])

    def _of_answer(self, nonce: str, status: int, headers: Iterable[Header]) -> bytes:
        return self._digest([b"answer", nonce.encode(), b"%d" % status, *_flat(headers)])

    def _digest(self, parts: list[bytes]) -> bytes:
        return hmac.new(self._secret, msgspec.msgpack.encode(parts), hashlib.sha256).hexdigest().encode()


def _flat(headers: Iterable[Header]) -> list[bytes]:
    return [part for header in sorted(headers) for part in header]
