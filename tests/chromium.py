"""The real browser, headless, spoken to by its DevTools protocol over a pipe: as much as downloads need."""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ANSWER_S = 60.0


class Chromium:
    """A browser that saves into one directory without asking. Use ``running``."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to = to_browser
        self._from = from_browser
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        message = json.dumps({"id": number, "method": method, "params": params}).encode() + b"\0"
        while message:
            message = message[os.write(self._to, message) :]
        while (answer := self._receive()).get("id") != number:
            self._events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def wait_for(self, method: str, **params: Any) -> dict[str, Any]:
        """The parameters of the next event of this name that has these parameters."""
        while True:
            for event in self._events:
                if event.get("method") == method and params.items() <= event["params"].items():
                    self._events.remove(event)
                    return dict(event["params"])
            self._events.append(self._receive())

    def begin_download(self, url: str) -> str:
        """Open the address in a tab of its own; the id of the download that it begins."""
        self.do("Target.createTarget", url=url)
        return str(self.wait_for("Browser.downloadWillBegin", url=url)["guid"])

    def download(self, url: str) -> None:
        """Download to the end."""
        self.wait_for("Browser.downloadProgress", guid=self.begin_download(url), state="completed")

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], deadline - time.monotonic())
            assert ready, f"the browser says nothing; it said: {self._events}"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def running(profile: Path, downloads: Path) -> Iterator[Chromium]:
    """A browser with a new profile in ``profile``, ended at the end."""
    (profile / "Default").mkdir(parents=True)
    preferences = {
        "download": {"default_directory": str(downloads), "prompt_for_download": False},
        "plugins": {"always_open_pdf_externally": True},
    }
    (profile / "Default" / "Preferences").write_text(json.dumps(preferences))
    commands, answers = os.pipe(), os.pipe()
    switches = [
        "--headless=new", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}",
        "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-proxy-server",
    ]  # fmt: skip
    # The browser expects its pipe at descriptors 3 and 4.
    script = f'exec chromium "$@" 3<&{commands[0]} 4>&{answers[1]} {commands[0]}<&- {answers[1]}>&-'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *switches],
        env={**os.environ, "HOME": str(profile)}, pass_fds=(commands[0], answers[1]),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(commands[0])
    os.close(answers[1])
    browser = Chromium(commands[1], answers[0])
    try:
        browser.do("Browser.setDownloadBehavior", behavior="default", eventsEnabled=True)
        yield browser
        browser.do("Browser.close")
        process.wait(ANSWER_S)
    finally:
        process.kill()
        process.wait()
        os.close(commands[1])
        os.close(answers[0])
