"""``trace`` and ``watch`` on real mounts: what programs do is seen, and who looks never slows them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from mounts import AGENTFUSE, Home

from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry

pytestmark = pytest.mark.mount

_numbers = itertools.count()


@pytest.fixture(scope="module")
def home(make_home: Callable[..., Home]) -> Iterator[Home]:
    made = make_home(regions={"downloads": (4096, 100)}).start()
    yield made
    made.umount()


def client(home: Home) -> ControlClient:
    return ControlClient(Registry(home.runtime).find(home.path).socket)


@contextlib.contextmanager
def traced(home: Home) -> Iterator[list[dict[str, Any]]]:
    """Fills the list with what is traced inside of the block."""
    found: list[dict[str, Any]] = []
    lines = client(home).trace()
    assert next(lines) == {}  # it has begun
    last = f"no-such-name-{next(_numbers)}"

    def read() -> None:
        for line in lines:
            if line.get("path") == last:
                return
            if line:
                found.append(line)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield found
    finally:
        assert not (home.path / last).exists()
        thread.join(30)
        assert not thread.is_alive()


def test_operations_are_told_with_their_paths_sizes_and_process(home: Home) -> None:
    program = (
        "import os; os.chdir('shared'); fd = os.open('a', os.O_RDWR | os.O_CREAT); os.write(fd, b'x' * 100);"
        "os.pread(fd, 10, 5); os.close(fd); os.rename('a', 'b'); os.symlink('b', 'c'); os.unlink('b')"
    )
    with traced(home) as found:
        done = subprocess.Popen([sys.executable, "-c", program], cwd=home.path)
        assert done.wait(30) == 0
    ours = [line for line in found if line["pid"] == done.pid and line["operation"] != "lookup"]
    told = {line["operation"]: line for line in ours}
    assert told["create"]["path"] == "shared/a"
    assert told["write"].items() >= {"path": "shared/a", "offset": 0, "size": 100, "region": "shared"}.items()
    assert told["rename"].items() >= {"path": "shared/a", "to": "shared/b", "errno": None}.items()
    assert told["symlink"].items() >= {"path": "shared/c", "to": "b"}.items()
    assert told["unlink"]["path"] == "shared/b"
    assert told["create"]["process"].startswith("python")
    assert all(line["duration_us"] > 0 for line in ours)


def test_what_fails_is_told_with_its_errno(home: Home) -> None:
    with (
        traced(home) as found,
        pytest.raises(OSError, match="quota"),
        open(home.path / "downloads/big", "wb", buffering=0) as file,
    ):
        file.write(b"x" * 4096)
        file.write(b"x")
    (home.path / "downloads/big").unlink()
    failed = [line for line in found if line["errno"] == "EDQUOT"]
    assert [(line["operation"], line["path"], line["offset"]) for line in failed] == [
        ("write", "downloads/big", 4096)
    ]


def test_an_operation_that_had_to_wait_is_told_with_the_time_that_it_took(home: Home) -> None:
    before = home.requests()["mkdir"]
    with traced(home) as found, ThreadPoolExecutor(1) as making:
        drain = client(home).drain(timeout_s=30, hold_s=30)
        assert any("drained" in line for line in drain)  # from now on who wants to change something waits
        made = making.submit((home.path / "workspace/late").mkdir)
        while home.requests()["mkdir"] == before:
            assert not made.done()
        since = time.monotonic()
        assert home.status()["state"] == "live"
        waited_s = time.monotonic() - since
        drain.close()
        made.result(30)
    (home.path / "workspace/late").rmdir()
    (line,) = [line for line in found if line["operation"] == "mkdir"]
    assert (line["path"], line["errno"]) == ("workspace/late", None)
    assert line["duration_us"] >= waited_s * 1e6


def test_a_handle_that_was_open_before_is_told_with_its_opener(home: Home) -> None:
    path = home.path / "workspace/log"
    with open(path, "wb", buffering=0) as file:
        with traced(home) as found:
            file.write(b"line\n")
        path.unlink()
        with traced(home) as nameless:
            file.write(b"line\n")
    (line,) = [line for line in found if line["operation"] == "write" and line["path"] == "workspace/log"]
    assert line["pid"] == os.getpid()
    assert [
        line["path"] for line in nameless if line["operation"] == "write" and line["pid"] == os.getpid()
    ] == [None]


def test_nobody_traced_means_the_handlers_themselves(home: Home) -> None:
    with traced(home):
        pass
    before = home.requests()["mkdir"]
    (home.path / "workspace/d").mkdir()
    (home.path / "workspace/d").rmdir()
    assert home.requests()["mkdir"] == before + 1


def test_a_reader_that_never_reads_slows_nobody_and_is_told_what_it_lost(home: Home) -> None:
    entry = Registry(home.runtime).find(home.path)
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(entry.socket)), timeout=30) as http,
        http.stream("GET", "http://agentfuse/v1/trace?op=write") as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == ""
        with open(home.path / "workspace/many", "wb", buffering=0) as file:
            for _ in range(15_000):
                file.write(b"x")
        assert home.status()["state"] == "live"
        found, lost = 0, 0
        for text in lines:
            line = json.loads(text) if text else {}
            found += "operation" in line and line["path"] == "workspace/many"
            lost += line.get("lost", 0)
            if found + lost >= 15_000:
                break
    assert lost > 0
    (home.path / "workspace/many").unlink()


def test_the_command_filters_and_ends_by_itself(home: Home) -> None:
    command = [AGENTFUSE, "trace", str(home.path), "--op", "mkdir,rmdir", "--for", "10s", "--json"]
    process = subprocess.Popen(
        [*command, "--path", f"{home.path}/workspace/*"],
        env=home.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    made = threading.Event()

    def make() -> None:
        while not made.is_set():  # until the tracer, which starts when it likes, has seen one
            (home.path / "workspace/seen").mkdir()
            (home.path / "workspace/seen").rmdir()

    thread = threading.Thread(target=make)
    thread.start()
    try:
        first = json.loads(process.stdout.readline())
    finally:
        made.set()
        thread.join()
    assert first["operation"] in {"mkdir", "rmdir"}
    assert first["path"] == "workspace/seen"
    process.terminate()
    process.communicate(timeout=30)
    done = home.agentfuse("trace", str(home.path), "--errors", "--for", "1ms")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_mistake_in_the_command_names_the_fix(home: Home) -> None:
    done = home.agentfuse("trace", str(home.path), "--op", "wriet")
    assert done.returncode == 2
    assert "no operation 'wriet' is traced" in done.stderr
    assert "write" in done.stderr
    assert "is not a duration" in home.agentfuse("trace", str(home.path), "--for", "soon").stderr


def test_watch_shows_the_hottest_file_and_process(home: Home) -> None:
    stop = threading.Event()

    def write() -> None:
        with open(home.path / "workspace/hot", "wb", buffering=0) as file:
            while not stop.is_set():
                file.write(b"x")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        done = home.agentfuse("watch", str(home.path), "--json", "--interval", "0.5")
        text = home.agentfuse("watch", str(home.path), "--once", "--interval", "0.5").stdout
    finally:
        stop.set()
        thread.join()
    frame = json.loads(done.stdout)
    activity = frame["activity"]
    assert activity["requests_per_s"] > 0
    assert 0 < activity["p50_us"] <= activity["p99_us"]
    assert activity["files"][0]["path"] == "workspace/hot"
    assert activity["processes"][0]["pid"] == os.getpid()
    assert activity["operations"][0]["operation"] == "write"
    assert activity["operations"][0]["written_bytes_per_s"] > 0
    assert set(frame["status"]["regions"]) >= {"shared", "workspace"}
    assert "workspace/hot" in text
    assert "requests/s" in text
    assert "500 MiB" in text
    (home.path / "workspace/hot").unlink()


def test_watch_shows_the_last_events(home: Home) -> None:
    (home.path / "uploads/came").write_bytes(b"1")
    found = client(home).events(follow=True, region="uploads")
    assert next(event for event in found if event)["path"] == "came"
    frame = next(client(home).watch(interval_s=0.1))
    assert frame["events"][-1]["path"] == "came"
    assert "uploads/came" in home.agentfuse("watch", str(home.path), "--once", "--interval", "0.1").stdout


def test_an_interval_of_nothing_is_refused(home: Home) -> None:
    entry = Registry(home.runtime).find(home.path)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(entry.socket))) as http:
        answer = http.get("http://agentfuse/v1/watch?interval_s=0")
    assert answer.status_code == 400


def test_with_the_mount_the_commands_end_well(new_home: Callable[..., Home]) -> None:
    home = new_home().start()
    tracing = client(home).trace()
    assert next(tracing) == {}
    watching = client(home).watch(interval_s=10)
    with ThreadPoolExecutor(2) as reading:
        lines, frames = reading.submit(list, tracing), reading.submit(list, watching)
        while home.status()["fuse"]["traced"] < 2:
            assert not frames.done()
        home.umount()
        assert all("error" not in line for line in lines.result(30))
        assert len(frames.result(30)) == 1
