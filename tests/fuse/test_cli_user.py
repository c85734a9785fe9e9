"""The command line for an ordinary user, who mounts through fusermount3.

In a mount namespace of its own, because /dev/fuse must be open to all there, and the interpreter too:
neither is changed on this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import base_directory, remove_base

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes a namespace in which it becomes nobody"),
    pytest.mark.skipif(shutil.which("fusermount3") is None, reason="needs fusermount3"),
]

NOBODY = "65534"
PREPARE = """
set -e
mknod "$BASE/fuse" c 10 229
chmod 666 "$BASE/fuse"
mount --bind "$BASE/fuse" /dev/fuse
if ! setpriv --reuid $USER_ID --regid $USER_ID --clear-groups test -x "$PREFIX/bin"; then
    top=/$(echo "$PREFIX" | cut -d/ -f2)  # an interpreter in a closed home: show it alone of that home
    mkdir "$BASE/python"
    mount --bind "$PREFIX" "$BASE/python"
    mount -t tmpfs -o mode=755 none "$top"
    mkdir -p "$PREFIX"
    mount --bind "$BASE/python" "$PREFIX"
fi
cd "$HOME"
exec setpriv --reuid $USER_ID --regid $USER_ID --clear-groups sh -c "$1"
"""


@pytest.fixture
def home_of_nobody() -> Iterator[Path]:
    base = base_directory()
    (base / "user").mkdir()
    os.chown(base / "user", int(NOBODY), int(NOBODY))
    yield base / "user"
    remove_base(base)


def as_nobody(home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as an ordinary user; ``af`` is agentfuse. A failing line ends it."""
    lines = f'set -e; af() {{ {sys.executable} -m agentfuse "$@"; }}; {script}'
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "BASE": str(home.parent),
        "PREFIX": sys.base_prefix,
        "USER_ID": NOBODY,
        "AGENTFUSE_RUNTIME_DIR": str(home / "run"),
    }
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", PREPARE, "sh", lines],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_user_mounts_for_himself_alone_and_finds_his_memory_again(home_of_nobody: Path) -> None:
    done = as_nobody(
        home_of_nobody,
        "mkdir h; af mount h --agent a --background; echo remember > h/shared/x; af df h;"
        "af umount h; af run --agent a -- sh -c 'id -u; cat shared/x'; af ps",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NOBODY}\nremember\n" in done.stdout
    assert "nothing is mounted, and nothing is unflushed" in done.stdout
    assert (home_of_nobody / ".local/state/agentfuse").stat().st_mode & 0o777 == 0o700


def test_doctor_tells_a_user_what_root_need_not_know(home_of_nobody: Path) -> None:
    done = as_nobody(home_of_nobody, "af doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    mounting" in done.stdout
    assert "allow_other" in done.stdout


def test_a_user_is_told_how_he_could_mount_where_fusermount_is_of_no_use(home_of_nobody: Path) -> None:
    script = f"setpriv --no-new-privs {sys.executable} -m agentfuse doctor"
    done = as_nobody(home_of_nobody, script)
    assert done.returncode == 69
    assert "fusermount3 refuses to mount" in done.stdout
    assert "NoNewPrivileges" in done.stdout


def test_a_dead_mount_of_a_user_is_detached_by_him(home_of_nobody: Path) -> None:
    done = as_nobody(
        home_of_nobody,
        "mkdir h; af mount h --agent a --execution e --background; echo x > h/shared/x;"
        "kill -9 $(af ps --json | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p');"
        "af umount h || echo code $?; af mount h --agent a --background; cat h/shared/x; af umount h",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "code 75" in done.stdout
    assert "\nx\n" in done.stdout


def test_what_only_root_may_do_is_refused_with_a_reason(home_of_nobody: Path) -> None:
    done = as_nobody(home_of_nobody, "mkdir h; af mount h --agent a --owner 0:0 --mount-option suid")
    assert done.returncode == 78
    assert "--owner: only root can give a home to 0:0" in done.stderr
    assert '--mount-option: option "suid" is for root only' in done.stderr
