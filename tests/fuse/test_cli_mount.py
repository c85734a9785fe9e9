"""``mount`` and ``umount``, with real daemons: what they say, how they fail, how they end."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mounts
import pytest
from fuse.cli_support import Host, new_host

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="these mount as root; test_cli_user does as a user"),
]


@pytest.fixture
def host() -> Iterator[Host]:
    with new_host() as made:
        yield made


def test_background_returns_when_the_mount_is_usable_and_umount_when_all_is_durable(host: Host) -> None:
    done = host.run("mount", host.home, "--agent", "a", "--execution", "e1", "--background")
    assert done.returncode == 0, done.stderr
    assert f"ready: {host.home} (agent a, execution e1) in the background, pid " in done.stdout
    (host.home / "shared/notes").write_text("remember")
    done = host.run("umount", host.home)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"unmounted {host.home}: everything is durable" in done.stdout
    assert "snapshot 1 holds 1 file" in done.stdout
    assert not host.registry.is_served(host.home)
    assert "everything is durable" in host.log()
    host.mount(execution="e2")
    assert (host.home / "shared/notes").read_text() == "remember"
    assert os.listdir(host.home / "workspace") == []


def test_the_daemon_in_the_background_keeps_nothing_of_its_starter(host: Host) -> None:
    pid = host.mount()
    process = Path(f"/proc/{pid}")
    assert os.readlink(process / "cwd") == "/"
    assert os.readlink(process / "fd/0") == "/dev/null"
    assert (
        os.readlink(process / "fd/1") == os.readlink(process / "fd/2") == f"{host.state}/homes/e1/daemon.log"
    )
    assert os.getsid(pid) == pid
    assert (host.state / "homes/e1/daemon.log").stat().st_mode & 0o777 == 0o600


def test_the_foreground_gives_a_short_honest_account(host: Host) -> None:
    process = host.start("mount", host.home, "--agent", "a", "--execution", "e1")
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(3)]
    assert "no snapshot yet" in said[0]
    assert said[1] == f"ready: {host.home} (agent a, execution e1), pid {process.pid}\n"
    assert "agentfuse umount" in said[2]
    (host.home / "shared/x").write_text("12345")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "snapshot 1 holds 1 file, 5 B" in out
    assert out.endswith("everything is durable\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_mount_with_a_flush(host: Host, number: signal.Signals) -> None:
    pid = host.mount()
    (host.home / "shared/x").write_text("12345")
    os.kill(pid, number)
    assert host.registry.wait_until_released(host.home, timeout_s=60)
    assert "snapshot 1 holds 1 file" in host.log()


def test_a_reader_that_leaves_does_not_end_the_mount(host: Host) -> None:
    process = host.start("mount", host.home, "--agent", "a")
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        pass
    process.stdout.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_terminal_that_closes_ends_the_mount_with_a_flush(host: Host) -> None:
    ours, theirs = pty.openpty()
    process = host.start_on_terminal(theirs, "mount", host.home, "--agent", "a", "--execution", "e1")
    seen = b""
    while b"end it with" not in seen:
        seen += os.read(ours, 65536)
    (host.home / "shared/x").write_text("12345")
    os.close(ours)  # SIGHUP, and from now on every line that it says fails
    assert process.wait(60) == 0
    assert json.loads(host.run("ps", "--json").stdout) == []
    assert host.run("run", "--agent", "a", "cat", "shared/x").stdout == "12345"


@pytest.mark.parametrize("background", [(), ("--background",)], ids=["foreground", "background"])
class TestWhatCannotBeMounted:
    """Each has its exit code and a message that names the fix, once."""

    def refused(self, host: Host, background: tuple[str, ...], *arguments: object) -> tuple[int, str]:
        done = host.run("mount", *arguments, *background)
        assert "Traceback" not in done.stderr
        assert done.stderr.count("agentfuse: ") == 1, done.stderr
        assert "ready" not in done.stdout
        assert host.registry.list() == [] or not host.runtime.is_dir()
        return done.returncode, done.stderr

    def test_a_mountpoint_that_is_missing(self, host: Host, background: tuple[str, ...]) -> None:
        code, said = self.refused(host, background, host.base / "none", "--agent", "a")
        assert code == 73
        assert f"{host.base}/none does not exist\n  fix: mkdir -p {host.base}/none" in said

    def test_a_mountpoint_that_is_a_file(self, host: Host, background: tuple[str, ...]) -> None:
        code, said = self.refused(host, background, host.base / "config.toml", "--agent", "a")
        assert code == 73
        assert "is not a directory\n  fix: " in said

    def test_a_mountpoint_that_is_not_empty(self, host: Host, background: tuple[str, ...]) -> None:
        (host.home / "x").touch()
        code, said = self.refused(host, background, host.home, "--agent", "a")
        assert code == 73
        assert "is not empty" in said
        assert "  fix: " in said

    def test_a_mountpoint_of_another_filesystem(self, host: Host, background: tuple[str, ...]) -> None:
        code, said = self.refused(host, background, "/proc", "--agent", "a")
        assert code == 73
        assert "already a mount (proc)" in said

    def test_a_store_of_unknown_scheme(self, host: Host, background: tuple[str, ...]) -> None:
        code, said = self.refused(host, background, host.home, "--agent", "a", "--store", "gopher://x/y")
        assert code == 2
        assert "gopher" in said
        assert "file:///" in said

    def test_a_store_that_is_no_url(self, host: Host, background: tuple[str, ...]) -> None:
        code, said = self.refused(host, background, host.home, "--agent", "a", "--store", "/var/x")
        assert code == 78
        assert '--store: "/var/x" is not a store URL; write it like "file:///' in said

    @pytest.mark.parametrize("bad", ["a/b", "..", "a b", "x" * 300, "a\n", ""])
    @pytest.mark.parametrize("which", ["agent", "execution"])
    def test_a_bad_id(self, host: Host, background: tuple[str, ...], which: str, bad: str) -> None:
        ids = {"agent": "a", "execution": "e"} | {which: bad}
        options = [part for name, value in ids.items() for part in (f"--{name}", value)]
        code, said = self.refused(host, background, host.home, *options)
        assert code == 2
        assert f"cannot be an {which} id\n  fix: use 1 to 128 letters" in said

    def test_a_state_that_cannot_be_written(self, host: Host, background: tuple[str, ...]) -> None:
        for state in ("/proc/agentfuse", host.base / "config.toml"):
            code, said = self.refused(host, background, host.home, "--agent", "a", "--state", state)
            assert code == 69
            assert str(state) in said
            assert "--state" in said

    def test_a_read_only_state(self, host: Host, background: tuple[str, ...]) -> None:
        read_only = host.base / "ro"
        read_only.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", read_only], check=True)
        try:
            code, said = self.refused(host, background, host.home, "--agent", "a", "--state", read_only)
        finally:
            subprocess.run(["umount", "-l", read_only], check=True)
        assert code == 69
        assert "Read-only file system" in said

    def test_a_configuration_with_mistakes(self, host: Host, background: tuple[str, ...]) -> None:
        (host.base / "config.toml").write_text("xattr = true\n[regions.shared]\nbytes = 'much'\n")
        code, said = self.refused(host, background, host.home, "--agent", "a", "--mount-option", "bogus")
        assert code == 78
        assert "3 mistakes" in said
        assert "config.toml:1: xattr: there is no such key; did you mean xattrs?" in said

    def test_an_execution_of_another_agent(self, host: Host, background: tuple[str, ...]) -> None:
        host.mount(agent="b", execution="e1")
        assert host.run("umount", host.home).returncode == 0
        code, said = self.refused(host, background, host.home, "--agent", "a", "--execution", "e1")
        assert code == 2
        assert "belongs to agent b" in said

    def test_what_is_served_already(self, host: Host, background: tuple[str, ...]) -> None:
        host.mount()
        other = host.base / "other"
        other.mkdir()
        for arguments in ((host.home, "--execution", "e2"), (other, "--execution", "e1")):
            done = host.run("mount", *arguments, "--agent", "a", *background)
            assert done.returncode == 75, done.stderr
            assert "  fix: " in done.stderr
        assert host.run("umount", host.home).returncode == 0


def test_a_runtime_directory_that_somebody_prepared_is_refused(host: Host) -> None:
    host.runtime.mkdir()
    host.runtime.chmod(0o777)
    done = host.run("mount", host.home, "--agent", "a")
    assert done.returncode == 69
    assert "open to others" in done.stderr
    assert f"chmod 0700 {host.runtime}" in done.stderr


@pytest.fixture
def starting(host: Host) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A ``mount --background`` whose daemon is in the middle of its start, and the daemon's pid."""
    record = host.state / "homes/e1/home.json"
    record.parent.mkdir(parents=True)
    os.mkfifo(record)
    process = host.start("mount", host.home, "--agent", "a", "--execution", "e1", "--background")
    with open(record, "w"):  # opens when the daemon does, which then waits for what we never write
        (daemon,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield process, int(daemon)


def test_a_daemon_that_is_killed_while_it_starts_is_reported_as_that(
    host: Host, starting: tuple[subprocess.Popen[str], int]
) -> None:
    process, daemon = starting
    os.kill(daemon, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 70
    assert "the daemon was ended by SIGKILL before it was ready" in err


def test_whoever_interrupts_a_start_ends_its_daemon(
    host: Host, starting: tuple[subprocess.Popen[str], int]
) -> None:
    process, _ = starting
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not host.registry.is_served(host.home)


# --- umount


def test_two_who_unmount_at_once_are_both_told_that_all_is_durable(host: Host) -> None:
    for execution in ("e1", "e2", "e3"):
        host.mount(execution=execution)
        (host.home / "shared/x").write_text(execution)
        both = [host.start("umount", host.home) for _ in range(3)]
        said = [process.communicate(timeout=60) for process in both]
        codes = [process.returncode for process in both]
        # Who comes when everything is over finds nothing mounted: that is no failure of an unmount.
        assert set(codes) <= {0, 66}, said
        assert 0 in codes
        for code, (_, err) in zip(codes, said, strict=True):
            assert code == 0 or "nothing is mounted" in err, err


def test_a_home_can_be_unmounted_from_within(host: Host) -> None:
    host.mount()
    done = host.run("umount", ".", cwd=host.home)
    assert done.returncode == 0, done.stderr
    assert os.listdir(host.home) == []


def test_a_busy_mount_stays_and_its_holders_are_named(host: Host) -> None:
    host.mount()
    with subprocess.Popen(["sleep", "1000"], cwd=host.home / "shared") as sleeper:
        try:
            done = host.run("umount", host.home)
            assert done.returncode == 75
            assert f"{host.home} is in use by sleep (pid {sleeper.pid}, working directory)" in done.stderr
            assert f"agentfuse umount --lazy {host.home}" in done.stderr
            assert (host.home / "shared").is_dir()
            done = host.run("umount", host.home, "--lazy")
            assert done.returncode == 0, done.stderr
        finally:
            sleeper.kill()
    assert os.listdir(host.home) == []


def test_umount_gives_up_on_a_daemon_that_hangs_after_its_timeout(host: Host) -> None:
    pid = host.mount()
    os.kill(pid, signal.SIGSTOP)
    try:
        done = host.run("umount", host.home, "--timeout", "0.5")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 75
    assert "does not answer" in done.stderr
    assert "agentfuse dump" in done.stderr


def test_a_dead_mount_is_detached_and_what_it_left_is_named(host: Host) -> None:
    host.mount()
    (host.home / "shared/x").write_text("12345")
    host.kill()
    done = host.run("umount", host.home)
    assert done.returncode == 75
    assert (
        f"detached the dead mount at {host.home}: execution e1 of agent a is not in the store" in done.stderr
    )
    assert "agentfuse recover, or mounting agent a, finishes it" in done.stderr
    host.home.rmdir()  # which the kernel refuses while it is immutable
    host.home.mkdir()
    assert host.run("umount", host.home).returncode == 66
    host.mount(execution="e2")
    assert (host.home / "shared/x").read_text() == "12345"


def test_a_dead_mount_that_no_registry_knows_is_detached_too(host: Host) -> None:
    host.mount()
    host.kill()
    host.registry.withdraw(host.home)
    done = host.run("umount", host.home)
    assert done.returncode == 75
    assert "execution e1 of agent a" in done.stderr


def test_what_neither_mount_nor_registry_knows_is_opened_again(host: Host) -> None:
    host.mount()
    host.kill()
    host.registry.withdraw(host.home)
    detach = subprocess.run(["umount", "-l", host.home], check=False)  # as systemd's ExecStopPost does
    assert detach.returncode == 0
    done = host.run("umount", host.home)
    assert done.returncode == 75
    assert f"cleaned up after {host.home}: execution e1 of agent a is not in the store" in done.stderr
    host.home.rmdir()  # which the kernel refuses while it is immutable
    host.home.mkdir()
    assert host.run("umount", host.home).returncode == 66


def test_a_live_mount_of_another_registry_is_left_alone(host: Host) -> None:
    host.mount()
    other = {**host.environment, "AGENTFUSE_RUNTIME_DIR": str(host.base / "elsewhere")}
    command = [sys.executable, "-m", "agentfuse", "umount", host.home]
    done = subprocess.run(command, env=other, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert "AGENTFUSE_RUNTIME_DIR" in done.stderr
    assert (host.home / "shared").is_dir()


@pytest.mark.parametrize(
    ("path", "message"), [("home", "nothing is mounted at"), ("none", "nothing"), ("/proc", "type proc")]
)
def test_what_is_not_ours_is_not_unmounted(host: Host, path: str, message: str) -> None:
    done = host.run("umount", host.base / path)
    assert done.returncode == 66
    assert message in done.stderr
    assert "agentfuse ps" in done.stderr


def test_umount_finds_the_mount_by_relative_and_linked_paths(host: Host) -> None:
    host.mount()
    (host.base / "link").symlink_to("home")
    assert host.run("umount", "link", cwd=host.base).returncode == 0


def test_a_failed_flush_is_the_daemons_exit_code_and_message_and_the_home_stays(host: Host) -> None:
    host.mount()
    (host.home / "shared/x").write_text("12345")
    host.store.rename(host.base / "away")
    host.store.write_text("in the way")
    done = host.run("umount", host.home)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "not in the store yet" in done.stderr
    assert str(host.state / "homes/e1") in done.stderr
    host.store.unlink()
    (host.base / "away").rename(host.store)
    host.mount(execution="e2")
    assert (host.home / "shared/x").read_text() == "12345"


def test_a_client_that_is_killed_does_not_stop_the_unmount(host: Host) -> None:
    host.mount()
    (host.home / "shared/x").write_text("12345")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(host.registry.find(host.home).socket))
        client.sendall(b"POST /v1/unmount HTTP/1.1\r\nHost: x\r\n\r\n")
    assert host.registry.wait_until_released(host.home, timeout_s=60)
    mounts.eventually(lambda: "everything is durable" in host.log())  # the last that it says


def test_mount_options_do_what_they_say(host: Host) -> None:
    host.mount("--mount-option", "noexec,dev")
    program = host.home / "workspace/program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(PermissionError):
        subprocess.run([program], check=True)
    os.mknod(host.home / "workspace/null", 0o20666, os.makedev(1, 3))
    assert (host.home / "workspace/null").read_bytes() == b""
    assert host.run("umount", host.home).returncode == 0
    host.mount("--xattrs", execution="e2")
    with pytest.raises(PermissionError):
        os.mknod(host.home / "workspace/null", 0o20666, os.makedev(1, 3))
    os.setxattr(host.home / "workspace", "user.x", b"1")
    assert os.getxattr(host.home / "workspace", "user.x") == b"1"


def test_a_mount_that_another_registry_knows_is_not_taken_for_dead(host: Host) -> None:
    assert host.run("mount", host.home, "--agent", "a", "--background").returncode == 0
    own = host.environment["AGENTFUSE_RUNTIME_DIR"]
    host.environment["AGENTFUSE_RUNTIME_DIR"] = str(host.base / "other-runtime")
    done = host.run("mount", host.home, "--agent", "b", "--background")
    host.environment["AGENTFUSE_RUNTIME_DIR"] = own
    assert done.returncode == 75
    assert "already mounted by a daemon that is live" in done.stderr
    assert host.run("umount", host.home).returncode == 0


def test_what_the_daemon_needs_may_not_lie_below_its_mount(host: Host) -> None:
    done = host.run("mount", host.home, "--agent", "a", "--state", host.home / "state", "--background")
    assert done.returncode == 2
    assert "is below the mountpoint" in done.stderr


def test_an_unmount_says_that_another_namespace_still_holds_the_mount(host: Host) -> None:
    assert host.run("mount", host.home, "--agent", "a", "--background").returncode == 0
    command = ["unshare", "--mount", "sh", "-c", "echo there; exec sleep 300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"there\n"
        waiting = host.start("umount", host.home)
        assert waiting.stdout is not None
        while "another mount namespace" not in (line := waiting.stdout.readline()):
            assert line
        holder.kill()
        assert waiting.wait(60) == 0


def test_in_the_foreground_under_journald_every_line_has_a_priority_and_its_mount(host: Host) -> None:
    reader, writer = os.pipe()
    found = os.fstat(writer)
    environment = {**host.environment, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
    command = [sys.executable, "-m", "agentfuse", "mount", host.home, "--agent", "a", "--execution", "e1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as journal:
        lines = [journal.readline()]
        while "ready" not in lines[-1]:
            lines.append(journal.readline())
            assert lines[-1], lines
        process.terminate()
        lines += journal.readlines()
    assert process.wait(60) == 0
    assert all(line.startswith("<6>[a/e1] ") for line in lines), lines
    assert lines[-1] == "<6>[a/e1] everything is durable\n"
