"""A daemon without any privilege, for which agentfuse-mount-helper mounts and unmounts."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mounts
import pytest
from mounts import Home, wait_for_mount_change
from ordinary import UID, ordinary

from agentfuse import mount_helper

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="the helper is root's")]

HELPER = str(Path(sys.executable).with_name("agentfuse-mount-helper"))
OWN_PIDS = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "slave")
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


class Helper:
    """A running helper for the mountpoints below a shared mount, as a host has it."""

    def __init__(
        self, base: Path, prefix: tuple[str, ...] = (), program: tuple[str, ...] = (HELPER,)
    ) -> None:
        self.below = base / "homes"
        self.program = program
        self.socket = base / "mount.sock"
        self.prefix = prefix
        self.process: subprocess.Popen[str]
        (self.below / "agent").mkdir(parents=True)
        subprocess.run(["mount", "--bind", self.below, self.below], check=True)
        subprocess.run(["mount", "--make-shared", self.below], check=True)
        self.start()

    def start(self) -> None:
        asked = [f"--socket={self.socket}", f"--below={self.below}", f"--user={UID}"]
        command = [*self.prefix, *self.program, *asked]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("ready: ")

    def kill(self) -> None:
        """With every process of it, so that nobody unmounts when a daemon ends."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def home(self, *before: str) -> Home:
        """A home (not started) whose daemon asks this helper; ``before``: what its daemon is started with."""
        home = Home(mounts.base_directory(), prefix=(*before, *ordinary()))
        home.path = self.below / "agent"
        home.config.write_text(f'flush_timeout = "0s"\nmount_helper = "{self.socket}"\n')
        for each in (home.state, home.store, home.runtime):
            each.mkdir(mode=0o700)
            os.chown(each, UID, UID)
        return home


@pytest.fixture
def make_helper(scratch: Path) -> Iterator[Callable[..., Helper]]:
    made = []

    def make(*prefix: str, base: str = "", **options: Any) -> Helper:
        made.append(Helper(scratch / base, prefix, **options))
        return made[-1]

    yield make
    for each in made:
        each.kill()
        mounts.detach(each.below / "agent")
        subprocess.run(["umount", "-l", each.below], check=True)


@pytest.fixture
def helper(make_helper: Callable[..., Helper]) -> Helper:
    return make_helper()


@pytest.fixture
def home(helper: Helper) -> Iterator[Home]:
    made = helper.home()
    yield made
    made.discard()
    shutil.rmtree(made.base)


def privileges(pid: int) -> set[str]:
    """What a process may do beyond others, and whether that can change."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    held = {name for name in CAPABILITIES if int(status[name], 16)}
    return (
        held | ({"root"} if "0" in status["Uid"].split() else set()) | {f"NoNewPrivs {status['NoNewPrivs']}"}
    )


def test_a_daemon_without_privileges_serves_a_home(home: Home) -> None:
    home.start()
    assert privileges(home.pid) == {"NoNewPrivs 1"}
    (home.path / "shared" / "note").write_text("kept\n")
    os.chown(home.path / "shared" / "note", UID, UID)
    put = subprocess.run(
        [*home.prefix, mounts.AGENTFUSE, "put", str(home.path), "-", "uploads/a.txt"],
        env=home.environment, input=b"for you", check=False,
    )  # fmt: skip
    assert put.returncode == 0
    assert (home.path / "uploads" / "a.txt").read_text() == "for you"
    with pytest.raises(PermissionError):
        (home.path / ".agentfuse" / "mine").touch()
    home.umount()
    home.start(fresh=True)
    assert (home.path / "shared" / "note").read_text() == "kept\n"
    doctor = home.agentfuse("doctor", "--config", str(home.config), "--state", str(home.state))
    assert f"{home.base.name}" in doctor.stdout and "listens to this user" in doctor.stdout, doctor.stdout
    assert doctor.returncode == 0, doctor.stdout
    assert home.signal(signal.SIGTERM) == 0
    assert not home.is_mounted()


def test_a_killed_daemons_mount_is_taken_away_and_comes_back(home: Home) -> None:
    home.start()
    (home.path / "workspace" / "note").write_text("still here")
    home.kill()
    wait_for_mount_change(lambda: not home.is_mounted())
    refused = subprocess.run([*ordinary(), "touch", home.path / "x"], capture_output=True, check=False)
    assert refused.returncode != 0
    assert os.listdir(home.path) == []
    home.start()
    assert (home.path / "workspace" / "note").read_text() == "still here"
    home.umount()


def test_a_helper_that_is_started_anew_unmounts_what_it_did_not_mount(helper: Helper, home: Home) -> None:
    home.start()
    helper.kill()
    (home.path / "workspace" / "note").write_text("nobody missed it")
    left = home.agentfuse("umount", str(home.path))
    assert (left.returncode, home.is_mounted()) == (69, True), left.stderr
    assert f"--socket {helper.socket}" in left.stderr
    doctor = home.agentfuse("doctor", "--config", str(home.config), "--state", str(home.state))
    assert doctor.returncode == 69 and "fix: start agentfuse-mount-helper" in doctor.stdout, doctor.stdout
    helper.start()
    home.umount()


def test_a_daemon_in_a_pid_namespace_of_its_own_knows_its_doors(helper: Helper) -> None:
    home = helper.home(*OWN_PIDS)
    try:
        home.start()
        assert home.status()["pid"] < 100
        (home.base / "a.txt").write_text("through a door")
        put = home.agentfuse("put", str(home.path), str(home.base / "a.txt"), "uploads/")
        assert put.returncode == 0, put.stderr
        assert (home.path / "uploads" / "a.txt").read_text() == "through a door"
        home.umount()
    finally:
        home.discard()
        shutil.rmtree(home.base)


def test_a_daemon_whose_processes_the_helper_cannot_see_is_refused(
    make_helper: Callable[..., Helper],
) -> None:
    home = make_helper(*OWN_PIDS).home()
    done = subprocess.run(
        home.mount_command(), env=home.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 73, done.stderr
    assert "cannot be seen from the helper's PID namespace" in done.stderr
    assert "run both in one PID namespace" in done.stderr
    assert not home.is_mounted()
    shutil.rmtree(home.base)


def test_doctor_tries_the_helper_at_the_mountpoint(make_helper: Callable[..., Helper], scratch: Path) -> None:
    home = make_helper(*OWN_PIDS, base="apart").home()
    words = ("doctor", str(home.path), "--config", str(home.config), "--state", str(home.state))
    apart = home.agentfuse(*words)
    assert apart.returncode == 69 and "run both in one PID namespace" in apart.stdout, apart.stdout
    home.discard()
    home = make_helper(base="beside").home()
    words = ("doctor", str(home.path), "--config", str(home.config), "--state", str(home.state))
    beside = home.agentfuse(*words)
    assert beside.returncode == 0 and f"mounted at {home.path} and took it away" in beside.stdout, (
        beside.stdout
    )
    assert not home.is_mounted()
    home.start()
    home.umount()


ASK = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
    channel.connect(sys.argv[1])
    for line in sys.argv[2:]:
        with open("/proc/self/ns/pid") as namespace:
            socket.send_fds(channel, [line.encode("utf-8", "surrogateescape")], [namespace.fileno()])
        answer, fds, _, _ = socket.recv_fds(channel, 65536, 1)
        print(answer.decode() or "{}", len(fds))
"""


def ask(helper: Helper, *requests: object, uid: int = UID) -> list[tuple[str, int]]:
    """What the helper says to a user: (what it does not do, or "", and how many descriptors came)."""
    texts = [each if isinstance(each, str) else json.dumps(each) for each in requests]
    command = [*ordinary(uid), sys.executable, "-c", ASK, str(helper.socket), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition(" ") for line in done.stdout.splitlines()]
    return [(json.loads(answer).get("what", ""), int(count)) for answer, _, count in lines]


def mounting(path: Path | str) -> dict[str, object]:
    return {"do": "mount", "path": str(path), "noexec": False}


def test_the_helper_mounts_only_where_it_was_told(helper: Helper, scratch: Path) -> None:
    outside = scratch / "outside"
    outside.mkdir()
    (helper.below / "link").symlink_to(outside)
    (helper.below / "full").mkdir()
    (helper.below / "full" / "file").touch()
    (helper.below / "other").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", helper.below / "other"], check=True)
    asked = [
        *(outside, f"{helper.below}/../outside", f"{helper.below}/link", f"{helper.below}/link/x"),
        *(helper.below, "/", "", f"{helper.below}x", f"{helper.below}/a\0b", "homes/agent"),
        *(
            helper.below / "full",
            helper.below / "full" / "file",
            helper.below / "missing",
            helper.below / "other",
        ),
    ]
    before = mounts.mountpoints_below(scratch)
    answers = ask(helper, *map(mounting, asked))
    assert all(what and not count for what, count in answers), answers
    assert mounts.mountpoints_below(scratch) == before
    subprocess.run(["umount", helper.below / "other"], check=True)


def test_the_helper_survives_whatever_it_is_sent(helper: Helper) -> None:
    nothing = [
        "",
        "{",
        "[]",
        "null",
        '{"do": "mount"}',
        '{"do": 1}',
        '{"do": "unmount", "path": 3, "lazy": 1}',
    ]
    answers = ask(helper, *nothing[1:], {"do": "mount", "path": "x" * 10_000, "noexec": 0})
    assert all(what for what, _ in answers), answers
    assert helper.process.poll() is None


def test_the_helper_serves_nobody_else_and_unmounts_nothing_of_theirs(helper: Helper, home: Home) -> None:
    home.start()
    with pytest.raises(AssertionError, match="PermissionError"):
        ask(helper, mounting(home.path), uid=UID + 1)
    os.chmod(helper.socket, 0o666)  # not even who gets to it
    with pytest.raises(AssertionError, match=r"ConnectionResetError|BrokenPipeError|\{\} 0"):
        assert ask(helper, mounting(home.path), uid=UID + 1) != [("", 0)], "{} 0"
    home.umount()
    theirs = helper.below / "theirs"
    theirs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", theirs], check=True)
    assert ask(helper, {"do": "unmount", "path": str(theirs), "lazy": True}) == [
        ("no mount of yours is there", 0)
    ]
    subprocess.run(["umount", theirs], check=True)


class Client:
    """A connection of the user's, as a daemon has one; this process stays root."""

    def __init__(self, helper: Helper) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(60)
        os.seteuid(UID)
        try:
            self.channel.connect(str(helper.socket))
        finally:
            os.seteuid(0)
        self.device: int | None = None

    def ask(self, request: object) -> str:
        """What is not done, or nothing when it is; the descriptor that came is kept."""
        with open("/proc/self/ns/pid") as namespace:
            socket.send_fds(self.channel, [json.dumps(request).encode()], [namespace.fileno()])
        answer, fds, _, _ = socket.recv_fds(self.channel, 65536, 1)
        if fds:
            (self.device,) = fds
        return str(json.loads(answer).get("what", ""))

    def close(self) -> None:
        """As the daemon's end does it."""
        self.channel.close()
        if self.device is not None:
            os.close(self.device)


def processes_of(helper: Helper) -> list[int]:
    """Those of its connections."""
    pid = helper.process.pid
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_connection_gets_one_mount_which_goes_with_it_whatever_it_has_said(helper: Helper) -> None:
    (helper.below / "second").mkdir()
    client = Client(helper)
    assert client.ask(mounting(helper.below / "agent")) == ""
    assert "has its mount" in client.ask(mounting(helper.below / "second"))
    client.channel.send(b"[" * 16_000)  # no parser goes so deep
    client.close()
    wait_for_mount_change(lambda: mounts.mountpoints_below(helper.below) == [])


def test_a_directory_of_another_user_is_refused_and_stays_as_it_is(helper: Helper) -> None:
    theirs = helper.below / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, UID + 1, UID + 1)
    assert ask(helper, mounting(theirs)) == [("it belongs to another user", 0)]
    assert (theirs.stat().st_uid, theirs.stat().st_mode & 0o777) == (UID + 1, 0o755)


def test_a_symlink_in_the_way_to_the_directory_leads_nowhere(
    make_helper: Callable[..., Helper], scratch: Path
) -> None:
    (scratch / "outside" / "homes" / "agent").mkdir(parents=True)
    helper = make_helper(base="way")
    (scratch / "way").rename(scratch / "moved")  # as its owner could
    (scratch / "way").symlink_to(scratch / "outside")
    helper.socket = scratch / "moved" / helper.socket.name
    client = Client(helper)
    refused = client.ask(mounting(helper.below / "agent"))
    client.close()
    (scratch / "way").unlink()
    (scratch / "moved").rename(scratch / "way")
    assert "symbolic links" in refused or "Not a directory" in refused, refused


def test_a_late_clean_up_takes_away_no_other_mount_at_the_same_path(helper: Helper) -> None:
    path = helper.below / "agent"
    first = Client(helper)
    assert first.ask(mounting(path)) == ""
    (late,) = processes_of(helper)
    os.kill(late, signal.SIGSTOP)
    first.close()
    between = Client(helper)
    assert between.ask({"do": "unmount", "path": str(path), "lazy": True}) == ""
    between.close()
    second = Client(helper)
    said: list[str] = []
    asking = threading.Thread(target=lambda: said.append(second.ask(mounting(path))))
    asking.start()
    asking.join(0.5)
    ended = os.pidfd_open(late)
    os.kill(late, signal.SIGCONT)
    select.select([ended], [], [], 60)
    os.close(ended)
    asking.join()
    assert said == [""]
    assert mounts.mountpoints_below(helper.below) == [path]
    second.close()
    wait_for_mount_change(lambda: mounts.mountpoints_below(helper.below) == [])


def test_there_are_no_more_connections_than_a_host_can_bear(make_helper: Callable[..., Helper]) -> None:
    few = "import agentfuse.mount_helper as helper; helper._MOST = 2; helper.main()"
    helper = make_helper(program=(sys.executable, "-c", few))
    unmounting = {"do": "unmount", "path": str(helper.below / "agent"), "lazy": True}
    first, second = Client(helper), Client(helper)
    for each in (first, second):
        assert each.ask(unmounting) == "no mount of yours is there"
    third = Client(helper)
    assert third.channel.recv(1) == b""
    third.close()
    first.close()
    mounts.eventually(lambda: len(processes_of(helper)) == 1)
    again = Client(helper)
    assert again.ask(unmounting) == "no mount of yours is there"
    again.close()
    second.close()


def test_who_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_helper, "_PATIENCE_S", 0.05)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        mount_helper.Connection(theirs, "/srv", UID, UID).serve()


def test_a_second_helper_does_not_take_the_socket_away(helper: Helper) -> None:
    command = [HELPER, f"--socket={helper.socket}", f"--below={helper.below}", f"--user={UID}"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (second.returncode, "another helper listens there" in second.stderr) == (2, True), second.stderr
    client = Client(helper)
    assert client.ask({"do": "nothing"}) == "no request"
    client.close()
