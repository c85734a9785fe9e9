"""Bodies of requests: bounded in size, and in time by a clock that jumps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from agentfuse.gateway.bodies import IDLE_S, MAX_S, TooLargeError, TooSlowError, pieces


def request(receive: Callable[[], Awaitable[Message]], **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def sending(*parts: bytes, every_s: float = 0.0, ends: bool = True) -> Callable[[], Awaitable[Message]]:
    """What comes: the parts one after the other, then the end, or nothing more."""
    left = list(parts)

    async def receive() -> Message:
        if not left and not ends:
            await trio.sleep_forever()
        await trio.sleep(every_s)
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left) or not ends}

    return receive


async def read(request: Request, max_bytes: int = 10) -> bytes:
    return b"".join([piece async for piece in pieces(request, max_bytes)])


async def test_a_body_may_be_as_long_as_the_limit() -> None:
    assert await read(request(sending(b"12345", b"67890"))) == b"1234567890"
    with pytest.raises(TooLargeError):
        await read(request(sending(b"12345", b"678901")))


async def test_a_length_beyond_the_limit_is_refused_unread() -> None:
    with pytest.raises(TooLargeError):
        await read(request(sending(ends=False), content_length="11"))


@pytest.mark.parametrize("length", ["", "-1", "x", "1" * 100])
async def test_a_length_that_is_none_does_no_harm(length: str) -> None:
    try:
        assert await read(request(sending(b"1"), content_length=length)) == b"1"
    except TooLargeError:
        assert length.startswith("11")


async def test_a_body_that_stops_coming_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    with pytest.raises(TooSlowError):
        await read(request(sending(b"1", b"2", ends=False)))
    assert trio.current_time() - began == pytest.approx(IDLE_S)


async def test_a_body_that_drips_is_given_up_in_the_end(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    with pytest.raises(TooSlowError):
        await read(request(sending(*[b"1"] * 1000, every_s=IDLE_S - 1)), 10**6)
    assert trio.current_time() - began == pytest.approx(MAX_S)


async def test_who_goes_away_is_noticed() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await read(request(receive))
