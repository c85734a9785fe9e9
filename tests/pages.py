"""The gateway's page as people and as programs of other sites meet it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from chromium import Tab
from gateways import ACME, Gateway

NASTY = [
    b"<img src=x onerror=alert(1)>",
    b'"><script>alert(1)<',
    b"'; alert(1) -- &lt;",
    b"{{ 7 * 7 }}",
    b"line\nbreak",
    "reversed \u202egpj.exe".encode(),
    b"not \xff\xfe utf-8",
    b"\x1b[31mred",
    b" ",
    b"n" * 255,
]
"""Names of files that a page must show as what they are."""

SHOWN = [
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)<',
    "'; alert(1) -- &lt;",
    "{{ 7 * 7 }}",
    "line\\nbreak",
    "reversed \\u202egpj.exe",
    "not \\xff\\xfe utf-8",
    "\\x1b[31mred",
    " ",
    "n" * 255,
]

PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
    b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]>>endobj\ntrailer<</Root 1 0 R>>\n"
)
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360f8cfc0f01f0005"
    "0001ff5ec1a3e30000000049454e44ae426082"
)
ACTIVE = {
    "page.html": b"<!doctype html><script>parent.document.title = 'taken'</script>",
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "fake.png": b"<!doctype html><script>alert(1)</script>",
    "fake.pdf": b"<!doctype html><script>alert(1)</script>",
    "script.js": b"alert(1)",
}
"""Files that a browser would run, were it told that they are what they say."""


def sign_in(tab: Tab, gateway: Gateway, key: str = ACME) -> None:
    """As a person does, with the keyboard."""
    tab.open(f"{gateway.url}/ui/sign-in")
    if tab.evaluate("document.querySelector('#key') !== null"):
        tab.until("document.activeElement.id === 'key'")
        tab.write(key)
        tab.press("Enter")
        tab.until("location.pathname === '/ui/executions' && document.readyState === 'complete'")


@contextmanager
def signed_in(gateway: Gateway, key: str = ACME) -> Iterator[httpx.Client]:
    """A client that a browser's page would be."""
    with gateway.client("", headers={"Origin": gateway.url}) as client:
        assert client.post("/ui/sign-in", data={"key": key}).headers["location"] == "/ui"
        yield client


def is_narrow(tab: Tab) -> bool:
    """Whether nothing is wider than a small phone."""
    return bool(tab.evaluate("document.documentElement.scrollWidth <= 360"))


def walk(tab: Tab, to: str, *, most: int = 60) -> list[str]:
    """Press the tabulator until what has the focus matches a selector; all that had it on the way, each of
    which must show that."""
    seen = []
    for _ in range(most):
        tab.press("Tab")
        seen.append(str(tab.evaluate("document.activeElement.innerText || document.activeElement.id")))
        assert tab.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
            " && document.activeElement.matches(':focus-visible')"
        ), seen
        if tab.evaluate(f"document.activeElement.matches({to!r})"):
            return seen
    raise AssertionError(f"{to} cannot be reached with the keyboard: {seen}")
