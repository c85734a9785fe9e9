"""The real browser, headless, spoken to by its DevTools protocol over a pipe: as much as downloads need."""

from __future__ import annotations

import base64
import fcntl
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

    def __init__(self, to_browser: int, from_browser: int, downloads: Path) -> None:
        self.downloads = downloads
        self._to = to_browser
        self._from = from_browser
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []

    def do(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command, to a tab's session if one is named, and return its result."""
        number = next(self._numbers)
        command: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        message = json.dumps(command).encode() + b"\0"
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

    def tab(self) -> Tab:
        """A new tab, to be looked at and used."""
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        return Tab(self, self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def events_of(self, session: str, *methods: str) -> list[dict[str, Any]]:
        """What a tab has told of until now."""
        return [e["params"] for e in self._events if e.get("sessionId") == session and e["method"] in methods]

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


class Tab:
    """A page in the browser, as a person uses it: by what is seen, by the keyboard, by the pointer."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this tab."""
        return self._browser.do(method, session=self._session, **params)

    def open(self, url: str) -> None:
        """Go to an address, and wait until it is there."""
        self.do("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def show(self) -> None:
        """Have it in front of the other tabs, which are hidden then."""
        self.do("Page.bringToFront")

    def close(self) -> None:
        """Be done with it."""
        self.do("Page.close")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.do(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true, also over navigations; its value."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            try:
                value = self.evaluate(expression)
            except AssertionError:  # the page went away meanwhile
                value = None
            if value:
                return value
            assert time.monotonic() < deadline, (expression, self.text())
            select.select([], [], [], 0.02)

    def text(self) -> str:
        """What is read on the page."""
        return str(self.evaluate("document.body.innerText"))

    def texts(self, selector: str, what: str = "innerText") -> list[str]:
        """What is read in each of the elements that match."""
        all_of = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return list(self.evaluate(f"{all_of}.map((each) => each.{what})"))

    def click(self, text: str, *, within: str = "main") -> None:
        """Follow the link, or press the button, that is called so, to another page."""
        found = f"[...document.querySelector({json.dumps(within)}).querySelectorAll('a, button')]"
        says = json.dumps(text)
        self.follow(
            f"{found}.find((each) => [each.innerText.trim(), each.ariaLabel].includes({says})).click()"
        )

    def follow(self, expression: str) -> None:
        """Do what leads to another page, and wait until that is there."""
        self.evaluate("window.isOld = true")
        self.evaluate(expression)
        self.until("!window.isOld && document.readyState === 'complete'")

    def press(self, key: str, *, shift: bool = False) -> None:
        """One key, by its name or what it writes."""
        known = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        code = {"windowsVirtualKeyCode": known[key]} if key in known else {}
        written = {"text": "\r" if key == "Enter" else key} if key not in ("Tab", "Escape") else {}
        for kind in ("keyDown", "keyUp"):
            say = written if kind == "keyDown" else {}
            self.do("Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift, **code, **say)

    def write(self, text: str) -> None:
        """Into what has the focus."""
        self.do("Input.insertText", text=text)

    def choose(self, selector: str, *files: Path) -> None:
        """Give files to an input."""
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.do("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def look(self, width: int, height: int = 900, *, is_dark: bool = False) -> None:
        """The size of the window, and the colours that the person prefers."""
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """What is seen, as a PNG file."""
        data = self.do("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """What the browser did not like: errors in scripts, violations of policies, answers that failed."""
        self.do("Runtime.evaluate", expression="0")  # what was told before this is here
        logged = self._browser.events_of(self._session, "Log.entryAdded")
        thrown = self._browser.events_of(self._session, "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [str(each["entry"]) for each in logged] + [str(each) for each in thrown]


def _pipe() -> tuple[int, int]:
    """A pipe whose descriptors are none of those that the browser expects."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


@contextmanager
def running(profile: Path, downloads: Path, *, shows_pdf: bool = False) -> Iterator[Chromium]:
    """A browser with a new profile in ``profile``, ended at the end.

    PDF documents are saved, too, unless it ``shows_pdf``.
    """
    (profile / "Default").mkdir(parents=True)
    preferences = {
        "download": {"default_directory": str(downloads), "prompt_for_download": False},
        "plugins": {"always_open_pdf_externally": not shows_pdf},
    }
    (profile / "Default" / "Preferences").write_text(json.dumps(preferences))
    commands, answers = _pipe(), _pipe()
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
    browser = Chromium(commands[1], answers[0], downloads)
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
