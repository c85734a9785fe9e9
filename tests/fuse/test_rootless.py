"""A home mounted by an ordinary user through fusermount3, for that user alone.

/dev/fuse may be root's alone on this machine: an open node is bound over it in a mount namespace that
belongs to the test, never on the machine itself. The daemon and the agent share that namespace.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import AGENTFUSE, base_directory

pytestmark = pytest.mark.mount

UID = pwd.getpwnam("nobody").pw_uid  # fusermount3 wants a user that has a name
PROGRAM = r"""
import json, os, signal, subprocess, sys
agentfuse, base = sys.argv[1:3]
home = base + "/home"
environment = {**os.environ, "HOME": base, "AGENTFUSE_RUNTIME_DIR": base + "/run"}
common = ["--agent", "me", "--state", base + "/state"]
said = {}

def start(*extra):
    process = subprocess.Popen([agentfuse, "mount", home, *common, *extra], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready"):
            return process
    raise SystemExit("no mount: " + "".join(lines))

first = start()
said["owner"] = os.stat(home + "/workspace").st_uid
open(home + "/shared/note", "w").write("mine")
os.chmod(home + "/shared/note", 0o400)
os.mkdir(home + "/workspace/locked")
os.chmod(home + "/workspace/locked", 0)
os.chmod(home + "/workspace/locked", 0o700)
open(home + "/workspace/big", "wb").write(bytes(3_000_000))
try:
    os.chown(home + "/workspace/big", 0, 0)
except OSError as error:
    said["chown"] = error.errno
try:
    os.mknod(home + "/workspace/device", 0o20666, os.makedev(1, 3))
except OSError as error:
    said["mknod"] = error.errno
status = json.loads(subprocess.run([agentfuse, "status", home, "--json"], env=environment,
                                   capture_output=True, text=True, check=True).stdout)
said["used"] = [status["regions"]["workspace"][k] for k in ("bytes_used", "files_used")]
options = [l.split(" - ")[1] for l in open("/proc/self/mountinfo") if l.split()[4] == home]
said["allow_other"] = "allow_other" in options[0]
umount = subprocess.run([agentfuse, "umount", home], env=environment, capture_output=True, text=True)
said["umount"] = umount.returncode, umount.stderr
said["first"] = first.wait(60)
second = start()
said["note"] = open(home + "/shared/note").read()
said["mode"] = os.stat(home + "/shared/note").st_mode & 0o7777
said["workspace"] = os.listdir(home + "/workspace")
subprocess.run(["fusermount3", "-u", home], check=True)
said["second"] = second.wait(60)
third = start()
third.send_signal(signal.SIGTERM)
said["third"] = third.wait(60)
said["left"] = [l for l in open("/proc/self/mountinfo") if l.split()[4] == home]
print("RESULT " + json.dumps(said))
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory of the ordinary user's."""
    path = base_directory()
    (path / "home").mkdir()
    for each in (path, path / "home"):
        os.chown(each, UID, UID)
    yield path
    shutil.rmtree(path)


PREPARE = r"""
import os, stat, subprocess, sys, tempfile
fuse, uid, *rest = sys.argv[1:]
paths, command = rest[:rest.index("--")], rest[rest.index("--") + 1:]
def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)
def closed_ancestor(path):
    parts = path.split("/")[1:]
    for length in range(1, len(parts)):
        above = "/" + "/".join(parts[:length])
        if not os.path.exists(above):
            return None
        if not os.stat(above).st_mode & stat.S_IXOTH:
            return above
    return None
node = tempfile.mkdtemp()
mount("-t", "tmpfs", "-o", "dev,mode=0755", "none", node)
for name, minor in (("null", 3), ("urandom", 9)):
    os.mknod(node + "/" + name, 0o20666, os.makedev(1, minor))
    os.chmod(node + "/" + name, 0o666)
if fuse == "missing":
    mount("--bind", node, "/dev")
else:
    os.mknod(node + "/fuse", 0o20666, os.makedev(10, 229))
    os.chmod(node + "/fuse", 0o666)
    mount("--bind", node + "/fuse", "/dev/fuse")
if fuse == "no fusermount3":
    mount("--bind", node + "/null", subprocess.check_output(["which", "fusermount3"], text=True).strip())
# An interpreter or a checkout below a directory that is closed to the user is made reachable.
ways = {path: tempfile.mkdtemp() for path in paths if closed_ancestor(path)}
for path, aside in ways.items():
    mount("--bind", path, aside)
for path, aside in ways.items():
    while above := closed_ancestor(path):
        mount("-t", "tmpfs", "-o", "mode=0755", "none", above)
    os.makedirs(path, exist_ok=True)
    mount("--bind", aside, path)
for directory in [node, *ways.values()]:
    subprocess.run(["umount", "-l", directory], check=True)
    os.rmdir(directory)
os.setgroups([])
os.setgid(int(uid))
os.setuid(int(uid))
os.execv(command[0], command)
"""


def in_namespace(fuse: str, uid: int, *command: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command as ``uid`` in a mount namespace of its own.

    ``fuse``: "open" (anybody may use /dev/fuse), "missing", or "no fusermount3".
    """
    paths = [sys.base_prefix, str(Path(__file__).parents[2])]
    whole = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", PREPARE, fuse, str(uid)]
    return subprocess.run(
        [*whole, *paths, "--", *map(str, command)],
        env={**os.environ, **extra}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_an_ordinary_user_mounts_works_and_unmounts(place: Path) -> None:
    done = in_namespace("open", UID, sys.executable, "-c", PROGRAM, AGENTFUSE, place)
    assert done.returncode == 0, done.stdout + done.stderr
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    said = json.loads(result[-1].removeprefix("RESULT "))
    assert said["owner"] == UID
    assert said["chown"] == errno.EPERM
    assert said["mknod"] == errno.EPERM
    assert said["used"] == [3_000_000, 2]
    assert said["allow_other"] is False
    assert (said["umount"][0], said["first"], said["second"], said["third"]) == (0, 0, 0, 0), said
    assert (said["note"], said["mode"]) == ("mine", 0o400)
    assert said["workspace"] == []
    assert said["left"] == []


@pytest.mark.parametrize(
    ("fuse", "uid", "named"),
    [("no fusermount3", UID, "fusermount3"), ("missing", UID, "/dev/fuse"), ("missing", 0, "/dev/fuse")],
)
def test_what_the_machine_lacks_is_named_with_its_fix(place: Path, fuse: str, uid: int, named: str) -> None:
    command = [AGENTFUSE, "mount", place / "home", "--agent", "me", "--state", place / f"state{uid}"]
    done = in_namespace(fuse, uid, *command, AGENTFUSE_RUNTIME_DIR=f"{place}/run{uid}", HOME=str(place))
    assert done.returncode == 69, done.stdout + done.stderr
    assert named in done.stderr
    assert "fix:" in done.stderr
