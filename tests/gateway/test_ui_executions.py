"""The page in a real browser: executions, their files, giving them files, and what arrives, live."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import chromium
import gateways
import pytest
from chromium import Chromium, Tab
from executing import Host
from executing import host as running_host
from gateways import OTHER, SHINZO_OTHER, Gateway
from pages import ACTIVE, NASTY, SHOWN, is_narrow, sign_in, signed_in, walk

from agentfuse.gateway.executions.record import Execution, Message, Status
from agentfuse.gateway.executions.records import Records
from agentfuse.objectstore import open_store
from agentfuse.regions import MiB

pytestmark = pytest.mark.mount

NASTY_TEXT = "<script>alert(1)</script> \u202e \x00 {{ 7 * 7 }}"
UPLOADS_BYTES = 8 * MiB


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    settings = f"[regions.uploads]\nbytes = {UPLOADS_BYTES}\n\n"
    with running_host(tmp_path_factory.mktemp("host"), settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def execution(host: Host) -> str:
    """An execution that runs."""
    return host.run("ada", inputs={"task": NASTY_TEXT}, metadata={NASTY_TEXT: [NASTY_TEXT]})


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    base = tmp_path_factory.mktemp("browser")
    (base / "downloads").mkdir()
    with chromium.running(base / "profile", base / "downloads") as running:
        yield running


@pytest.fixture
def tab(browser: Chromium, host: Host) -> Iterator[Tab]:
    """A tab that is signed in, and had nothing to complain about."""
    tab = browser.tab()
    sign_in(tab, host.gateway)
    yield tab
    refused = "status of 507"  # which a test asks for
    assert [each for each in tab.complaints() if refused not in each] == []
    tab.close()  # a page that listens holds one of the browser's six connections


def page_of(host: Host, execution: str, what: str = "") -> str:
    return f"{host.gateway.url}/ui/executions/{execution}{what}"


def old_executions(host: Host, number: int, organization: str = gateways.ORGANIZATION) -> list[str]:
    """The ids of executions that have ended, by their records."""
    records = Records(open_store(host.gateway.store))
    ids = [str(uuid.uuid4()) for _ in range(number)]
    for index, execution in enumerate(ids):
        records.create(
            Execution(
                id=execution,
                organization=organization,
                agent="old",
                tenant="acme",
                user="somebody",
                host=str(uuid.uuid4()),
                created_at=1_000_000 + index,
                started_at=1_000_001 + index,
                terminal_at=1_000_600 + index,
                status=Status.FAILED if index == 0 else Status.COMPLETED,
                ends_as=Status.COMPLETED,
                reason=NASTY_TEXT if index == 0 else "",
                messages=[Message(id=str(uuid.uuid4()), at=1_000_002, text=NASTY_TEXT, user="somebody")],
            )
        )
    return ids


def test_executions_are_listed_filtered_and_paged(tab: Tab, host: Host, execution: str) -> None:
    old_executions(host, 30)
    tab.open(f"{host.gateway.url}/ui")
    assert tab.texts("tbody th a", "textContent")[0] == execution
    assert len(tab.texts("tbody th a")) == 25
    assert tab.texts(".minis li")[:2] == ["shared", "workspace"]
    tab.click("Next")
    assert len(tab.texts("tbody th a")) == 6
    assert "<script>alert(1)</script> \\u202e \\x00 {{ 7 * 7 }}" in tab.texts("tbody tr")[-1]
    tab.evaluate("document.querySelector('#status').value = 'running'")
    tab.click("Show")
    assert tab.texts("tbody th a", "textContent") == [execution]
    tab.evaluate("document.querySelector('#agent').value = 'old'")
    tab.click("Show")
    assert "No execution is like that" in tab.text()
    tab.evaluate("document.querySelector('#status').value = 'failed'")
    tab.click("Show")
    tab.follow("document.querySelector('tbody th a').click()")
    assert "Messages" in tab.text()
    assert tab.evaluate("document.querySelector('main script')") is None


def test_what_an_agent_and_the_browser_make_arrives_at_once_and_bars_grow(
    tab: Tab, host: Host, execution: str
) -> None:
    tab.open(page_of(host, execution))
    assert "Nothing yet" in tab.text()
    assert "\\u202e" in tab.evaluate("document.querySelector('details pre').textContent")
    nasty = host.home(execution) / "downloads"
    for name in NASTY:
        with open(bytes(nasty) + b"/" + name, "wb") as file:
            file.write(b"arrived")
    tab.until(f"document.querySelectorAll('[data-arrivals] tbody tr').length === {len(NASTY)}")
    names = tab.texts("[data-arrivals] tbody .name", "textContent")
    assert sorted(names) == sorted(SHOWN)
    assert tab.evaluate("document.querySelector('#spoken').ariaLive") == "polite"
    assert tab.evaluate("document.querySelector('#spoken').textContent").startswith("New: downloads/")
    (host.home(execution) / "workspace/large").write_bytes(bytes(3 * MiB))
    tab.until("document.querySelector('#space').innerText.includes('3 MiB')")
    assert tab.evaluate("document.querySelector('[data-arrivals] tbody script, [data-arrivals] img')") is None


def test_a_stream_goes_on_where_it_was(host: Host, execution: str) -> None:
    def read(**headers: str) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        with client.stream("GET", f"/ui/executions/{execution}/arrivals", headers=headers) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            number = 0
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    number = int(line[4:])
                elif line.startswith("event: ") and not line.endswith("arrival"):
                    number = 0
                elif line.startswith("data: ") and number:
                    found.append((number, json.loads(line[6:])["text"]))
                    if found[-1][1].endswith("last"):
                        return found
        raise AssertionError("it ended")

    with signed_in(host.gateway) as client:
        downloads = host.home(execution) / "downloads"
        for name in ("first", "second", "last"):
            (downloads / name).write_text(name)
        everything = read()
        assert [text for _, text in everything[-3:]] == [
            f"New: downloads/{n}" for n in ("first", "second", "last")
        ]
        assert read(**{"Last-Event-ID": str(everything[-3][0])}) == everything[-2:]


def test_files_are_browsed_previewed_and_downloaded(
    tab: Tab, host: Host, execution: str, browser: Chromium
) -> None:
    directory = host.home(execution) / "workspace/a/b"
    directory.mkdir(parents=True)
    (directory / "notes.txt").write_text("what it says")
    (directory / "link").symlink_to("/etc/passwd")
    for name, content in ACTIVE.items():
        (directory / name).write_bytes(content)
    tab.open(page_of(host, execution))
    tab.click("workspace")
    tab.click("a")
    tab.click("b")
    assert tab.texts("nav.crumbs li")[2:] == ["workspace", "a", "b"]
    rows = {row.split("\n")[0]: row for row in tab.texts("tbody tr")}
    assert "the agent" in rows["notes.txt"]
    assert "text/plain" in rows["notes.txt"]
    assert "12 B" in rows["notes.txt"]
    tab.click("notes.txt")
    assert tab.texts(".preview pre") == ["what it says"]
    address = tab.evaluate("[...document.querySelectorAll('a')].find((a) => a.innerText === 'Download').href")
    browser.download(address)
    saved = Path(browser.downloads) / "notes.txt"
    assert saved.read_text() == "what it says"
    tab.open(page_of(host, execution, "/files?path=workspace/a/b/link"))
    assert "links are not followed" in tab.text()
    with signed_in(host.gateway) as client:
        content = f"/ui/executions/{execution}/content"
        for name in ACTIVE:
            answer = client.get(content, params={"path": f"workspace/a/b/{name}"})
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            assert "sandbox" in answer.headers["content-security-policy"]
        for wrong in (
            "workspace/a/b/link",
            "workspace/../../etc/passwd",
            "nowhere/x",
            "workspace/nothing",
            "",
        ):
            assert client.get(content, params={"path": wrong}).status_code in (400, 404)


def test_files_are_given_with_progress_and_what_does_not_fit_is_said(
    tab: Tab, host: Host, execution: str, tmp_path: Path
) -> None:
    sent, large = tmp_path / "some <b>file.bin", tmp_path / "too large.bin"
    sent.write_bytes(bytes(range(256)) * 8 * 1024)
    large.write_bytes(bytes(UPLOADS_BYTES))
    tab.open(page_of(host, execution))
    tab.evaluate(
        "window.told = []; new MutationObserver(() => told.push(document.querySelector('#sent').textContent))"
        ".observe(document.querySelector('#sent'), {childList: true, characterData: true, subtree: true})"
    )
    tab.choose("#files", sent)
    slow = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": 1 * MiB}
    tab.do("Network.emulateNetworkConditions", offline=False, **slow)
    tab.evaluate("document.querySelector('form.upload button').click()")
    tab.until("told.some((each) => / % sent$/.test(each)) && !document.querySelector('progress').hidden")
    tab.until("location.pathname.endsWith('/files') && document.readyState === 'complete'")
    tab.do("Network.emulateNetworkConditions", offline=False, **{**slow, "uploadThroughput": -1})
    home = host.home(execution) / "uploads"
    assert (home / sent.name).read_bytes() == sent.read_bytes()
    assert any("some <b>file.bin" in row and "a person" in row for row in tab.texts("tbody tr"))
    tab.choose("#files", sent)
    tab.click("Send")
    assert sorted(path.name for path in home.iterdir()) == ["some <b>file (1).bin", "some <b>file.bin"]
    tab.choose("#files", large)
    tab.evaluate("document.querySelector('form.upload button').click()")
    tab.until("document.querySelector('#sent.bad') !== null")
    assert "quota" in tab.evaluate("document.querySelector('#sent').textContent")
    assert len(list(home.iterdir())) == 2
    with signed_in(host.gateway) as client:  # as the form does without script
        where = f"/ui/executions/{execution}/files"
        parts = [("files", ("plain.txt", b"plain"))]
        answer = client.post(where, params={"path": "uploads/deep/er"}, files=parts)
        assert answer.headers["location"].endswith("/files?path=uploads/deep/er")
        assert (home / "deep/er/plain.txt").read_bytes() == b"plain"
        assert client.post(where, params={"path": "uploads"}, files=[("files", ("", b""))]).status_code == 400
        assert client.post(where, params={"path": "debug"}, files=parts).status_code == 400
        assert (
            client.post(where, params={"path": "uploads"}, files=[("files", ("..", b"x"))]).status_code == 400
        )
        del client.headers["Origin"]
        assert client.post(where, params={"path": "uploads"}, files=parts).status_code == 403


def test_others_see_nothing_of_it(host: Host, execution: str) -> None:
    where = f"/ui/executions/{execution}"
    with signed_in(host.gateway, OTHER) as client:
        for page in ("", "/files?path=uploads", "/content?path=uploads/x", "/arrivals", "/cancel", "/space"):
            assert client.get(f"{where}{page}").status_code == 404
        for page in ("/files?path=uploads", "/cancel", "/pause"):
            assert client.post(f"{where}{page}").status_code == 404
        assert execution not in client.get("/ui/executions").text
    for wrong in ("nothing", "%00", "..%2f..", str(uuid.uuid4())):
        with signed_in(host.gateway) as client:
            assert client.get(f"/ui/executions/{wrong}").status_code == 404
            assert client.get(f"/ui/executions/{execution}/{wrong}").status_code in (404, 405)


def test_a_key_for_shinzo_alone_pauses_and_ends_nothing(host: Host) -> None:
    (ended,) = old_executions(host, 1, gateways.OTHER_ORGANIZATION)
    for key, status in ((SHINZO_OTHER, 403), (OTHER, 409)):
        with signed_in(host.gateway, key) as client:
            assert client.post(f"/ui/executions/{ended}/pause").status_code == status


def test_a_phone_shows_all_of_it(tab: Tab, host: Host, execution: str) -> None:
    pages = ["", "/files?path=downloads", "/files?path=workspace/a/b/notes.txt", "/cancel"]
    tab.look(360, 640, is_dark=True)
    for page in [f"/ui/executions/{execution}{page}" for page in pages] + ["/ui/executions", "/ui/agents"]:
        tab.open(f"{host.gateway.url}{page}")
        assert is_narrow(tab), page


def test_the_keyboard_pauses_resumes_and_finishes_and_the_page_follows(
    tab: Tab, host: Host, browser: Chromium
) -> None:
    execution = host.run("babbage")
    watching = browser.tab()
    sign_in(watching, host.gateway)
    watching.open(page_of(host, execution))
    tab.open(page_of(host, execution))
    for name, status in (("pause", "paused"), ("resume", "running"), ("finish", "completed")):
        walk(tab, f"a[href$='/{name}']")
        tab.press("Enter")
        tab.until(f"location.pathname.endsWith('/{name}') && document.readyState === 'complete'")
        assert host.get(execution)["status"] != status
        walk(tab, "main form button")
        tab.press("Enter")
        tab.until(f"location.pathname.endsWith('/{execution}') && document.readyState === 'complete'")
        watching.show()
        watching.until(f"document.querySelector('#status').innerText.trim() === '{status}'")
        tab.show()
        tab.until(f"document.querySelector('#status').innerText.trim() === '{status}'")
    assert host.get(execution)["status"] == "completed"
    watching.show()
    watching.until("document.querySelector('[data-arrivals]') === null")
    watching.close()
    with signed_in(host.gateway) as client:
        where = f"/ui/executions/{execution}"
        assert "not possible now" in client.get(f"{where}/cancel").text
        assert client.post(f"{where}/cancel").status_code == 409
        assert client.get(f"{where}/files?path=workspace").status_code == 200
        answer = client.post(f"{where}/files?path=uploads", files=[("files", ("late", b"late"))])
        assert answer.status_code == 400


def test_an_open_page_does_not_hold_up_the_end_and_goes_on_with_the_next_gateway(
    host: Host, execution: str
) -> None:
    host.kill()
    host.gateway = Gateway(host.base, host.store.as_uri(), settings=host.settings, grace="600s")
    host.client = host.gateway.client()
    with (
        signed_in(host.gateway) as client,
        client.stream("GET", f"/ui/executions/{execution}/arrivals") as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith(("id: ", "event: "))
        assert host.gateway.stop() == 0  # which waits a minute, not ten
        assert list(lines)[-1] == ""
