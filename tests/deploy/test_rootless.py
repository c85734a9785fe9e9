"""An ordinary user, who mounts through fusermount3: the recipe, and ``agentfuse run --sandbox bwrap``.

On a system of a fresh Debian's: /dev/fuse is open to all, what is mounted is shared, allow_other is off.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mounts
import pytest
from ordinary import CHECKOUT, ordinary

from agentfuse.control.registry import Registry

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes a namespace in which it becomes nobody"),
]

NOBODY = 65534  # fusermount3 wants a user that has a name
RECIPE = f"{CHECKOUT}/docs/examples/deploy/rootless.sh"
PREPARE = """
set -e
mount -t tmpfs -o dev,mode=0755 none "$BASE/dev"
mknod -m 0666 "$BASE/dev/fuse" c 10 229
mount --bind "$BASE/dev/fuse" /dev/fuse
echo '# user_allow_other' >"$BASE/dev/fuse.conf"
mount --bind "$BASE/dev/fuse.conf" /etc/fuse.conf
mount --bind "$BASE" "$BASE"
[ -n "$PRIVATE" ] || mount --make-shared "$BASE"
cd "$BASE"
exec "$@"
"""
RUN = ("agentfuse", "run", "--sandbox", "bwrap", "--agent", "a", "--")
RETURNS = (
    "echo kept > shared/note; echo up; read x; n=0;"
    "until cat /home/agent/shared/note 2>/dev/null || [ $((n += 1)) = 400 ]; do sleep 0.05; done;"
    "echo after > /home/agent/shared/after"
)


@dataclass
class User:
    base: Path
    private: str = ""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "BASE": str(self.base),
            "PRIVATE": self.private,
            "HOME": str(self.base / "user"),
            "AGENTFUSE_RUNTIME_DIR": str(self.base / "user/run"),
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        way = ordinary(NOBODY, setuid=True)
        as_root, becoming = way[: way.index("setpriv")], way[way.index("setpriv") :]
        return subprocess.Popen(
            [*as_root, "sh", "-c", PREPARE, "sh", *becoming, *command],
            env=self.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *command: str) -> tuple[int, str, str]:
        process = self.start(*command)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    def kill_daemon_under(self, process: subprocess.Popen[str]) -> str:
        """Once the command is up; the execution that it served."""
        assert process.stdout
        while (line := process.stdout.readline()) != "up\n":
            assert line, process.communicate()
        registry = Registry(self.base / "user/run")
        (entry,) = registry.list()
        os.kill(entry.record.pid, signal.SIGKILL)
        return entry.record.execution


@pytest.fixture
def user() -> Iterator[User]:
    base = mounts.base_directory()
    for name in ("user", "dev"):
        (base / name).mkdir()
    os.chown(base / "user", NOBODY, NOBODY)
    yield User(base)
    runtime = base / "user/run"
    for entry in Registry(runtime).list() if runtime.exists() else []:
        if entry.alive:
            os.kill(entry.record.pid, signal.SIGKILL)
    mounts.remove_base(base)


@pytest.mark.parametrize("way", ["recipe", "run --sandbox"])
def test_an_agent_of_an_ordinary_user_has_its_home_and_nothing_else(user: User, way: str) -> None:
    command = (
        (RECIPE, "a") if way == "recipe" else ("agentfuse", "run", "--sandbox", "bwrap", "--agent", "a", "--")
    )
    (user.base / "secret").write_text("of the host")
    script = f"""
        id -u; pwd; grep CapEff /proc/self/status | cut -f2; tail -n +3 /proc/net/dev | cut -d: -f1
        for each in / /usr /home /var /run /proc {user.base}; do touch $each/x 2>&- && echo wrote $each; done
        cat {user.base}/secret 2>/dev/null; echo 'remember me' >shared/note; exit 7
    """
    code, out, err = user.run(*command, "sh", "-c", script)
    assert code == 7, err
    said = out.split()
    said = said[said.index(str(NOBODY)) :]
    assert [*said[:2], int(said[2], 16), said[3]] == [str(NOBODY), "/home/agent", 0, "lo"]
    assert "wrote" not in said and "of the host" not in out
    code, out, err = user.run(*command, "cat", "shared/note")
    assert (code, "remember me\n" in out) == (0, True), err


def test_a_killed_daemon_of_run_is_replaced_where_mounts_are_shared(user: User) -> None:
    process = user.start(*RUN, "sh", "-c", RETURNS)
    user.kill_daemon_under(process)
    out, err = process.communicate("\n", timeout=100)
    assert (process.returncode, out) == (0, "kept\n"), err
    assert "does not see that" not in err
    assert user.run(*RUN, "cat", "shared/after")[:2] == (0, "after\n")


def test_where_mounts_are_private_run_says_that_the_sandbox_has_lost_its_home(user: User) -> None:
    user.private = "yes"
    process = user.start(*RUN, "sh", "-c", "echo kept >shared/note; echo up; read x; cat shared/note")
    user.kill_daemon_under(process)
    assert process.stderr and process.stdin
    said = ""
    while "its sandbox does not see that" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.communicate("\n", timeout=100)
    assert process.returncode == 1
    assert user.run(*RUN, "cat", "shared/note")[:2] == (0, "kept\n")


def test_the_recipe_s_agent_sees_a_home_that_is_mounted_again(user: User) -> None:
    process = user.start(RECIPE, "a", "sh", "-c", RETURNS)
    execution = user.kill_daemon_under(process)
    home = f"{user.base}/user/homes/a/agent"
    registry = Registry(user.base / "user/run")
    assert registry.wait_until_released(Path(home), timeout_s=30)
    way = ordinary(NOBODY, setuid=True)
    again = ["agentfuse", "mount", home, "--agent", "a", "--execution", execution, "--background"]
    subprocess.run(
        ["nsenter", f"--mount=/proc/{process.pid}/ns/mnt", *way[way.index("setpriv") :], *again],
        env=user.environment, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    out, err = process.communicate("\n", timeout=100)
    assert process.returncode == 0 and "kept\n" in out, err
    assert user.run("agentfuse", "show", "a@latest:after")[:2] == (0, "after\n")
