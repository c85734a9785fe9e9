"""The recipes of docs/examples/deploy, run as they are there."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mounts
import pytest
from containers import Engine
from ordinary import CHECKOUT

from agentfuse.control.registry import Registry

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="runs containers with a storage of their own"),
]

RECIPES = Path(CHECKOUT) / "docs/examples/deploy"
FD_PASSING = ("SYS_ADMIN", "CHOWN", "FOWNER", "KILL", "SETUID", "SETGID", "SETPCAP")
LOOK = "id -u; grep CapEff /proc/self/status | cut -f2; cat $HOME/shared/note; echo more >> $HOME/shared/note"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    base = mounts.base_directory()
    yield Engine(base)
    mounts.remove_base(base)


@pytest.fixture
def environment(engine: Engine, scratch: Path) -> Iterator[dict[str, str]]:
    """Of a host whose homes, state and store are below one directory."""
    (scratch / "state").mkdir()
    runtime = scratch / "run"
    yield {
        **engine.environment,
        "HOMES": str(scratch / "homes"),
        "STATE": str(scratch / "state"),
        "AGENTFUSE_STATE": str(scratch / "state"),
        "AGENTFUSE_RUNTIME_DIR": str(runtime),
        "AGENTFUSE_CONFIG": "/dev/null",
    }
    # What a failed test has left running; its recipe then unmounts.
    subprocess.run([engine.environment["ENGINE"], "rm", "--all", "--force", "--time=0"], check=True)
    if runtime.exists():
        for entry in Registry(runtime).list():
            subprocess.run(["agentfuse", "umount", "--lazy", entry.record.mountpoint], check=False)
    for path in reversed(mounts.mountpoints_below(scratch)):
        subprocess.run(["umount", "-l", path], check=True)


def recipe(name: str, *words: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [RECIPES / f"{name}.sh", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def agentfuse(*words: object, environment: dict[str, str]) -> str:
    command = [mounts.AGENTFUSE, *map(str, words)]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True
    ).stdout


def remembered(environment: dict[str, str], number: int) -> str:
    return agentfuse("show", f"alice@{number}:note", environment=environment)


def test_the_daemon_on_the_host_and_the_agent_without_any_privilege(environment: dict[str, str]) -> None:
    script = "cd; echo first > shared/note; " + LOOK + "; ls debug; touch /home/x"
    done = recipe("host-daemon", "alice", "sh", "-c", script, environment=environment)
    assert "\n1000\n0000000000000000\nfirst\n" in done.stdout, done.stdout + done.stderr
    assert "Permission denied" in done.stderr
    assert done.returncode == 1  # the command's own
    assert remembered(environment, 1) == "first\nmore\n"


def test_a_running_container_sees_the_home_that_comes_back(environment: dict[str, str]) -> None:
    script = (
        "echo up; read x; n=0;"
        "until cat /home/agent/shared/note 2>/dev/null || [ $((n += 1)) = 400 ]; do sleep 0.05; done;"
        "echo after > /home/agent/shared/after; echo done"
    )
    agent = subprocess.Popen(
        [RECIPES / "host-daemon.sh", "alice", "sh", "-c", script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert agent.stdin and agent.stdout
    while (line := agent.stdout.readline()) != "up\n":
        assert line
    (entry,) = Registry(Path(environment["AGENTFUSE_RUNTIME_DIR"])).list()
    record = entry.record
    (Path(record.mountpoint) / "shared/note").write_text("kept\n")
    os.kill(record.pid, signal.SIGKILL)
    registry = Registry(Path(environment["AGENTFUSE_RUNTIME_DIR"]))
    mounts.eventually(lambda: not registry.is_served(Path(record.mountpoint)))
    again = ["--agent", "alice", "--execution", record.execution, "--owner", "1000:1000", "--background"]
    agentfuse("mount", record.mountpoint, *again, environment=environment)
    said, _ = agent.communicate("\n", timeout=60)
    assert (said.startswith("kept\ndone\n"), agent.returncode) == (True, 0), said
    assert agentfuse("show", "alice@1:after", environment=environment) == "after\n"


def test_the_daemon_in_the_container(environment: dict[str, str]) -> None:
    for expected in ("", "more\n"):
        script = "touch shared/note; " + LOOK
        done = recipe("in-container", "alice", "sh", "-ec", script, environment=environment)
        assert done.returncode == 0, done.stderr
        lines = done.stdout[done.stdout.index("1000\n") :]
        assert lines.startswith(f"1000\n0000000000000000\n{expected}"), done.stdout
    assert remembered(environment, 2) == "more\nmore\n"


def test_no_capability_at_all(environment: dict[str, str], scratch: Path) -> None:
    os.chown(scratch / "state", 1000, 1000)
    script = "touch shared/note; " + LOOK + "; cat /proc/self/uid_map"
    done = recipe("no-capabilities", "alice", "sh", "-ec", script, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["0", "1000", "1"], done.stdout  # root there is uid 1000 here
    owner = (scratch / "state/homes").stat().st_uid
    assert owner == 1000
    assert remembered(environment, 1) == "more\n"


def test_only_the_helper_is_privileged(environment: dict[str, str], engine: Engine, scratch: Path) -> None:
    homes = scratch / "homes"
    homes.mkdir()
    subprocess.run(["mount", "--bind", homes, homes], check=True)
    subprocess.run(["mount", "--make-shared", homes], check=True)
    daemon = [
        *(
            environment["ENGINE"],
            "run",
            "--rm",
            "--name",
            "daemon",
            "--device",
            "/dev/fuse",
            "--cap-drop",
            "all",
        ),
        *(word for each in FD_PASSING for word in ("--cap-add", each)),
        *(f"--volume={homes}:{homes}:rshared", f"--volume={scratch}/state:/var/lib/agentfuse"),
        *(f"--volume={RECIPES}:/recipes:ro", "--env", "EXECUTION=e1", *environment["IMAGE"].split()),
        *("sh", "/recipes/fd-passing.sh", str(homes / "agent"), "alice"),
    ]
    agent = [
        *(environment["ENGINE"], "run", "--rm", "--interactive", "--user", "1000:1000", "--cap-drop", "all"),
        *(f"--volume={homes}:/home:rslave", "--env", "HOME=/home/agent", *environment["IMAGE"].split()),
    ]
    for number in (1, 2):  # the second finds what is left of the first, which was killed
        with subprocess.Popen(daemon, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            try:
                assert running.stdout is not None
                said = ""
                while "ready: " + str(homes / "agent") not in said:
                    line = running.stdout.readline()
                    assert line, said
                    said += line
                done = subprocess.run(
                    [*agent, "sh", "-ec", "touch ~/shared/note; " + LOOK],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.stdout == "1000\n0000000000000000\n" + "more\n" * (number - 1), done.stderr
            finally:
                subprocess.run([environment["ENGINE"], "kill", "--signal=KILL", "daemon"], check=False)
