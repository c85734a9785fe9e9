"""The compose file of docs/examples/deploy, run by podman-compose; and what doctor says of containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mounts
import pytest
from containers import Engine
from ordinary import CHECKOUT

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="runs containers with a storage of their own"),
]

COMPOSE = Path(CHECKOUT) / "docs/examples/deploy/compose.yaml"
AGENT = (
    "sh -c 'echo first >/home/agent/shared/x;"
    " until [ -e /home/agent/workspace/go ]; do sleep 0.1; done 2>/dev/null;"
    " cat /home/agent/shared/x >/home/agent/shared/y; exec sleep infinity'"
)


class Containers:
    def __init__(self, base: Path) -> None:
        self.base = base
        self.engine = Engine(base)
        self.homes = base / "homes"
        self.home = self.homes / "alice/agent"
        self.home.mkdir(parents=True)
        subprocess.run(["mount", "--bind", self.homes, self.homes], check=True)
        subprocess.run(["mount", "--make-shared", self.homes], check=True)

    def run(self, *command: object, check: bool = True, **environment: str) -> str:
        """What a command says; into a file, for what it leaves running holds a pipe open."""
        said = self.base / "said"
        with said.open("w") as out:
            done = subprocess.run(
                [*map(str, command)], env=self.engine.environment | environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, timeout=100, check=False,
            )  # fmt: skip
        assert not check or done.returncode == 0, said.read_text()
        return said.read_text()

    def doctor(self, *command: object) -> dict[str, dict[str, str]]:
        """What is wrong with the propagation and with containers of ours, by its check."""
        said = self.run(*command, "--json", check=False)
        found = json.loads(said[said.index("[") :])
        return {
            each["check"]: each
            for each in found
            if each["verdict"] != "ok"
            and (each["check"] == "propagation" or str(self.homes) in each["found"])
        }

    def discard(self) -> None:
        self.run(self.engine.environment["ENGINE"], "rm", "--all", "--force", "--time=0", check=False)
        for path in reversed(mounts.mountpoints_below(self.base)):
            subprocess.run(["umount", "-l", path], check=True)
        mounts.remove_base(self.base)


@pytest.fixture
def containers() -> Iterator[Containers]:
    made = Containers(mounts.base_directory())
    try:
        yield made
    finally:
        made.discard()


def succeeds(what: Callable[[], object]) -> bool:
    """Whether the filesystem lets it."""
    try:
        what()
    except OSError:
        return False
    return True


def test_the_compose_file_brings_up_a_home_and_its_agent(containers: Containers) -> None:
    # What differs here: images that are directories, no network, an agent that is not waited for.
    image = [word.split("=", 1) for word in containers.engine.environment["IMAGE"].split() if "=" in word]
    here = {
        "x-podman.rootfs": str(containers.base / "rootfs"),
        "volumes": [value for _, value in image],
        "network_mode": "none",
    }
    override = containers.base / "override.yaml"
    override.write_text(json.dumps({"services": {"home": here, "agent": here | {"stop_signal": "SIGKILL"}}}))
    engine = containers.engine.environment["ENGINE"]
    compose = [
        sys.executable,
        "-m",
        "podman_compose",
        "--podman-path",
        engine,
        "--in-pod",
        "false",
        "-p",
        "t",
    ]
    environment = {"AGENT": "alice", "HOMES": str(containers.homes), "AGENT_COMMAND": AGENT}

    def does(*words: str) -> str:
        return containers.run(*compose, "-f", COMPOSE, "-f", override, *words, **environment)

    does("up", "-d")
    first = containers.home / "shared/x"
    mounts.eventually(lambda: first.exists() and first.read_text() == "first\n")
    assert first.stat().st_uid == 1000
    containers.run(engine, "kill", "--signal=KILL", "t_home_1")
    containers.run(engine, "wait", "t_home_1")
    containers.run(engine, "start", "t_home_1")  # restart: is the engine's own daemon's to do
    mounts.eventually(lambda: succeeds((containers.home / "workspace/go").touch))  # dead until it is mounted
    mounts.eventually((containers.home / "shared/y").exists)
    does("down")
    assert not mounts.connections(containers.home)
    store = next((containers.base / "root/volumes").glob("*/_data/store"))
    kept = containers.run(mounts.AGENTFUSE, "show", "alice@latest:y", "--store", store.as_uri())
    assert kept == "first\n"


def test_doctor_finds_a_volume_without_propagation_on_the_host_and_in_the_container(
    containers: Containers,
) -> None:
    environment = {
        "AGENTFUSE_STATE": str(containers.base / "state"),
        "AGENTFUSE_STORE": (containers.base / "store").as_uri(),
        "AGENTFUSE_RUNTIME_DIR": str(containers.base / "registry"),
        "AGENTFUSE_CONFIG": "/dev/null",
    }
    containers.engine.environment |= environment
    engine, image = (containers.engine.environment[name] for name in ("ENGINE", "IMAGE"))
    mount = (
        mounts.AGENTFUSE,
        "mount",
        containers.home,
        "--agent",
        "a",
        "--owner",
        "1000:1000",
        "--background",
    )
    for options, is_wrong in (("", True), (":rslave", False)):
        start = (
            engine,
            "run",
            "-d",
            "--rm",
            "--name=agent",
            f"--volume={containers.home.parent}:/home{options}",
        )
        containers.run(*start, *image.split(), "sleep", "infinity")
        try:
            containers.run(*mount)
            inside = containers.doctor(engine, "exec", "agent", "agentfuse", "doctor", "/home/agent")
            host = containers.doctor(mounts.AGENTFUSE, "doctor", containers.home)
            assert set(inside) == ({"propagation"} if is_wrong else set()), inside
            assert set(host) == ({"sandboxes"} if is_wrong else set()), host
            if is_wrong:
                assert "came in here without propagation" in inside["propagation"]["found"]
                assert f"--volume {containers.home.parent}:/home:rslave" in host["sandboxes"]["fix"]
                assert ":/home:rslave" in inside["propagation"]["fix"]
        finally:
            containers.run(engine, "rm", "--force", "--time=0", "agent")
            containers.run(mounts.AGENTFUSE, "umount", containers.home)
