"""What the page makes of names, times and sessions."""

from __future__ import annotations

import datetime
import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response

from agentfuse.admission import ApiKey, sha256_of
from agentfuse.gateway.auth import Keyring
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.ui import text
from agentfuse.gateway.ui.sessions import SESSION_S, Sessions

ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-000000000001"
KEY = ApiKey(sha256_of("a key of mine"), ORGANIZATION, "acme", ("asteroid",))
READER = ApiKey(sha256_of("a key to read"), ORGANIZATION, "acme", ("shinzo:read",))


@given(st.binary(max_size=40))
def test_a_name_is_markup_without_any_of_its_own(name: bytes) -> None:
    shown = str(text.name(name))
    inner = shown.removeprefix('<bdi class="name">').removesuffix("</bdi>")
    plain = re.sub(r'<span class="escape">[^<>]*</span>', "", inner)
    assert "<" not in plain
    assert ">" not in plain
    assert html.unescape(re.sub(r"</?(span|bdi)[^>]*>", "", shown)).isprintable()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain.txt", "plain.txt"),
        (b"a&b", "a&amp;b"),
        (b"\xff", '<span class="escape">\\xff</span>'),
        ("\u202eevil".encode(), '<span class="escape">\\u202e</span>evil'),
        (b"a\n\tb", 'a<span class="escape">\\n\\t</span>b'),
        ("\ud800", '<span class="escape">\\ud800</span>'),
        ("zero\u200bwidth", 'zero<span class="escape">\\u200b</span>width'),
        (b"", ""),
    ],
)
def test_what_has_no_glyph_is_shown_as_an_escape(name: bytes | str, shown: str) -> None:
    assert text.visible(name) == shown


def test_any_time_and_duration_can_be_said() -> None:
    assert "2026-11-22 13:00 UTC" in text.time(datetime.datetime(2026, 11, 22, 13, tzinfo=datetime.UTC))
    assert text.time(1e30) == text.time(float("inf")) == "far away"
    assert [text.duration(seconds) for seconds in (0.4, 59, 60, 185, 7800, 360_000)] == [
        "0 s", "59 s", "1 min", "3 min 5 s", "2 h 10 min", "4 d 4 h",
    ]  # fmt: skip
    assert [text.share(*each) for each in ((0, 0), (0, 10), (5, 10), (11, 10))] == [100, 0, 50, 100]


def asked(cookie: str = "", method: str = "GET", **headers: str) -> Request:
    given = {"cookie": cookie, **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in given.items() if value]
    return Request(
        {"type": "http", "method": method, "path": "/ui/agents", "query_string": b"", "headers": raw}
    )


def begun(sessions: Sessions, key: str) -> str:
    response = Response()
    sessions.begin(asked(), response, key)
    return response.headers["set-cookie"].partition(";")[0]


async def test_a_session_ends_with_its_time_with_its_key_and_on_hosts_with_another_secret() -> None:
    now = 1_000_000.0
    secret = b"one secret for all hosts, of 32 bytes or more"
    sessions = Sessions(secret, Keyring([KEY, READER]), now=lambda: now)
    cookie = begun(sessions, "a key of mine")
    assert sessions.find(asked(cookie)) == KEY
    assert Sessions(secret, Keyring([KEY]), now=lambda: now).find(asked(cookie)) == KEY
    assert Sessions(b"x" * 32, Keyring([KEY]), now=lambda: now).find(asked(cookie)) is None
    assert Sessions(secret, Keyring([READER]), now=lambda: now).find(asked(cookie)) is None
    now += SESSION_S - 1
    assert sessions.find(asked(cookie)) == KEY
    now += 1
    assert sessions.find(asked(cookie)) is None


async def test_who_may_read_only_changes_nothing() -> None:
    sessions = Sessions(b"s" * 32, Keyring([KEY, READER]))
    own = {"sec_fetch_site": "same-origin"}
    for key, may_change in (("a key of mine", True), ("a key to read", False)):
        cookie = begun(sessions, key)
        await sessions.require(asked(cookie))
        if may_change:
            await sessions.require(asked(cookie, "POST", **own))
        else:
            with pytest.raises(DeniedError, match="not change"):
                await sessions.require(asked(cookie, "POST", **own))
