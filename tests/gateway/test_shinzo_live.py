"""Shinzo's files on a live home: what the agent does there, and what it tries."""

from __future__ import annotations

import ctypes
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from agents_files import Agent, executing, is_refused
from gateways import DEADLINE_S, Gateway

pytestmark = pytest.mark.mount

_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def home(live: Agent, executed: tuple[Agent, Path]) -> Path:
    """Where the home of ``live`` is mounted."""
    return executed[1]


def transfer(agent: Agent, verb: str, source: str, destination: str, **fields: Any) -> httpx.Response:
    return agent.ask("POST", verb, {"source": source, "destination": destination} | fields)


def test_the_home_and_the_api_are_the_same_files(live: Agent, home: Path) -> None:
    for region in ("shared", "workspace", "uploads", "downloads"):
        assert live.create(f"{region}/d/f", region).status_code == 201
        assert (home / region / "d/f").read_text() == region
        (home / region / "d/f").write_text("the agent's")
        assert live.content(f"{region}/d/f") == "the agent's"
    assert live.create("loose.txt", "1", permissions="600").status_code == 201
    assert (home / "loose.txt").stat().st_mode & 0o777 == 0o600
    assert "loose.txt" in live.names() and ".agentfuse" not in live.names(includeHidden="true")
    assert live.patch("loose.txt", "append", "2").status_code == 200
    assert (home / "loose.txt").read_text() == "12"
    assert (home / "loose.txt").stat().st_mode & 0o777 == 0o600
    assert live.ask("DELETE", "files/loose.txt").status_code == 200
    assert not (home / "loose.txt").exists()
    assert is_refused(live.create("workspace", "", overwrite=True), 409)
    answer = live.create(".agentfuse/status.json", "", overwrite=True)
    assert 400 <= answer.status_code < 500
    live.create("uploads/arrived.csv", "a,b")
    event = told(home, "arrived.csv")
    assert (event["region"], event["size"], event["created_by"]) == ("uploads", 3, "user")


def told(home: Path, path: str) -> dict[str, Any]:
    """The event of a file's arrival."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        for line in (home / ".agentfuse/events.ndjson").read_text().splitlines():
            if (event := json.loads(line))["path"] == path:
                return dict(event)
        time.sleep(0.02)
    raise AssertionError("it was not told")


def test_copies_and_moves_go_between_regions(live: Agent, home: Path) -> None:
    live.create("workspace/d/f", "1", permissions="750")
    (home / "workspace/d/link").symlink_to("f")
    live.ask("PUT", "metadata/workspace/d/f", {"tags": ["kept"]})
    assert transfer(live, "copy", "workspace/d", "shared/e/d").status_code == 200
    assert transfer(live, "move", "workspace/d", "downloads/d").status_code == 200
    assert not (home / "workspace/d").exists()
    for path in ("shared/e/d", "downloads/d"):
        assert (home / path / "f").read_text() == "1"
        assert (home / path / "f").stat().st_mode & 0o777 == 0o750
        assert os.readlink(home / path / "link") == "f"
        assert live.ask("GET", f"metadata/{path}/f").json()["tags"] == ["kept"]
    live.create("workspace/f", "2")
    for verb in ("copy", "move"):
        assert is_refused(transfer(live, verb, "workspace/f", "shared/e/d/f"), 409)
        assert is_refused(transfer(live, verb, "workspace/f", "shared/e/d", overwrite=True), 409)
        assert is_refused(transfer(live, verb, "downloads/d", "shared/e", overwrite=True), 409)
        assert is_refused(transfer(live, verb, "workspace/none", "shared/x"), 404)
        assert is_refused(transfer(live, verb, "workspace", "shared/x"), 400)
        assert is_refused(transfer(live, verb, "shared/e", "workspace"), 400)
        assert transfer(live, verb, "workspace/f", "shared/e/d/f", overwrite=True).status_code == 200
    assert live.content("shared/e/d/f") == "2"


def test_what_the_agent_appends_meanwhile_is_not_lost(live: Agent, home: Path, gateway: Gateway) -> None:
    live.create("workspace/log", "")

    def appends(number: int) -> None:
        with gateway.client() as client:
            mine = Agent(client, live.id)
            for turn in range(3):
                assert mine.patch("workspace/log", "append", f"api {number} {turn}\n").status_code == 200

    def writes() -> None:
        for turn in range(20):
            with (home / "workspace/log").open("a") as file:
                file.write(f"agent {turn}\n")
            stop.wait(0.05)

    stop = threading.Event()
    with ThreadPoolExecutor(5) as pool:
        agents = pool.submit(writes)
        list(pool.map(appends, range(4)))
        agents.result()
    lines = (home / "workspace/log").read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("api")) == sorted(
        f"api {number} {turn}" for number in range(4) for turn in range(3)
    )


def test_a_file_from_the_future_can_be_patched(live: Agent, home: Path) -> None:
    live.create("workspace/tomorrow", "1")
    os.utime(home / "workspace/tomorrow", (time.time() + 86400,) * 2)
    assert live.patch("workspace/tomorrow", "append", "2").status_code == 200
    assert (home / "workspace/tomorrow").read_text() == "12"


def test_quota_is_the_regions_own(live: Agent, home: Path) -> None:
    with (home / "shared/big").open("wb") as file:
        file.truncate(50 * 1024 * 1024 - 10)
    assert is_refused(live.create("shared/f", "12345678901"), 507, "QUOTA_EXCEEDED")
    assert is_refused(live.patch("shared/big", "append", "12345678901"), 507)
    assert live.create("shared/f", "123456789").status_code == 201
    (home / "workspace/x.tar").write_bytes(tar_of({"a": b"1" * 6, "b": b"2" * 6}))
    extraction = {"archivePath": "workspace/x.tar", "outputPath": "shared/out"}
    assert is_refused(live.ask("POST", "extract", extraction), 507)
    assert live.names("shared") == ["big", "f"]


def tar_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_archives_of_live_files_come_back_in_another_region(live: Agent, home: Path) -> None:
    (home / "workspace/t/d").mkdir(parents=True)
    (home / "workspace/t/d/\udcff").write_bytes(b"\0" * 300_000)
    (home / "workspace/t/run").write_text("x")
    (home / "workspace/t/run").chmod(0o755)
    (home / "workspace/t/link").symlink_to("/etc/passwd")
    answer = live.ask("POST", "archive", {"paths": ["workspace/t"], "outputPath": "downloads/t.tar.gz"})
    assert (answer.status_code, answer.json()["skipped"]) == (201, 1)
    with tarfile.open(home / "downloads/t.tar.gz") as archive:
        assert archive.getnames() == ["t", "t/d", "t/d/\udcff", "t/run"]
    body = {"archivePath": "downloads/t.tar.gz", "outputPath": "shared/out"}
    assert live.ask("POST", "extract", body).json()["files_extracted"] == 2
    assert (home / "shared/out/t/d/\udcff").read_bytes() == b"\0" * 300_000
    assert (home / "shared/out/t/run").stat().st_mode & 0o777 == 0o755
    assert is_refused(live.ask("POST", "extract", body), 409)
    (home / "shared/out/t/run").write_text("the agent's own")
    (home / "shared/out/t/d").rename(home / "shared/out/moved")
    assert is_refused(live.ask("POST", "extract", body), 409)
    assert live.names("shared/out", recursive="true") == ["moved", "moved/\udcff", "t", "t/run"]
    (home / "workspace/evil.tar").write_bytes(tar_of({"ok": b"", "../../evil": b""}))
    body = {"archivePath": "workspace/evil.tar", "outputPath": "workspace/out"}
    assert is_refused(live.ask("POST", "extract", body), 400)
    assert not (home / "workspace/out").exists()


# -- what the agent plants


SECRET = "root:x:0:0"


def escapes(live: Agent, path: str) -> Iterator[httpx.Response]:
    """Everything that could lead outside through ``path``, a link, or through ``path``/passwd."""
    for each in (path, f"{path}/passwd"):
        yield live.read(each)
        yield live.read(each, download="true")
        yield live.patch(each, "append", "evil")
        yield live.ask("PUT", f"files/{each}", {"content": "evil"})
        yield live.ask("GET", f"directories/{each}")
        yield transfer(live, "copy", f"{each}/hosts", "workspace/stolen")
        yield transfer(live, "move", f"{each}/hosts", "workspace/stolen")
        yield live.ask("POST", "search", {"query": "root", "path": each})
        yield live.ask("POST", "archive", {"paths": [each], "outputPath": "workspace/stolen.tar"})
        yield live.ask("POST", "extract", {"archivePath": each, "outputPath": "workspace/stolen"})
        yield live.ask("PATCH", f"metadata/{each}", {"permissions": "777"})
    yield live.create(f"{path}/evil", "evil")
    yield live.ask("POST", f"directories/{path}/evil", {"recursive": True})
    yield live.ask("DELETE", f"directories/{path}/evil", {"recursive": True})
    yield transfer(live, "copy", "workspace/mine", f"{path}/evil")
    yield transfer(live, "move", "workspace/mine", f"{path}/evil", overwrite=True)
    yield live.ask("POST", "extract", {"archivePath": "workspace/ok.tar", "outputPath": f"{path}/evil"})


def test_no_link_of_the_agents_leads_outside(live: Agent, home: Path, gateway: Gateway) -> None:
    outside = gateway.state.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "passwd").write_text(SECRET)
    (outside / "hosts").write_text(SECRET)
    (home / "workspace/mine").write_text("mine")
    (home / "workspace/ok.tar").write_bytes(tar_of({"f": b"1"}))
    for number, target in enumerate((outside, "/etc", gateway.state, "/proc/self/root/etc", "../../..")):
        link = f"workspace/link{number}"
        (home / link).symlink_to(target)
        before = sorted(os.listdir(home / link))
        for answer in escapes(live, link):
            assert answer.status_code < 500, answer.text
            assert SECRET not in answer.text
            if answer.status_code < 300:  # the link itself: nothing behind it
                assert answer.request.url.path.endswith(("/search", "/archive")), answer.request.url
        assert sorted(os.listdir(home / link)) == before
        (home / "workspace/stolen.tar").unlink(missing_ok=True)
        assert "stolen" not in os.listdir(home / "workspace")
    for found in (
        live.ask("POST", "search", {"query": "root:", "type": "content"}).json(),
        live.ask("POST", "search", {"query": "passwd", "type": "filename"}).json(),
    ):
        assert found["results"] == []
    assert {(path.name, path.read_text()) for path in outside.iterdir()} == {
        ("passwd", SECRET),
        ("hosts", SECRET),
    }
    answer = live.ask("DELETE", "files/workspace/link0")
    assert answer.status_code == 200 and outside.exists()


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Two names that change places, again and again."""
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            _libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), _EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_directory_that_becomes_a_link_meanwhile_leads_nowhere(
    live: Agent, home: Path, gateway: Gateway
) -> None:
    outside = gateway.state.parent / "beyond"
    outside.mkdir(exist_ok=True)
    (outside / "passwd").write_text(SECRET)
    (home / "workspace/d").mkdir()
    (home / "workspace/d/passwd").write_text("harmless")
    (home / "workspace/l").symlink_to(outside)
    asks: tuple[Callable[[], httpx.Response], ...] = (
        lambda: live.read("workspace/d/passwd"),
        lambda: live.read("workspace/d/passwd", download="true"),
        lambda: live.ask("PUT", "files/workspace/d/passwd", {"content": "harmless"}),
        lambda: live.create("workspace/d/new", "evil", overwrite=True),
        lambda: live.ask("GET", "directories/workspace/d"),
        lambda: live.ask("POST", "search", {"query": ".", "type": "content", "path": "workspace"}),
        lambda: live.ask(
            "POST", "archive", {"paths": ["workspace/d"], "outputPath": "shared/t.tar", "overwrite": True}
        ),
        lambda: transfer(live, "copy", "workspace/d/passwd", "shared/copy", overwrite=True),
        lambda: live.ask("DELETE", "files/workspace/d/new"),
    )
    with swapping(home / "workspace/d", home / "workspace/l"):
        for _ in range(8):
            for ask in asks:
                answer = ask()
                assert answer.status_code < 500, answer.text
                assert SECRET not in answer.text
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("passwd", SECRET)]
    for path in (home / "shared").iterdir():
        assert SECRET.encode() not in path.read_bytes()


# -- from one life to the next


def test_tags_and_permissions_outlive_the_execution(gateway: Gateway) -> None:
    with gateway.client() as client:
        agent = Agent(client)
        agent.create("shared/idle", "1")
        agent.ask("PUT", "metadata/shared/idle", {"tags": ["a"], "permissions": "640"})
        with executing(gateway, agent) as home:
            facts = agent.ask("GET", "metadata/shared/idle").json()
            assert (facts["tags"], facts["permissions"]) == (["a"], "640")
            agent.create("shared/live", "2")
            (home.path / "shared/dir").mkdir()
            for path in ("shared/live", "shared/dir"):
                body = {"tags": ["b", "c"], "owner": "me", "permissions": "700"}
                assert agent.ask("PUT", f"metadata/{path}", body).status_code == 200
            (home.path / "shared/live").rename(home.path / "shared/renamed")
            agent.patch("shared/idle", "append", "!")
            home.end()
            assert is_refused(agent.read("workspace/x"), 409)
        for path in ("shared/renamed", "shared/dir"):
            facts = agent.ask("GET", f"metadata/{path}").json()
            assert (facts["tags"], facts["permissions"], facts["owner"]) == (["b", "c"], "700", "me")
        assert agent.ask("GET", "metadata/shared/idle").json()["tags"] == ["a"]
        assert agent.content("shared/idle") == "1!"
