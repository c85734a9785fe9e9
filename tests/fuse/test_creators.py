"""Who made a file, on real mounts: told by the process that makes it, kept with the file, never forged."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Home

from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry
from agentfuse.home import marks
from agentfuse.regions import Creator

pytestmark = pytest.mark.mount

Make = Callable[..., Home]

# Makes a file: in the main thread, in another, or in another when the main one has ended.
WRITER = r"""
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

static void *make(void *path) {
    _exit(open(path, O_CREAT | O_EXCL | O_WRONLY, 0644) < 0);
}

int main(int argc, char **argv) {
    pthread_t thread;
    if (strcmp(argv[1], "main") == 0) make(argv[2]);
    if (pthread_create(&thread, NULL, make, argv[2]) != 0) return 2;
    if (strcmp(argv[1], "orphan") == 0) pthread_exit(NULL);
    pthread_join(thread, NULL);
    return 3;
}
"""
RULES = """
[[creators]]
uid = 1234
creator = "agent"

[[creators]]
uid = 1235
gid = 1236
creator = "system"

[[creators]]
exe = "{programs}/web-*/browser"
creator = "user"

[[creators]]
gid = 1237
cgroup = "{cgroup}"
creator = "environment"
"""


def creator(home: Home, path: Path) -> Creator:
    """Whose a file is, by the mark on the backing file."""
    fd = os.open(home.tree / path.relative_to(home.path), os.O_PATH | os.O_NOFOLLOW)
    try:
        return marks.read_creator(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two programs that are the same but for their path."""
    path = tmp_path_factory.mktemp("programs")
    (path / "writer.c").write_text(WRITER)
    for name in ("web-1/browser", "tool"):
        (path / name).parent.mkdir(exist_ok=True)
        subprocess.run(["gcc", "-pthread", "-o", path / name, path / "writer.c"], check=True)
    return path


@pytest.fixture(scope="module")
def cgroup() -> Iterator[tuple[Path | None, str]]:
    """A cgroup, where its processes are told of, and its path; that of this process if none can be made."""
    (own,) = (
        line.removeprefix("0::")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    )
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        with contextlib.suppress(OSError):
            if kind == "cgroup2":
                made = Path(where + own) / f"agentfuse-test-{os.getpid()}"
                made.mkdir()
                yield made / "cgroup.procs", os.path.join(own, made.name)
                made.rmdir()
                return
    yield None, own


@pytest.fixture(scope="module")
def home(make_home: Make, programs: Path, cgroup: tuple[Path | None, str]) -> Iterator[Home]:
    mounted = make_home(top=RULES.format(programs=programs, cgroup=cgroup[1])).start()
    for region in ("downloads", "uploads", "workspace"):
        (mounted.path / region).chmod(0o777)
    yield mounted
    mounted.umount()


def as_user(*ids: str) -> list[str]:
    return ["setpriv", *ids, "--clear-groups"]


# Who makes it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "expected"),
    [("downloads", "environment"), ("uploads", "user"), ("workspace", "agent"), ("shared", "agent")],
)
def test_a_region_tells_it_of_whom_no_rule_does(home: Home, region: str, expected: str) -> None:
    path = home.path / region / "default"
    path.write_text("x")
    (home.path / region / "default.d").mkdir()
    os.mknod(home.path / region / "node", 0o600 | stat.S_IFREG)
    made = [creator(home, home.path / region / name) for name in ("default", "default.d", "node")]
    assert made == [expected] * 3


def test_symlinks_and_pipes_are_the_agents_everywhere(home: Home) -> None:
    (home.path / "uploads" / "symlink").symlink_to("default")
    os.mkfifo(home.path / "uploads" / "fifo")
    with pytest.raises(OSError, match=r"not permitted|No data"):
        os.getxattr(home.tree / "uploads" / "fifo", marks.CREATOR)
    with pytest.raises(OSError, match=r"not permitted|No data"):
        os.getxattr(home.tree / "uploads" / "symlink", marks.CREATOR, follow_symlinks=False)


def test_a_uid_tells_it_in_every_region(home: Home) -> None:
    for region in ("downloads", "uploads", "workspace"):
        for ids, expected in (
            (["--reuid=1234", "--regid=1234"], "agent"),
            (["--reuid=1235", "--regid=1236"], "system"),
        ):
            path = home.path / region / f"by-{expected}"
            subprocess.run([*as_user(*ids), "touch", path], check=True)
            assert creator(home, path) == expected


def test_a_uid_without_the_gid_of_its_rule_is_not_meant(home: Home) -> None:
    path = home.path / "downloads" / "other-gid"
    subprocess.run([*as_user("--reuid=1235", "--regid=1237"), "touch", path], check=True)
    assert creator(home, path) == "environment"


@pytest.mark.parametrize("thread", ["main", "other", "orphan"])
def test_an_executable_tells_it_whichever_thread_asks_and_though_it_ends_at_once(
    home: Home, programs: Path, thread: str
) -> None:
    for program, expected in (("web-1/browser", "user"), ("tool", "agent")):
        path = home.path / "workspace" / f"{thread}-by-{expected}"
        subprocess.run([programs / program, thread, path], check=True)
        assert creator(home, path) == expected


def test_an_executable_tells_it_from_a_process_namespace_below(home: Home, programs: Path) -> None:
    path = home.path / "workspace" / "from-below"
    command = ["unshare", "--pid", "--fork", programs / "web-1/browser", "main", path]
    subprocess.run(command, check=True)
    assert creator(home, path) == "user"


def test_a_program_put_under_the_path_of_a_rule_in_a_namespace_of_its_own_is_not_meant(
    home: Home, programs: Path
) -> None:
    path = home.path / "workspace" / "forged"
    script = 'mount --bind "$0/tool" "$0/web-1/browser" && exec "$0/web-1/browser" main "$1"'
    subprocess.run(["unshare", "--mount", "sh", "-c", script, programs, path], check=True)
    assert creator(home, path) == "agent"


def test_a_program_in_the_home_itself_is_looked_at_without_waiting_for_the_home(
    home: Home, programs: Path
) -> None:
    shutil.copy(programs / "tool", home.path / "workspace" / "browser")
    path = home.path / "workspace" / "by-own-program"
    subprocess.run([home.path / "workspace" / "browser", "other", path], check=True)
    assert creator(home, path) == "agent"


def test_a_cgroup_tells_it(home: Home, cgroup: tuple[Path | None, str]) -> None:
    path = home.path / "workspace" / "in-cgroup"
    join = f"echo $$ > '{cgroup[0]}'; " if cgroup[0] else ""
    command = " ".join([*as_user("--reuid=1", "--regid=1237"), "touch", str(path)])
    subprocess.run(["sh", "-c", f"{join}exec {command}"], check=True)
    assert creator(home, path) == "environment"


# What becomes of it --------------------------------------------------------------------------------------


def test_it_goes_wherever_the_file_goes(home: Home) -> None:
    downloads, workspace = home.path / "downloads", home.path / "workspace"
    (downloads / "a").write_text("first")
    (downloads / "a").rename(downloads / "b")
    os.link(downloads / "b", downloads / "c")
    assert creator(home, downloads / "c") == "environment"
    (downloads / "c").unlink()
    (downloads / "b").rename(workspace / "moved")
    (workspace / "moved").write_text("another content")  # O_TRUNC
    assert creator(home, workspace / "moved") == "environment"
    (downloads / "d" / "e").mkdir(parents=True)
    (downloads / "d" / "e" / "f").touch()
    (downloads / "d").rename(workspace / "d")
    assert creator(home, workspace / "d") == creator(home, workspace / "d/e/f") == "environment"


def test_a_copy_is_whose_copies_and_a_replaced_file_whose_replaces_it(home: Home) -> None:
    downloads, workspace = home.path / "downloads", home.path / "workspace"
    (downloads / "original").write_text("x")
    shutil.copy(downloads / "original", workspace / "copy")
    assert creator(home, workspace / "copy") == "agent"
    (workspace / "new").write_text("y")
    (workspace / "new").replace(downloads / "original")
    assert creator(home, downloads / "original") == "agent"


def test_moving_into_a_region_makes_nothing_that_region_s(home: Home) -> None:
    (home.path / "workspace" / "mine").write_text("x")
    (home.path / "workspace" / "mine").rename(home.path / "uploads" / "mine")
    assert creator(home, home.path / "uploads" / "mine") == "agent"


def test_it_costs_no_request_and_nothing_is_asked_of_attributes(new_home: Make) -> None:
    quiet = "".join(f"[regions.{region}]\nnotify = false\n" for region in ("downloads", "uploads"))
    home = new_home(top=quiet).start()
    (home.path / "workspace" / "first").write_text("x")  # some requests the kernel makes but once
    counts = []
    for region in ("workspace", "downloads"):
        directory = home.path / region / "counted"
        directory.mkdir()
        with home.counting() as counted:
            (directory / "file").write_text("x" * 100)
            home.settled()
        counts.append(counted)
    assert creator(home, home.path / "downloads" / "counted" / "file") == "environment"
    assert counts[0] == counts[1]
    assert not {name for name in counts[0] if "xattr" in name}
    home.umount()


def test_a_killed_daemon_forgets_nobody(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "uploads" / "kept").write_text("x")
    (home.path / "downloads" / "open").write_text("x")
    home.kill()
    home.start()
    assert creator(home, home.path / "uploads" / "kept") == "user"
    assert creator(home, home.path / "downloads" / "open") == "environment"
    home.umount()


def test_another_execution_finds_it_in_memory_whose_content_is_still_away(new_home: Make) -> None:
    home = new_home().start()
    shared = home.path / "shared"
    (shared / "mine").write_text("x")
    for name in ("a", "b"):
        (home.path / "downloads" / name).write_text("page " * 1000)
        (home.path / "downloads" / name).rename(shared / name)
    home.umount()
    home.start(fresh=True)
    assert creator(home, shared / "a") == creator(home, shared / "b") == "environment"
    assert creator(home, shared / "mine") == "agent"
    assert (shared / "a").read_text() == "page " * 1000
    (shared / "a").write_text("the agent's own words")
    home.umount()
    home.start(fresh=True)
    assert creator(home, shared / "a") == creator(home, shared / "b") == "environment"
    assert (shared / "a").read_text() == "the agent's own words"
    home.umount()


def test_an_agent_with_attributes_neither_sees_nor_forges_it(new_home: Make) -> None:
    home = new_home(top="xattrs = true\n").start()
    mine, theirs = home.path / "workspace" / "mine", home.path / "uploads" / "theirs"
    mine.write_text("x")
    theirs.write_text("x")
    os.setxattr(theirs, "user.note", b"seen")
    assert os.listxattr(theirs) == ["user.note"]
    for path in (mine, theirs):
        with pytest.raises(OSError, match="No data"):
            os.getxattr(path, marks.CREATOR)
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(path, marks.CREATOR, b"system")
        with pytest.raises(OSError, match="not supported"):
            os.removexattr(path, marks.CREATOR)
    assert (creator(home, mine), creator(home, theirs)) == ("agent", "user")
    home.umount()


def test_an_agent_with_a_uid_to_itself_puts_nothing_into_uploads_as_a_person(new_home: Make) -> None:
    home = new_home(top='owner = "1234:1234"\n').start()
    for region, expected in (("uploads", "agent"), ("downloads", "environment"), ("workspace", "agent")):
        path = home.path / region / "by-agent"
        subprocess.run([*as_user("--reuid=1234", "--regid=1234"), "touch", path], check=True)
        assert creator(home, path) == expected
    (home.path / "uploads" / "by-root").touch()
    assert creator(home, home.path / "uploads" / "by-root") == "user"
    home.umount()


def test_events_tell_it_also_of_what_has_gone(home: Home) -> None:
    client = ControlClient(Registry(home.runtime).find(home.path).socket)
    since = home.status()["events"]["newest"]
    uploads, downloads = home.path / "uploads", home.path / "downloads"
    (home.path / "workspace" / "agent").write_text("x")
    (home.path / "workspace" / "agent").rename(downloads / "agent")
    (uploads / "person").write_text("x")
    told = []
    for event in client.events(since=since, follow=True):
        if event:
            told.append((event["kind"], event["path"], event["created_by"]))
            if told[-1] == ("arrived", "person", "user"):
                (downloads / "agent").unlink()
                (uploads / "person").rename(uploads / "renamed")
            elif told[-1][0] == "moved":
                (uploads / "renamed").unlink()
            elif told[-1][:2] == ("deleted", "renamed"):
                break
    assert told == [
        ("arrived", "agent", "agent"),
        ("arrived", "person", "user"),
        ("deleted", "agent", "agent"),
        ("moved", "renamed", "user"),
        ("deleted", "renamed", "user"),
    ]
