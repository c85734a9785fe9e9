"""``ps``, ``status``, ``df`` and ``doctor`` beside living, dead and hanging daemons."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuse.cli_support import Host, new_host

from agentfuse.control.liveness import liveness
from agentfuse.control.mountinfo import mounts_at
from agentfuse.doctor.trial import try_to_mount

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")]


@pytest.fixture
def host() -> Iterator[Host]:
    with new_host() as made:
        yield made


def answer(host: Host, *arguments: object, code: int = 0) -> Any:
    done = host.run(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_ps_shows_the_living_the_dead_and_the_unflushed(host: Host) -> None:
    assert answer(host, "ps") == []
    assert "nothing is mounted" in host.run("ps").stdout
    pid = host.mount()
    (host.home / "shared/x").write_bytes(b"x" * 2048)
    (row,) = answer(host, "ps")
    assert (
        row.items()
        >= {
            "agent": "a",
            "execution": "e1",
            "mountpoint": str(host.home),
            "pid": pid,
            "state": "live",
        }.items()
    )
    assert row["regions"]["shared"]["bytes_used"] == 2048
    table = host.run("ps").stdout.splitlines()
    assert table[0].split() == [
        "AGENT", "EXECUTION", "MOUNTPOINT", "PID", "UPTIME", "USE", "UNSYNCED", "SNAPSHOT", "HEALTH",
    ]  # fmt: skip
    assert "shared 2 KiB" in table[1]
    host.kill()
    assert [row["state"] for row in answer(host, "ps")] == ["dead"]
    host.run("umount", host.home)
    assert [(row["state"], row["execution"]) for row in answer(host, "ps")] == [("unflushed", "e1")]
    host.mount(execution="e2")
    host.run("umount", host.home)
    assert answer(host, "ps") == []


def test_nothing_waits_for_a_daemon_that_hangs(host: Host) -> None:
    pid = host.mount()
    os.kill(pid, signal.SIGSTOP)
    try:
        assert [row["state"] for row in answer(host, "ps")] == ["hung"]
        for verb in ("status", "df"):
            done = host.run(verb, host.home)
            assert done.returncode == 75
            assert "does not answer" in done.stderr
        done = host.run("mount", host.home, "--agent", "a")
        assert done.returncode == 75
        assert f"already served by execution e1 (pid {pid})" in done.stderr
        assert "its daemon is hung" in host.run("doctor").stdout
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_daemon_that_hangs_keeps_nobody_from_being_shown(host: Host) -> None:
    pids = {}
    for number in range(3):
        home = host.base / f"home-{number}"
        home.mkdir()
        done = host.run("mount", home, "--agent", f"a{number}", "--background")
        assert done.returncode == 0, done.stderr
        pids[f"a{number}"] = host.registry.find(home).record.pid
    (host.base / "home-2/workspace/x").write_bytes(b"x" * 2048)
    hung = ["a0", "a1"]
    for agent in hung:
        os.kill(pids[agent], signal.SIGSTOP)
    try:
        rows = {row["agent"]: row for row in answer(host, "ps")}
    finally:
        for agent in hung:
            os.kill(pids[agent], signal.SIGCONT)
    states = {agent: row["state"] for agent, row in rows.items()}
    assert states == {"a0": "hung", "a1": "hung", "a2": "live"}
    assert {agent: row["pid"] for agent, row in rows.items()} == pids
    assert rows["a2"]["regions"]["workspace"]["bytes_used"] == 2048


def test_df_and_ps_warn_from_80_percent_on(host: Host) -> None:
    (host.base / "config.toml").write_text(
        "[regions.uploads]\nbytes = 1000\n[regions.downloads]\nfiles = 4\n"
    )
    host.mount()
    (host.home / "uploads/x").write_bytes(b"x" * 799)
    assert host.run("df").stderr == ""
    (host.home / "uploads/x").write_bytes(b"x" * 930)
    for name in "1234":
        (host.home / "downloads" / name).touch()
    rows = {row["region"]: row for row in answer(host, "df")}
    assert {name for name, row in rows.items() if row["nearly_full"]} == {"uploads", "downloads"}
    warned = host.run("df", host.home)
    assert warned.returncode == 0
    assert f"{host.home}: uploads is 93% full, 70 B and 49,999 files are left" in warned.stderr
    assert f"{host.home}: downloads is 100% full, 500 MiB and 0 files are left" in warned.stderr
    assert "uploads 930 B (93%)" in host.run("ps").stdout


def test_status_is_one_object_with_what_is_promised(host: Host) -> None:
    pid = host.mount()
    (host.home / "workspace/x").write_bytes(b"12345")
    said = answer(host, "status", host.home)
    expected = {
        "pid": pid,
        "agent": "a",
        "execution": "e1",
        "mountpoint": str(host.home),
        "store": host.store.as_uri(),
    }
    assert said.items() >= expected.items()
    assert set(said["regions"]) == {"shared", "workspace", "downloads", "uploads", "debug", "home"}
    use = {"bytes_used": 5, "bytes_quota": 500 * 2**20, "files_used": 1, "files_quota": 500_000}
    assert said["regions"]["workspace"].items() >= use.items()
    assert said["fuse"]["requests"]["create"] == 1
    text = host.run("status", host.home).stdout
    assert f"pid         {pid}" in text
    assert "contents    all here" in text
    assert "workspace  5 B of 500 MiB" in text


def test_df_has_a_line_for_each_region_of_each_mount(host: Host) -> None:
    host.mount()
    (host.home / "uploads/x").write_bytes(b"x" * (100 * 2**20))
    rows = answer(host, "df", host.home)
    assert [row["region"] for row in rows] == ["shared", "workspace", "downloads", "uploads", "debug", "home"]
    assert (
        rows[3].items() >= {"mountpoint": str(host.home), "bytes_used": 100 * 2**20, "files_used": 1}.items()
    )
    assert answer(host, "df") == rows
    assert "█████░░░░░  50%" in host.run("df", host.home).stdout


@pytest.mark.parametrize("verb", ["status", "df"])
def test_a_mount_that_is_not_there_or_dead_is_said_to_be(host: Host, verb: str) -> None:
    done = host.run(verb, host.home)
    assert (done.returncode, "no agentfuse mount at" in done.stderr) == (66, True)
    host.mount()
    host.kill()
    done = host.run(verb, host.home)
    assert done.returncode == 66
    assert f"the daemon of {host.home} is dead\n  fix: agentfuse umount {host.home}" in done.stderr


# --- doctor


def verdicts(host: Host, *arguments: object, code: int = 0) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in answer(host, "doctor", *arguments, code=code)}


def test_doctor_finds_a_good_machine_good(host: Host) -> None:
    found = verdicts(host)
    assert set(found) >= {
        "/proc",
        "/dev/fuse",
        "mounting",
        "configuration",
        "state",
        "free space",
        "object store",
    }
    assert [f for f in found.values() if f["verdict"] == "fail"] == []
    assert host.state.stat().st_mode & 0o777 == 0o700
    assert os.listdir(host.state) == []
    assert host.run("doctor").stdout.splitlines()[0].startswith("ok    agentfuse")


def test_doctor_names_what_is_wrong_and_the_fix(host: Host) -> None:
    host.mount()
    (host.home / "shared/x").touch()
    host.kill()
    dead = [each for each in answer(host, "doctor") if each["check"] == "dead mounts"]
    (ours,) = [each for each in dead if each["found"].startswith(f"{host.home}: ")]  # others may be there
    assert (ours["verdict"], ours["fix"]) == ("warn", f"agentfuse umount {host.home}")
    assert "e1" in verdicts(host)["unflushed homes"]["found"]
    found = verdicts(host, "--store", "gopher://x", "--state", "/proc/x", code=69)
    assert found["state"]["verdict"] == found["object store"]["verdict"] == "fail"
    assert "--state" in found["state"]["fix"]
    assert "file:///" in found["object store"]["fix"]
    (host.base / "config.toml").write_text("bogus = 1\n")
    assert "config.toml:1: bogus" in verdicts(host, code=69)["configuration"]["found"]


def test_doctor_tells_once_of_what_fails_several_checks(host: Host) -> None:
    host.runtime.write_text("no directory")
    failed = [each for each in answer(host, "doctor", code=69) if each["verdict"] == "fail"]
    assert [each["check"] for each in failed] == ["registry"]
    host.runtime.unlink()


def test_the_socket_and_the_port_of_a_mount_are_told(host: Host) -> None:
    (host.base / "config.toml").write_text('metrics = "127.0.0.1:0"\n')
    host.mount()
    sockets = {answer(host, "status", host.home)["socket"], *(row["socket"] for row in answer(host, "ps"))}
    assert sockets == {str(host.registry.find(host.home).socket)}
    assert answer(host, "status", host.home)["metrics_url"] in host.run("status", host.home).stdout


def test_doctor_finds_a_container_without_the_right_to_mount(host: Host) -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin",
         sys.executable, "-m", "agentfuse", "doctor"],
        env=host.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 69
    assert "the kernel refuses to mount: Operation not permitted" in done.stdout
    assert "CAP_SYS_ADMIN" in done.stdout


def test_doctor_finds_a_machine_without_fuse(host: Host) -> None:
    program = f"mount -t tmpfs none /dev && exec {sys.executable} -m agentfuse doctor"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", program],
        env=host.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 69
    assert "/dev/fuse is missing" in done.stdout
    assert "modprobe fuse" in done.stdout


# --- telling the dead from the living, on mounts that no daemon of ours made


@pytest.fixture
def unserved(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A FUSE mount whose descriptor nobody reads."""
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    assert libc.mount(b"x", os.fsencode(tmp_path), b"fuse", 0, data) == 0, os.strerror(ctypes.get_errno())
    yield tmp_path, device
    libc.umount2(os.fsencode(tmp_path), 2)


def test_a_mount_that_nobody_answers_hangs_and_one_that_lost_its_daemon_is_dead(
    unserved: tuple[Path, int],
) -> None:
    path, device = unserved
    assert liveness(path, timeout_s=0.3) == "hung"
    os.close(device)
    assert liveness(path) == "dead"


def test_a_living_filesystem_is_live() -> None:
    assert liveness(Path("/proc")) == "live"


def test_the_trial_mount_leaves_nothing(tmp_path: Path) -> None:
    try_to_mount(tmp_path)
    assert mounts_at(tmp_path) == []
