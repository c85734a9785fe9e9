"""The agent's memory survives every way a mount can end, and the daemon's own memory stays small."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import invariants
import pytest
from mounts import AGENT_UID, AGENTFUSE, Home, connections, wait_for_mount_change
from syscalls import in_child, refused

pytestmark = pytest.mark.mount

MiB = 1024 * 1024
Make = Callable[..., Home]


def memorable(root: Path) -> None:
    """Fill a region with everything a snapshot must carry."""
    (root / "notes").mkdir()
    (root / "notes" / "today.md").write_text("remember me\n")
    (root / "empty directory").mkdir(mode=0o700)
    (root / "private").mkdir()
    (root / "private").chmod(0o2750)
    (root / "script").write_bytes(b"#!/bin/sh\necho hi\n")
    (root / "script").chmod(0o755)
    (root / "link").symlink_to("notes/today.md")
    (root / "dangling").symlink_to(b"nowhere/\xff".decode(errors="surrogateescape"))
    os.link(root / "notes" / "today.md", root / "second name")
    (root / "empty").touch()
    (root / "large").write_bytes(os.urandom(9 * MiB))
    name = os.fsencode(root) + b"/not \xfe utf-8 \n"
    with open(name, "wb") as file:
        file.write(b"bytes")
    os.utime(root / "script", ns=(1_500_000_000_123_456_789, 1_400_000_000_987_654_321))
    os.utime(root / "private", ns=(1, 1_300_000_000_000_000_001))


def remembered(root: Path) -> dict[bytes, tuple[object, ...]]:
    """What must be the same in the next execution."""
    return invariants.picture(root)


def end_by_umount(home: Home) -> None:
    home.umount()


def end_by_fusermount(home: Home) -> None:
    subprocess.run(["fusermount3", "-u", str(home.path)], check=True)
    assert home.ended() == 0


def end_by_sigterm(home: Home) -> None:
    assert home.signal(signal.SIGTERM) == 0


def end_by_sigint(home: Home) -> None:
    assert home.signal(signal.SIGINT) == 0


@pytest.mark.parametrize("end", [end_by_umount, end_by_fusermount, end_by_sigterm, end_by_sigint])
def test_memory_survives_and_the_workspace_is_new(new_home: Make, end: Callable[[Home], None]) -> None:
    home = new_home().start()
    memorable(home.path / "shared")
    (home.path / "workspace" / "draft").write_text("not kept")
    before = remembered(home.path / "shared")
    end(home)
    assert connections(home.path) == []
    home.start(fresh=True)
    assert invariants.differences(before, remembered(home.path / "shared")) == []
    assert os.listdir(home.path / "workspace") == []
    invariants.check(home)
    home.umount()


def test_memory_survives_the_end_of_a_run_and_its_exit_code_is_passed_on(new_home: Make) -> None:
    home = new_home()
    options = [
        "--agent", home.agent, "--store", home.store.as_uri(), "--state", str(home.state),
        "--config", str(home.config),
    ]  # fmt: skip
    script = 'test "$HOME" = "$PWD" && echo kept > shared/kept && echo lost > workspace/lost; exit 7'
    done = home.agentfuse("run", *options, "--", "sh", "-c", script)
    assert done.returncode == 7, done.stderr
    done = home.agentfuse("run", *options, "--", "sh", "-c", "cat shared/kept && ls workspace")
    assert (done.returncode, done.stdout) == (0, "kept\n"), done.stderr


def test_only_changes_make_a_new_snapshot(new_home: Make) -> None:
    home = new_home().start()
    snapshots = home.store / "agents" / home.agent / "shared" / "snapshots"
    (home.path / "shared" / "file").write_text("x")
    home.umount()
    first = sorted(os.listdir(snapshots))
    assert len(first) == 1
    home.start(fresh=True)
    (home.path / "shared" / "file").read_text()
    (home.path / "workspace" / "file").write_text("x")
    home.umount()
    assert sorted(os.listdir(snapshots)) == first
    home.start(fresh=True)
    (home.path / "shared" / "file").unlink()
    home.umount()
    assert len(os.listdir(snapshots)) == 2
    home.start(fresh=True)
    assert os.listdir(home.path / "shared") == []
    home.umount()


def test_5000_small_files_cost_at_most_20_objects(new_home: Make) -> None:
    home = new_home().start()
    for number in range(5000):
        (home.path / "shared" / f"{number}").write_bytes(os.urandom(1024))
    home.umount()
    objects = [path for path in (home.store / "agents" / home.agent / "objects").rglob("*") if path.is_file()]
    assert len(objects) <= 20
    home.start(fresh=True)
    assert len(os.listdir(home.path / "shared")) == 5000
    home.umount()


def test_equal_contents_are_stored_once(new_home: Make) -> None:
    home = new_home().start()
    data = os.urandom(10 * MiB)
    for number in range(4):
        (home.path / "shared" / f"{number}").write_bytes(data)
    home.umount()
    stored = sum(path.stat().st_size for path in home.store.rglob("*") if path.is_file())
    assert stored < 12 * MiB


def test_a_failed_flush_is_told_and_finished_by_the_next_start(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "shared" / "precious").write_text("keep me")
    hidden = home.store.with_name("hidden")
    home.store.rename(hidden)
    home.store.write_text("in the way")
    home.tolerated.append("not in the store yet")
    assert home.signal(signal.SIGTERM) == 75
    assert any("precious" in p.name for p in (home.tree / "shared").iterdir())
    home.store.unlink()
    hidden.rename(home.store)
    home.start(fresh=True)
    assert (home.path / "shared" / "precious").read_text() == "keep me"
    home.umount()


def test_open_files_do_not_keep_a_terminated_daemon_from_flushing(new_home: Make) -> None:
    home = new_home().start()
    with (home.path / "shared" / "open").open("w") as handle:
        handle.write("so far")
        handle.flush()
        assert home.signal(signal.SIGTERM) == 0
        with refused(errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            os.write(handle.fileno(), b"more")
        with contextlib.suppress(OSError):
            handle.close()
    home.start(fresh=True)
    assert (home.path / "shared" / "open").read_text() == "so far"
    home.umount()


def test_two_agents_do_not_see_each_other(new_home: Make) -> None:
    one, two = new_home(agent="one"), new_home(agent="two")
    two.store, two.state = one.store, one.state
    one.start()
    two.start()
    (one.path / "shared" / "mine").write_text("1")
    assert os.listdir(two.path / "shared") == []
    one.umount()
    two.umount()
    two.start(fresh=True)
    assert os.listdir(two.path / "shared") == []
    two.umount()


def test_two_executions_of_one_agent_keep_both_their_changes(new_home: Make) -> None:
    one, two = new_home(), new_home()
    two.store = one.store
    one.start()
    two.start()
    (one.path / "shared" / "from one").write_text("1")
    (two.path / "shared" / "from two").write_text("2")
    one.umount()
    two.umount()
    one.start(fresh=True)
    assert sorted(os.listdir(one.path / "shared")) == ["from one", "from two"]
    one.umount()


# One daemon --------------------------------------------------------------------------------------------


def test_a_second_daemon_on_the_same_mountpoint_is_refused(new_home: Make) -> None:
    home = new_home().start()
    second = subprocess.run(
        home.mount_command(), env=home.environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert second.returncode in {73, 75}
    assert str(home.path) in second.stderr
    (home.path / "workspace" / "alive").touch()
    home.umount()


def test_a_second_daemon_on_the_same_execution_is_refused(new_home: Make) -> None:
    home = new_home().start()
    other = new_home()
    other.state, other.store, other.runtime = home.state, home.store, home.runtime
    other.execution = home.execution
    second = subprocess.run(
        other.mount_command(), env=home.environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert second.returncode == 75
    assert home.execution in second.stderr
    assert connections(other.path) == []
    home.umount()


def test_a_stale_mount_is_recognised_and_replaced(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "workspace" / "file").write_text("x")
    home.kill()
    with refused(errno.ENOTCONN):
        os.listdir(home.path)
    assert len(connections(home.path)) == 1
    home.start()
    assert len(connections(home.path)) == 1
    assert (home.path / "workspace" / "file").read_text() == "x"
    home.umount()


def test_nothing_can_be_written_under_the_mountpoint_when_nothing_is_mounted(new_home: Make) -> None:
    home = new_home().start()
    home.umount()

    def agent() -> None:
        with refused(errno.EACCES, errno.EPERM, errno.EROFS):
            (home.path / "lost").write_text("nobody would ever see this")
        with refused(errno.EACCES, errno.EPERM, errno.EROFS):
            (home.path / "workspace").mkdir()

    in_child(agent, uid=AGENT_UID)
    assert os.listdir(home.path) == []


def test_a_background_mount_returns_when_it_is_ready_and_can_be_unmounted(new_home: Make) -> None:
    home = new_home()
    done = subprocess.run(
        home.mount_command("--background"), env=home.environment, capture_output=True, text=True,
        timeout=30, check=True,
    )  # fmt: skip
    assert "ready" in done.stdout
    (home.path / "shared" / "file").write_text("x")
    umount = home.agentfuse("umount", str(home.path))
    assert umount.returncode == 0, umount.stderr
    wait_for_mount_change(lambda: connections(home.path) == [])
    home.start(fresh=True)
    assert (home.path / "shared" / "file").read_text() == "x"
    home.umount()


def test_a_background_mount_that_fails_says_why(new_home: Make) -> None:
    home = new_home()
    home.path.rmdir()
    home.path.write_text("a file")
    done = subprocess.run(
        home.mount_command("--background"), env=home.environment, capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "directory" in done.stderr
    assert str(home.path) in done.stderr


def test_the_backing_tree_is_closed_to_the_agent(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "workspace" / "file").write_text("x")

    def agent() -> None:
        with refused(errno.EACCES):
            (home.tree / "workspace" / "file").read_text()
        with refused(errno.EACCES):
            os.listdir(home.path / "debug")

    in_child(agent, uid=AGENT_UID)
    home.umount()


def test_the_configured_owner_owns_the_regions_and_what_is_restored(new_home: Make) -> None:
    home = new_home(top=f'owner = "{AGENT_UID}:{AGENT_UID}"').start()

    def agent() -> None:
        for region in ("shared", "workspace", "downloads", "uploads"):
            (home.path / region / "mine").write_text("x")
        (home.path / ".config").mkdir()

    in_child(agent, uid=AGENT_UID)
    home.umount()
    home.start(fresh=True)
    st = (home.path / "shared" / "mine").stat()
    assert (st.st_uid, st.st_gid) == (AGENT_UID, AGENT_UID)
    in_child(lambda: (home.path / "shared" / "mine").write_text("y"), uid=AGENT_UID)
    home.umount()


# The daemon's own size ---------------------------------------------------------------------------------


def test_an_empty_home_costs_at_most_60_mb(new_home: Make) -> None:
    home = new_home().start()
    assert home.rss_bytes() <= 60 * MiB
    home.umount()


def test_50000_known_files_cost_at_most_150_mb_and_forgotten_ones_nothing(new_home: Make) -> None:
    home = new_home().start()
    top = home.path / "workspace"
    for directory in range(50):
        (top / f"{directory}").mkdir()
        for number in range(1000):
            os.close(os.open(top / f"{directory}" / f"file-{number:06}", os.O_CREAT | os.O_WRONLY))
    assert home.settled()["fuse"]["inodes_known"] >= 50_000
    peak = home.rss_bytes()
    assert peak <= 150 * MiB, f"{peak / MiB:.0f} MiB"
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2")
    deadline = time.monotonic() + 30
    while home.status()["fuse"]["inodes_known"] > 1000:
        assert time.monotonic() < deadline, "the kernel's forgets did not arrive"
    while (now := home.rss_bytes()) > 70 * MiB:
        assert time.monotonic() < deadline, f"{peak / MiB:.0f} MiB only shrank to {now / MiB:.0f}"
    home.umount()


def test_reading_and_writing_large_files_does_not_grow_the_daemon(new_home: Make) -> None:
    home = new_home().start()
    before = home.rss_bytes()
    path = home.path / "workspace" / "large"
    block = bytes(MiB)
    with path.open("wb", buffering=0) as handle:
        for _ in range(300):
            handle.write(block)
    Path("/proc/sys/vm/drop_caches").write_text("1")
    with path.open("rb", buffering=0) as handle:
        while handle.read(MiB):
            pass
    assert home.rss_bytes() - before < 30 * MiB
    home.umount()


def test_a_mount_loads_nothing_that_a_local_store_does_not_need(new_home: Make) -> None:
    home = new_home()
    home.execution = "imports"
    command = home.mount_command()
    code = (
        "import sys, atexit\n"
        "unwanted = ('boto3', 'botocore', 'fastapi', 'starlette', 'hypercorn', 'watchdog')\n"
        "def tell():\n"
        "    print('loaded:', *[name for name in unwanted if name in sys.modules])\n"
        "atexit.register(tell)\n"
        "import agentfuse.cli\n"
        "sys.argv = sys.argv[1:]\n"
        "agentfuse.cli.main()\n"
    )
    assert command[0] == AGENTFUSE
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], env=home.environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("ready"):
            process.terminate()
            break
    rest = process.stdout.read()
    assert process.wait(30) == 0
    assert "loaded:\n" in rest
    assert stat.S_ISDIR(home.path.stat().st_mode)
