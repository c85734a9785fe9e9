"""The page in a real browser: signing in, an agent's memory, its history, and going back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import chromium
import gateways
import pytest
from chromium import Chromium, Tab
from executing import until
from gateways import ACME, OTHER, SMALL, Gateway
from histories import lived
from memories import Run
from pages import ACTIVE, NASTY, PDF, PNG, SHOWN, is_narrow, sign_in, signed_in, walk

from agentfuse.gateway.agents import Agents
from agentfuse.gateway.ui.sessions import SESSION_S
from agentfuse.objectstore import open_store
from agentfuse.snapshots.history import History

AGENT = "/ui/agents/a"


@pytest.fixture(scope="module")
def remembered(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Agent "a" of the organization that is ACME's, with a memory of four runs."""
    base = tmp_path_factory.mktemp("runs")
    store = open_store(gateway.store)
    lived(base, store)
    run = Run(base, store, "e4")
    run.restore()
    directory = os.fsencode(run.root / "nasty")
    os.mkdir(directory)
    for name in NASTY:
        with open(directory + b"/" + name, "wb") as file:
            file.write(b"<script>alert(2)</script>")
    for path, content in {**ACTIVE, "paper.pdf": PDF, "dot.png": PNG}.items():
        run.write(path, content)
    run.commit("<b>end</b>")
    Agents(store, has_others=False).claim(gateways.ORGANIZATION, "a")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    base = tmp_path_factory.mktemp("browser")
    (base / "downloads").mkdir()
    with chromium.running(base / "profile", base / "downloads", shows_pdf=True) as running:
        yield running


@pytest.fixture
def tab(browser: Chromium, gateway: Gateway, remembered: None) -> Iterator[Tab]:
    """A tab that is signed in, and had nothing to complain about."""
    tab = browser.tab()
    sign_in(tab, gateway)
    yield tab
    assert tab.complaints() == []


# -- who is let in


def test_a_wrong_key_is_told_so_and_the_right_one_leads_where_one_wanted_to_go(
    browser: Chromium, gateway: Gateway, remembered: None
) -> None:
    tab = browser.tab()
    tab.do("Network.clearBrowserCookies")
    tab.open(f"{gateway.url}{AGENT}/history?all=1")
    tab.until("document.activeElement.id === 'key'")
    tab.write("a wrong key")
    tab.press("Enter")
    tab.until("document.querySelector('[role=alert]') !== null")
    assert "This key is not known here" in tab.text()
    assert tab.evaluate("document.activeElement.getAttribute('aria-describedby')") == "about problem"
    tab.until("document.activeElement.id === 'key'")
    tab.write(ACME)
    tab.press("Enter")
    tab.until("location.search === '?all=1' && document.querySelector('h1') !== null")
    assert "Memory of a" in tab.text()
    assert tab.evaluate("document.cookie") == ""
    tab.follow("document.querySelector('.who button').click()")
    assert "API key" in tab.text()
    tab.open(f"{gateway.url}{AGENT}")
    assert "API key" in tab.text()


def test_a_session_is_strict_and_holds_no_key_and_leads_nowhere_else(gateway: Gateway) -> None:
    with gateway.client("", headers={"Origin": gateway.url}) as client:
        for target in (
            "https://elsewhere.example/",
            "//elsewhere.example",
            "/\\elsewhere.example",
            "javascript:alert(1)",
            "/uix",
            "/ui\n/",
            "/ui/\udcff",
            "http://[",
        ):
            answer = client.post("/ui/sign-in", data={"key": ACME, "next": os.fsencode(target)})
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui"), target
        cookie = answer.headers["set-cookie"]
        assert ACME not in cookie
        for part in ("HttpOnly", "Path=/ui", "SameSite=strict", f"Max-Age={SESSION_S}"):
            assert part in cookie
        assert "Secure" not in cookie
        assert client.post("/ui/sign-in", data={"key": SMALL}).status_code == 403
        assert client.post("/ui/sign-in", data={"key": "\x00é" * 5000}).status_code == 401
        assert client.post("/ui/sign-in", json={"key": ACME}).status_code == 400
    elsewhere = {"Origin": "https://files.example", "Sec-Fetch-Site": "same-origin"}
    with gateway.client("", headers=elsewhere) as client:
        assert "Secure" in client.post("/ui/sign-in", data={"key": ACME}).headers["set-cookie"]


def test_forged_sessions_are_none(gateway: Gateway, remembered: None) -> None:
    with signed_in(gateway) as client:
        assert client.get(AGENT).status_code == 200
        key, expires, signature = client.cookies["agentfuse_session"].split(".")
        client.cookies.clear()
        forged = [
            f"{key}.{int(expires) + 1}.{signature}",
            f"{key}.{expires}.{'0' * 64}",
            f"{key}.x.{signature}",
        ]
        for cookie in [*forged, "", "..", "é", "a" * 8000]:
            answer = client.get(AGENT, headers={"Cookie": f"agentfuse_session={quote(cookie)}"})
            assert answer.status_code == 303, cookie
            assert answer.headers["location"] == "/ui/sign-in?next=%2Fui%2Fagents%2Fa"
            answer = client.post(
                f"{AGENT}/restore",
                headers={"Cookie": f"agentfuse_session={quote(cookie)}"},
                data={"number": 1},
            )
            assert answer.status_code == 401
            assert "/ui/sign-in" in answer.text


def test_what_comes_from_another_site_is_refused(gateway: Gateway, remembered: None) -> None:
    with signed_in(gateway) as client:
        del client.headers["Origin"]
        for headers in (
            {},
            {"Origin": "https://elsewhere.example"},
            {"Origin": "null"},
            {"Origin": gateway.url, "Sec-Fetch-Site": "cross-site"},
            {"Origin": gateway.url, "Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "none"},
        ):
            for path in (f"{AGENT}/restore", f"{AGENT}/revert", "/ui/sign-in", "/ui/sign-out"):
                answer = client.post(path, headers=headers, data={"number": "1", "upon": "5"})
                assert answer.status_code == 403, (path, headers)
                assert "did not come from this page" in answer.text
        assert client.get(AGENT).status_code == 200


def test_other_organizations_do_not_know_the_agent(gateway: Gateway, remembered: None) -> None:
    with signed_in(gateway, OTHER) as client:
        for page in (
            "",
            "/history",
            "/snapshots/1",
            "/snapshots/1/content?path=notes.md",
            "/restore?number=1",
        ):
            assert client.get(f"{AGENT}{page}").status_code == 404
        assert f'"{AGENT}"' not in client.get("/ui/agents").text


# -- what it shows


def test_names_are_shown_as_what_they_are_and_nothing_of_them_runs(tab: Tab, gateway: Gateway) -> None:
    tab.open(f"{gateway.url}{AGENT}?path=nasty")
    tab.evaluate("window.alert = () => { window.taken = true }")
    names = tab.texts("tbody .name", "textContent")
    assert sorted(names) == sorted(SHOWN)
    for index in range(len(NASTY)):
        tab.follow(f"document.querySelectorAll('tbody th a')[{index}].click()")
        assert tab.evaluate("document.querySelector('h1').textContent") in SHOWN
        assert tab.texts(".preview pre") == ["<script>alert(2)</script>"]
        tab.open(f"{gateway.url}{AGENT}?path=nasty")
    tab.open(f"{gateway.url}{AGENT}/history")
    assert "<b>end</b>" in tab.text()
    assert tab.evaluate("document.querySelector('td b')") is None
    tab.open(f"{gateway.url}{AGENT}/diff?before=4&after=5")
    names = tab.texts("tbody .name", "textContent")
    assert {f"nasty/{name}" for name in SHOWN} <= set(names)
    assert not tab.evaluate("window.taken")


def test_what_an_agent_made_is_never_active(gateway: Gateway, remembered: None) -> None:
    content = f"{AGENT}/snapshots/5/content"
    with signed_in(gateway) as client:
        for name in ACTIVE:
            answer = client.get(content, params={"path": name})
            assert answer.headers["content-type"] == "text/plain; charset=utf-8", name
            assert "sandbox" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            answer = client.get(content, params={"path": name, "download": 1})
            assert answer.headers["content-type"] == "application/octet-stream"
            assert answer.headers["content-disposition"].startswith("attachment;")
        for name, media_type in {"paper.pdf": "application/pdf", "dot.png": "image/png"}.items():
            answer = client.get(content, params={"path": name})
            assert answer.headers["content-type"] == media_type
            assert answer.headers["content-security-policy"].startswith("default-src 'none'")
            assert answer.headers["content-disposition"].startswith("inline;")
        assert client.get(f"{content}?path=not%20%FF%FE").status_code == 404
        assert (
            client.get(f"{content}?path=nasty/not%20%FF%FE%20utf-8").content == b"<script>alert(2)</script>"
        )
        assert client.get(f"{content}?path=../a").status_code == 400
        assert client.get(f"{content}?path=nasty").status_code == 404


def test_images_and_documents_are_previewed(tab: Tab, gateway: Gateway) -> None:
    tab.open(f"{gateway.url}{AGENT}?path=dot.png")
    tab.until("document.querySelector('.preview img').naturalWidth === 1")
    tab.open(f"{gateway.url}{AGENT}?path=paper.pdf")

    def viewer() -> dict[str, Any] | None:
        """The frame of the document, once the browser's own viewer is in it."""
        (frame,) = tab.do("Page.getFrameTree")["frameTree"].get("childFrames", [{}])
        return dict(frame["frame"]) if "childFrames" in frame else None

    assert until(viewer)["mimeType"] == "application/pdf"
    tab.open(f"{gateway.url}{AGENT}?path=large")
    assert "Only the beginning is shown" in tab.text()


# -- how it came to be so, and going back


def test_the_history_says_who_changed_what_and_a_file_s_versions_differ_by_line(
    tab: Tab, gateway: Gateway
) -> None:
    tab.open(f"{gateway.url}{AGENT}/history")
    rows = tab.texts("tbody tr")
    assert [re.split(r"\s", row)[0] for row in rows] == ["5", "4", "3", "1"]
    assert "e2" in rows[2]
    assert all(part in rows[2] for part in ("+1", "−1", "~2"))
    tab.open(f"{gateway.url}{AGENT}/history?all=1")
    rows = tab.texts("tbody tr")
    assert [re.split(r"\s", row)[0] for row in rows] == ["5", "4", "3", "2", "1"]
    tab.click("What snapshot 4 changed")
    tab.click("notes.md")
    assert tab.texts(".diff tr.added td:last-child") == ["- e3"]
    tab.click("All versions")
    rows = tab.texts("tbody tr")
    assert [re.split(r"\s", row)[0] for row in rows] == ["4", "3", "1"]


def test_the_keyboard_restores_a_file_after_it_was_said_what_will_change(tab: Tab, gateway: Gateway) -> None:
    history = History(open_store(gateway.store), "a", "shared")
    newest = history.newest()
    tab.open(f"{gateway.url}{AGENT}/snapshots/1?path=notes.md")
    assert walk(tab, ".skip") == ["Skip to the content"]
    tab.press("Enter")
    walk(tab, "a[href*='/restore']")
    tab.follow("document.activeElement.click()")
    assert f"This makes snapshot {newest + 1}" in tab.text()
    told = tab.texts("tbody tr")
    assert len(told) == 1
    assert "notes.md" in told[0]
    walk(tab, "main form button")
    tab.press("Enter")
    tab.until("location.pathname.endsWith('/diff') && document.readyState === 'complete'")
    assert "Done. The memory is at snapshot" in tab.text()
    before, after = (history.read(number).entries for number in (newest, newest + 1))
    assert [one.path for one, other in zip(before, after, strict=True) if one.sha256 != other.sha256] == [
        b"notes.md"
    ]


def test_a_run_is_taken_back_and_nothing_is_done_that_was_not_shown(
    gateway: Gateway, remembered: None
) -> None:
    history = History(open_store(gateway.store), "a", "shared")
    with signed_in(gateway) as client:
        shown = client.get(f"{AGENT}/revert", params={"execution": "e2"})
        upon = int(re.search(r'name="upon" value="(\d+)"', shown.text)[1])  # type: ignore[index]
        assert upon == history.newest()
        stale = client.post(f"{AGENT}/revert", data={"execution": "e2", "upon": upon - 1})
        assert stale.status_code == 409
        assert "nothing was done" in stale.text
        assert history.newest() == upon
        done = client.post(f"{AGENT}/revert", data={"execution": "e2", "upon": upon})
        assert done.status_code == 303
        assert history.newest() == upon + 1
        assert b"d/new" not in {entry.path for entry in history.read(upon + 1).entries}
        assert "left to take back" in client.get(f"{AGENT}/revert", params={"execution": "e2"}).text
        for wrong in (
            {"number": "x"},
            {"number": "99"},
            {"number": "-1"},
            {"number": "1", "path": "nothing"},
        ):
            assert client.get(f"{AGENT}/restore", params=wrong).status_code in (400, 404)


def test_a_phone_and_the_dark_are_no_hindrance(tab: Tab, gateway: Gateway) -> None:
    pages = ["", "?path=nasty", "/history", "/diff?before=1&after=5", "/diff?before=1&after=4&path=notes.md"]
    pages += [
        "/versions?path=notes.md",
        "/restore?number=1",
        "/revert?execution=e3",
        f"?path=nasty/{'n' * 255}",
    ]
    for is_dark in (False, True):
        tab.look(360, 640, is_dark=is_dark)
        tab.open(f"{gateway.url}{AGENT}")
        ground, ink = (
            sum(map(int, re.findall(r"\d+", tab.evaluate(f"getComputedStyle(document.body).{what}"))[:3]))
            for what in ("backgroundColor", "color")
        )
        assert (ground < ink) is is_dark
        for page in pages:
            tab.open(f"{gateway.url}{AGENT}{page}")
            assert is_narrow(tab), page
