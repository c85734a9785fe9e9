"""The life of the pod of docs/examples/kubernetes/agent-pod.yaml, played without Kubernetes by ``pods``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mounts
import pytest
from containers import Engine
from mounts import eventually
from networks import Namespace
from ordinary import CHECKOUT
from pods import Pod, documents, one

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="runs containers with a storage of their own"),
]

MANIFEST = Path(CHECKOUT) / "docs/examples/kubernetes/agent-pod.yaml"
STORE = "s3://memory/{}?endpoint_url=http://127.0.0.1:9000&region=us-east-1&addressing=path"
ENDS_WITH_US = ("setpriv", "--pdeathsig=KILL")
CREDENTIALS = "[default]\naws_access_key_id = test\naws_secret_access_key = test\n"
AGENT = (
    "trap 'echo last >>shared/note; exit 0' TERM; id -u; grep CapEff /proc/self/status | cut -f2;"
    "(: >/home/mine) 2>/dev/null || echo closed;"
    "echo first >>shared/note; while :; do echo x >>workspace/log; sleep 0.05; done"
)


class Store:
    """An S3 store in the pods' network. ``delay``: a file with the seconds that a request takes."""

    def __init__(self, base: Path) -> None:
        self.delay = base / "delay"
        self.network = Namespace("127.0.0.1")
        script = f"{CHECKOUT}/tests/deploy/slow_s3.py"
        ministack = Path(sys.executable).with_name("ministack")
        self.process = subprocess.Popen(
            [*self.network.prefix, *ENDS_WITH_US, sys.executable, script, ministack, self.delay],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        while self.process.stdout.readline() != "ready\n":
            assert self.process.poll() is None

    def show(self, what: str, store: str) -> str:
        """A file that the store has."""
        words = ("show", what, "--store", store, "--state", "/nonexistent")
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        command = [*self.network.prefix, mounts.AGENTFUSE, *words]
        done = subprocess.run(
            command, env={**os.environ, **keys}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    path = mounts.base_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def store(base: Path) -> Iterator[Store]:
    made = Store(base)
    yield made
    for process in (made.process, made.network.process):
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def engine(base: Path, store: Store) -> Engine:
    (base / "engine").mkdir()
    made = Engine(base / "engine")
    made.environment["NETWORK"] = f"ns:/proc/{store.network.process.pid}/ns/net"
    return made


@pytest.fixture
def make_pod(engine: Engine, scratch: Path) -> Iterator[Callable[..., Pod]]:
    """Pods of the manifest on one host, with an agent of ours; ``prefix`` is theirs in the store."""
    made: list[Pod] = []

    def make(prefix: str, agent: str = AGENT) -> Pod:
        found = documents(MANIFEST)
        spec: dict[str, Any] = one(found, "Pod")["spec"]
        spec["containers"][0]["command"] = ["sh", "-c", agent]
        config = one(found, "ConfigMap")["data"]["config.toml"]
        lines = [line for line in config.splitlines() if not line.startswith("store = ")]
        files = {
            "agentfuse-mount": {"config.toml": "\n".join([f'store = "{STORE.format(prefix)}"', *lines])},
            "agentfuse-store": {"credentials": CREDENTIALS},
        }
        made.append(Pod(engine, spec, scratch, files))
        return made[-1]

    yield make
    for pod in made:
        pod.discard()


def told(pod: Pod, took: float) -> None:
    """Show what it took; docs/deploy.md has it."""
    parts = [f"{each.spec['name']} {each.told}" for each in (*pod.mains, *pod.inits)]
    sys.stdout.write(f"ended in {took:.1f} s: {', '.join(parts)}\n")


def begin(pod: Pod) -> None:
    """Start a pod of ``AGENT`` and return when it works."""
    pod.start()
    (agent,) = pod.mains
    eventually(lambda: agent.log().count("\n") == 3)
    assert agent.log() == "1000\n0000000000000000\nclosed\n"
    log = pod.volume("state") / f"homes/{pod.uid}/tree/workspace/log"
    eventually(log.exists)


def test_a_slow_store_is_waited_for_within_the_grace(make_pod: Callable[..., Pod], store: Store) -> None:
    pod = make_pod("slow", f"seq 20 | while read n; do echo $n >shared/$n; done; {AGENT}")
    begin(pod)
    store.delay.write_text("0.3")
    told(pod, pod.end())
    store.delay.unlink()
    assert pod.inits[0].process.returncode == 0, pod.inits[0].log()
    assert "SIGKILL" not in pod.inits[0].told
    assert store.show("alice@latest:note", STORE.format("slow")) == "first\nlast\n"
    assert store.show("alice@latest:20", STORE.format("slow")) == "20\n"


def test_what_a_killed_drain_has_left_the_next_pod_brings_into_the_store(
    make_pod: Callable[..., Pod], store: Store
) -> None:
    pod = make_pod("killed")
    begin(pod)
    store.delay.write_text("5")
    told(pod, pod.end(grace_s=0.5))
    store.delay.unlink()
    assert "SIGKILL" in pod.inits[0].told
    assert mounts.mountpoints_below(pod.volume("home")) == []  # else kubelet could not remove the pod
    following = make_pod("killed")
    (home,), (agent,) = following.inits, following.mains
    begin(following)
    told(following, following.end())
    assert (agent.process.returncode, home.process.returncode) == (0, 0), home.log()
    assert home.hook.startswith("exit code 0: shared/: "), home.hook
    assert "SIGKILL" not in {**agent.told, **home.told}
    assert store.show("alice@latest:note", STORE.format("killed")) == "first\nlast\n" * 2
    assert mounts.mountpoints_below(following.volume("home")) == []


CRASHED = """
trap 'exit 0' TERM
cd /
echo kept >home/agent/workspace/kept
until [ -e tmp/gone ]; do sleep 0.05; done
(echo lost >home/agent/shared/lost) 2>/dev/null || echo refused
until [ -e tmp/back ]; do sleep 0.05; done
cat home/agent/workspace/kept
echo after >home/agent/shared/after
sleep infinity & wait
"""


def test_a_sidecar_that_is_started_again_serves_the_running_agent(
    make_pod: Callable[..., Pod], store: Store
) -> None:
    pod = make_pod("crash", CRASHED)
    (home,), (agent,) = pod.inits, pod.mains
    pod.start()
    eventually(lambda: agent.execute("test", "-e", "/home/agent/workspace/kept").returncode == 0)
    record = json.loads(home.execute("sh", "-c", "cat /run/agentfuse/*.json").stdout)
    alive = home.spec["livenessProbe"]["exec"]["command"]
    assert home.execute(*alive).returncode == 0
    home.execute("sh", "-c", f"kill -STOP {record['pid']}")
    with pytest.raises(subprocess.TimeoutExpired):
        home.execute(*alive, timeout_s=1)
    home.execute("sh", "-c", f"kill -KILL {record['pid']}")
    assert home.process.wait(30) == 128 + 9, home.log()
    assert mounts.mountpoints_below(pod.volume("home")) == []
    (pod.volume("tmp") / "gone").touch()
    eventually(lambda: "refused" in agent.log())
    began = time.monotonic()
    home.start()
    home.wait_started()
    sys.stdout.write(f"started again in {time.monotonic() - began:.1f} s\n")
    (pod.volume("tmp") / "back").touch()
    eventually(lambda: agent.log() == "refused\nkept\n")
    assert agent.process.poll() is None
    pod.end()
    assert store.show("alice@latest:after", STORE.format("crash")) == "after\n"


ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-5a4c1d5a7b10"
EXECUTE = """
import json, urllib.request
url = "http://127.0.0.1:8080/agents/v2/agents/gwen/execute"
headers = {"X-Api-Key": "a-key-for-this-test", "Content-Type": "application/json"}
request = urllib.request.Request(url, method="POST", data=b"{}", headers=headers)
print(json.load(urllib.request.urlopen(request))["executionId"])
"""


def test_a_gateway_that_is_started_again_mounts_its_homes_again(
    engine: Engine, scratch: Path, store: Store
) -> None:
    found = documents(MANIFEST.with_name("gateways.yaml"))
    config = one(found, "ConfigMap")["data"]["config.toml"].split("[[keys]]")[0]
    config = config.replace("s3://CHANGE-ME/agents?region=eu-west-1", STORE.format("gateway"))
    files = {
        "agentfuse-gateway": {"config.toml": config},
        "agentfuse-store": {"credentials": CREDENTIALS},
        "agentfuse-cluster": {"secret": "of this test only, and long enough for it"},
    }
    pod = Pod(engine, one(found, "DaemonSet")["spec"]["template"]["spec"], scratch, files)
    gateway, recover = pod.mains
    gateway.spec["env"].append({"name": "AGENTFUSE_DEV_KEY", "value": f"a-key-for-this-test:{ORGANIZATION}"})
    try:
        pod.start()
        gateway.wait_started()
        execution = gateway.execute("python3", "-c", EXECUTE).stdout.strip()
        note = pod.volume("agents") / execution / "shared/note"
        eventually(note.parent.exists)
        note.write_text("kept\n")
        gateway.kill("KILL")
        gateway.start()
        gateway.wait_started()
        eventually(lambda: os.path.exists(note))
        assert note.read_text() == "kept\n"
        eventually(lambda: "nothing is left to recover" in recover.log())
        pod.end()
        assert (gateway.process.returncode, recover.process.returncode) == (0, 0), gateway.log()
    finally:
        pod.discard()
