"""Downloads of a real Chromium into the mount: each arrives once, whole, with its facts."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import chromium
import pytest
from mounts import Home

from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry

pytestmark = pytest.mark.mount

PDF = b"%PDF-1.7\n" + b"page\n" * 50_000
CSV = b"name,amount\n" + b"somebody,17\n" * 1_750_000  # 20 MB and more


class Site(ThreadingHTTPServer):
    """A page, two files, and one that never comes to its end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.given_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        endless = b"PK\x03\x04" + bytes(1_000_000)
        body = {"/a.pdf": PDF, "/data.csv": CSV, "/endless.zip": endless}.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Disposition", "attachment")
        is_endless = self.path == "/endless.zip"
        self.send_header("Content-Length", str(len(body) * (1000 if is_endless else 1)))
        self.end_headers()
        self.wfile.write(body)
        if is_endless:
            self.server.given_up.wait(60)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.given_up.set()
        server.shutdown()
        thread.join()


def test_a_browser_s_downloads_arrive_once_each_and_cancelled_ones_never(
    home: Home, site: Site, tmp_path: Path
) -> None:
    downloads = home.path / "downloads"
    with chromium.running(tmp_path / "profile", downloads) as browser:
        browser.download(f"{site.url}/a.pdf")
        browser.download(f"{site.url}/a.pdf")
        cancelled = browser.begin_download(f"{site.url}/endless.zip")
        while not browser.wait_for("Browser.downloadProgress", guid=cancelled)["receivedBytes"]:
            pass
        assert list(downloads.glob("*.crdownload"))
        browser.do("Browser.cancelDownload", guid=cancelled)
        browser.wait_for("Browser.downloadProgress", guid=cancelled, state="canceled")
        browser.download(f"{site.url}/data.csv")
    (downloads / "end").write_text("x")
    told = ControlClient(Registry(home.runtime).find(home.path).socket).events(follow=True)
    events = []
    for event in told:
        if event and event["path"] == "end":
            break
        events += [event] if event else []
    facts = ("kind", "region", "path", "size", "mime", "created_by")
    assert [tuple(event[fact] for fact in facts) for event in events] == [
        ("arrived", "downloads", "a.pdf", len(PDF), "application/pdf", "environment"),
        ("arrived", "downloads", "a (1).pdf", len(PDF), "application/pdf", "environment"),
        ("arrived", "downloads", "data.csv", len(CSV), "text/csv", "environment"),
    ]
    assert events[0]["sha256"] == hashlib.sha256(PDF).hexdigest()
    assert (downloads / "data.csv").read_bytes() == CSV
    assert sorted(path.name for path in downloads.iterdir()) == ["a (1).pdf", "a.pdf", "data.csv", "end"]


def test_a_browser_s_downloads_come_through_an_inbox_under_names_of_their_own(
    new_home: Callable[..., Home], site: Site, tmp_path: Path
) -> None:
    home, inbox = new_home(), tmp_path / "inbox"
    inbox.mkdir()
    table = f'[[inbox]]\ndirectory = "{inbox}"\nregion = "downloads"\n'
    home.config.write_text(home.config.read_text() + table)
    home.start()
    told = ControlClient(Registry(home.runtime).find(home.path).socket).events(follow=True)
    events = (event for event in told if event)
    facts = ("kind", "path", "size", "mime", "created_by")
    with chromium.running(tmp_path / "profile", inbox) as browser:
        for name in ("a.pdf", "a (1).pdf"):
            browser.download(f"{site.url}/a.pdf")
            event = next(events)
            assert tuple(event[fact] for fact in facts) == (
                "arrived", name, len(PDF), "application/pdf", "environment",
            )  # fmt: skip
            assert (home.path / "downloads" / name).read_bytes() == PDF
            while (inbox / "a.pdf").exists():  # a moment after the event
                assert home.is_mounted()
    assert list(inbox.iterdir()) == []
    home.umount()
