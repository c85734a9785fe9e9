"""The host's registry of mounts: locks, records, and directories that somebody else prepared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentfuse.control.registry import (
    MountRecord,
    Registry,
    open_registry,
    runtime_directory,
    runtime_path,
)
from agentfuse.errors import BusyError, EnvironmentProblem, NotFoundError

HOLDER = """
import sys
from pathlib import Path
from agentfuse.control.registry import Registry
lock = Registry(Path(sys.argv[1])).lock(Path(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return open_registry({"AGENTFUSE_RUNTIME_DIR": str(tmp_path / "run")})


def record(mountpoint: Path, **changes: object) -> MountRecord:
    fields = {
        "execution": "e",
        "agent": "a",
        "pid": 7,
        "state": "/s",
        "store": "file:///s",
        "started_at": 1.5,
    }
    return MountRecord(mountpoint=str(mountpoint), **(fields | changes))  # type: ignore[arg-type]


@contextmanager
def held(registry: Registry, mountpoint: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that serves the mountpoint."""
    command = [sys.executable, "-c", HOLDER, registry.runtime, mountpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            yield holder
        finally:
            holder.kill()


def test_a_published_mount_is_found_by_any_way_to_its_path(registry: Registry, tmp_path: Path) -> None:
    home = tmp_path / "home\udcff"
    (tmp_path / "link").symlink_to(os.fsencode(home.name).decode("utf-8", "surrogateescape"))
    registry.publish(record(home))
    for path in (home, tmp_path / "x/../home\udcff", tmp_path / "link"):
        assert registry.find(path).record == record(home)
    assert [entry.record for entry in registry.list()] == [record(home)]


def test_a_withdrawn_mount_is_gone_and_withdrawing_again_is_no_error(
    registry: Registry, tmp_path: Path
) -> None:
    registry.publish(record(tmp_path))
    registry.withdraw(tmp_path)
    registry.withdraw(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        registry.find(tmp_path)
    assert "agentfuse ps" in caught.value.hint
    assert os.listdir(registry.runtime) == []


def test_one_daemon_a_mountpoint_and_the_refusal_names_it(registry: Registry, tmp_path: Path) -> None:
    registry.publish(record(tmp_path, execution="e17"))
    with held(registry, tmp_path):
        assert registry.find(tmp_path).alive
        with pytest.raises(BusyError) as caught:
            registry.lock(tmp_path)
        registry.lock(tmp_path / "elsewhere").release()
    assert "e17 (pid 7)" in caught.value.message
    assert f"agentfuse umount {tmp_path}" in caught.value.hint


def test_the_record_of_a_killed_daemon_is_stale_and_its_lock_free(registry: Registry, tmp_path: Path) -> None:
    with held(registry, tmp_path) as holder:
        registry.publish(record(tmp_path))
        assert not registry.wait_until_released(tmp_path, timeout_s=0)
        holder.kill()
        assert registry.wait_until_released(tmp_path, timeout_s=30)
    assert not registry.find(tmp_path).alive
    registry.lock(tmp_path).release()


def test_released_locks_leave_no_file_and_can_be_taken_again(registry: Registry, tmp_path: Path) -> None:
    for _ in range(3):
        lock = registry.lock(tmp_path)
        assert registry.is_served(tmp_path)
        lock.release()
        assert not registry.is_served(tmp_path)
    assert os.listdir(registry.runtime) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"mountpoint": 5}', b'{"mountpoint": "/x", "pid": "y"}']
)
def test_what_is_no_record_is_passed_over(registry: Registry, tmp_path: Path, content: bytes) -> None:
    (registry.runtime / "0123456789abcdef.json").write_bytes(content)
    registry.publish(record(tmp_path))
    assert [entry.record.mountpoint for entry in registry.list()] == [str(tmp_path)]


def test_a_runtime_directory_is_made_for_us_alone(tmp_path: Path) -> None:
    path = runtime_directory({"AGENTFUSE_RUNTIME_DIR": str(tmp_path / "a/b")})
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_planted_runtime_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    cases = {
        "link": "is a symlink",
        "file": "is not a directory",
        "open": "mode 0770",
        "file/below": "cannot be made",
    }
    for name, message in cases.items():
        with pytest.raises(EnvironmentProblem) as caught:
            runtime_directory({"AGENTFUSE_RUNTIME_DIR": str(tmp_path / name)})
        assert message in caught.value.message
        assert caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")
def test_a_runtime_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)
    with pytest.raises(EnvironmentProblem, match="belongs to uid 65534"):
        runtime_directory({"AGENTFUSE_RUNTIME_DIR": str(path)})


def test_where_the_runtime_directory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runtime_path({"XDG_RUNTIME_DIR": "/run/user/0"}) == Path("/run/agentfuse")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert runtime_path({"XDG_RUNTIME_DIR": "/run/user/1234"}) == Path("/run/user/1234/agentfuse")
    assert runtime_path({}) == Path("/tmp/agentfuse-1234")
