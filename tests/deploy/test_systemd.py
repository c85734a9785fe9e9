"""The units of systemd/ on a machine that is really booted: start, use, crash, hang, stop, reboot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine
from mounts import eventually, remove_base
from ordinary import CHECKOUT

pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="boots a machine"),
]

S3 = "s3://memory/here?endpoint_url=http://127.0.0.1:9000&region=us-east-1&addressing=path"
FSTAB = "execution=d1,owner=1000:1000,noexec,_netdev,nofail,x-systemd.mount-timeout=60"
SOON = "[Timer]\nOnBootSec=\nOnBootSec=1s\nAccuracySec=1ms\n"
CREDENTIALS = "[default]\naws_access_key_id=test\naws_secret_access_key=test\n"
EXPOSURE = {  # what systemd-analyze security says at most
    "agentfuse@x.service": 50,
    "agentfuse-execution@x.service": 50,
    "agentfuse-unprivileged@x.service": 20,
    "agentfuse-mount-helper.service": 45,
    "agentfuse-recover.service": 30,
    "agentfuse-gc.service": 30,
    "agentfuse-gateway.service": 30,
}
SANDBOX = (
    *("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"),
    *(
        "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--ro-bind",
        "/usr",
        "/usr",
        "--symlink",
        "usr/bin",
        "/bin",
    ),
    *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev"),
    *("--bind", "/home", "/home", "--chdir", "/home/alice", "--setenv", "HOME", "/home/alice"),
)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    base = Path(tempfile.mkdtemp(prefix="agentfuse-test-"))
    base.chmod(0o755)
    made = Machine(base)
    made.write("/etc/agentfuse/config.toml", 'owner = "agent:agent"\n')
    made.write("/etc/agentfuse/mounts/alice.env", "AGENT=alice\nMOUNTPOINT=/home/alice\n")
    made.write("/etc/agentfuse/mounts/slow.env", f"AGENT=slow\nMOUNTPOINT=/home/slow\nFLAGS=--store {S3}\n")
    made.write("/etc/agentfuse/mounts/carol.env", "AGENT=carol\nMOUNTPOINT=/srv/agentfuse/carol\n")
    if sys.base_prefix.startswith(
        ("/root/", "/home/")
    ):  # this machine's interpreter; an installed one is elsewhere
        made.write(
            "/etc/systemd/system/agentfuse-unprivileged@.service.d/x.conf", "[Service]\nProtectHome=no\n"
        )
    made.write("/etc/fstab", f"agentfuse /home/dora agentfuse agent=dora,{FSTAB} 0 0\n")
    for each in ("home/dora", "home/alice", "home/bob", "home/slow", "srv/agentfuse/carol"):
        (made.root / each).mkdir(parents=True)
    try:
        made.boot()
        made.systemctl(
            "enable", "-q", "--now", "agentfuse@alice", "agentfuse-recover.timer", "agentfuse-gc.timer"
        )
        yield made
    finally:
        made.discard()
        remove_base(base)


class Agent:
    """A shell in a sandbox of the machine, which lives through everything."""

    def __init__(self, machine: Machine) -> None:
        self.process = subprocess.Popen(
            machine.command(*SANDBOX, "sh"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def does(self, script: str) -> str:
        """What a script says there."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{script}\necho done here\n")
        self.process.stdin.flush()
        said = ""
        while not said.endswith("done here\n"):
            line = self.process.stdout.readline()
            assert line, said
            said += line
        return said.removesuffix("done here\n")


@pytest.fixture
def agent(machine: Machine) -> Iterator[Agent]:
    made = Agent(machine)
    yield made
    made.process.kill()
    made.process.communicate()


def restarts(machine: Machine, unit: str) -> int:
    return int(machine.show(unit, "NRestarts"))


def test_the_units_have_no_mistakes_and_expose_little(machine: Machine) -> None:
    verify = "systemd-analyze verify --man=no agentfuse*.timer agentfuse*.service"
    assert machine.shell(f"cd /etc/systemd/system; {verify} 2>&1") == ""
    for unit, most in EXPOSURE.items():
        file = "/etc/systemd/system/" + unit.replace("@x", "@")
        machine.run(
            "systemd-analyze", "security", "--offline=true", f"--threshold={most}", "--no-pager", file
        )
    assert machine.shell("stat -c '%U %a' /run/agentfuse/mounts /srv/agentfuse") == "root 700\nroot 755\n"
    machine.run("systemctl", "start", "agentfuse-gc", "agentfuse-recover")
    assert machine.show("agentfuse-gc", "Result") == "success"


def test_a_home_is_served_and_its_manager_knows(machine: Machine, agent: Agent) -> None:
    assert agent.does("id -u; echo hello > shared/greeting; cat shared/greeting") == "1000\nhello\n"
    assert machine.show("agentfuse@alice", "StatusText").startswith("mounted at /home/alice")
    assert "CapEff:\t00000000002000" not in machine.shell("cat /proc/1/status")
    machine.shell("echo for you > /tmp/a.txt; agentfuse put /home/alice /tmp/a.txt uploads/")
    assert (
        agent.does("cat uploads/a.txt; touch uploads/mine; rm uploads/a.txt && chmod 2775 workspace")
        == "for you\n"
    )
    assert machine.shell("stat -c %a /home/alice/workspace") == "2775\n"


def test_a_killed_daemon_comes_back_under_its_running_agent(machine: Machine, agent: Agent) -> None:
    before = restarts(machine, "agentfuse@alice")
    agent.does("exec 3> workspace/open; echo closed > shared/closed")
    machine.systemctl("kill", "--kill-whom=main", "--signal=KILL", "agentfuse@alice")
    eventually(lambda: restarts(machine, "agentfuse@alice") > before)
    eventually(lambda: machine.show("agentfuse@alice", "SubState") == "running")
    said = agent.does(
        "cat /home/alice/shared/closed; echo x >&3 || echo dead; echo back > /home/alice/shared/back"
    )
    assert said.startswith("closed\n") and said.endswith("dead\n")
    assert agent.process.poll() is None
    assert machine.shell("cat /home/alice/shared/back") == "back\n"


def test_nothing_is_written_under_the_mountpoint(machine: Machine, agent: Agent) -> None:
    agent.does("echo here > shared/here")
    machine.systemctl("stop", "agentfuse@alice")
    assert machine.show("agentfuse@alice", "Result") == "success"
    assert "not permitted" in agent.does("cd /; echo lost > /home/alice/file")
    assert "not permitted" in machine.run("touch", "/home/alice/file", check=False).stderr  # as root
    assert machine.shell("ls -A /home/alice; stat -c %a /home/alice") == "555\n"
    machine.systemctl("start", "agentfuse@alice")
    assert agent.does("cat /home/alice/shared/here") == "here\n"


def test_a_daemon_that_hangs_is_replaced(machine: Machine, agent: Agent) -> None:
    assert machine.show("agentfuse@alice", "WatchdogUSec") == "15s"
    machine.drop_in("agentfuse@alice", "WatchdogSec=2")
    machine.systemctl("restart", "agentfuse@alice")
    before = restarts(machine, "agentfuse@alice")
    agent.does("cd /home/alice; echo kept > workspace/kept")
    machine.systemctl("kill", "--kill-whom=main", "--signal=STOP", "agentfuse@alice")
    eventually(lambda: restarts(machine, "agentfuse@alice") > before)
    eventually(lambda: machine.show("agentfuse@alice", "SubState") == "running")
    assert agent.does("cat /home/alice/workspace/kept") == "kept\n"
    machine.drop_in("agentfuse@alice", "")


def test_a_stop_waits_for_a_slow_store_and_credentials_come_from_the_manager(machine: Machine) -> None:
    machine.write("/etc/agentfuse/aws-credentials", CREDENTIALS)
    machine.drop_in("agentfuse@slow", "TimeoutStopSec=2")
    ministack = Path(sys.executable).with_name("ministack")
    script = f"{CHECKOUT}/tests/deploy/slow_s3.py"
    machine.run("systemd-run", "-q", "--unit=s3", sys.executable, script, ministack, "/run/delay")
    eventually(lambda: "ready" in machine.shell("journalctl -u s3 -o cat"))
    machine.systemctl("start", "agentfuse@slow")
    machine.write("/home/slow/shared/note", "remember\n")
    machine.write("/run/delay", "1.5")
    began = time.monotonic()
    machine.systemctl("stop", "agentfuse@slow")
    assert time.monotonic() - began > 2  # longer than it may without a word
    assert machine.show("agentfuse@slow", "Result") == "success"
    machine.shell("rm /run/delay")
    credentials = "AWS_SHARED_CREDENTIALS_FILE=/etc/agentfuse/aws-credentials"
    assert machine.shell(f"{credentials} agentfuse show slow@1:note --store '{S3}'") == "remember\n"


def test_a_hidden_mount_is_a_failed_start(machine: Machine) -> None:
    machine.write("/run/agentfuse/mounts/bob.env", "AGENT=bob\nMOUNTPOINT=/home/bob\n")
    machine.drop_in("agentfuse@bob", "PrivateTmp=yes\nRestart=no")
    assert machine.run("systemctl", "start", "agentfuse@bob", check=False).returncode != 0
    machine.drop_in("agentfuse@bob", "")
    # No file says what it is.
    assert machine.run("systemctl", "start", "agentfuse@nobody", check=False).returncode != 0


def test_a_home_is_served_without_any_privilege(machine: Machine) -> None:
    unit = "agentfuse-unprivileged@carol"
    machine.systemctl("start", unit)
    status = machine.shell(f"cat /proc/{machine.show(unit, 'MainPID')}/status")
    assert re.findall(r"^Cap...:\t(\d+)$", status, re.MULTILINE) == ["0" * 16] * 5
    user = "setpriv --reuid=agentfuse --regid=agentfuse --clear-groups"
    where = (
        "AGENTFUSE_RUNTIME_DIR=/run/agentfuse-unprivileged AGENTFUSE_CONFIG=/etc/agentfuse/unprivileged.toml"
    )
    machine.write("/tmp/b.txt", "mine\n")
    machine.shell(
        f"{user} env {where} HOME=/tmp agentfuse put /srv/agentfuse/carol /tmp/b.txt uploads/;"
        f"{user} sh -c 'cd /srv/agentfuse/carol; cp uploads/b.txt shared/m'"
    )
    machine.systemctl("restart", "agentfuse-mount-helper")
    assert machine.shell("cat /srv/agentfuse/carol/shared/m") == "mine\n"
    machine.systemctl("kill", "--kill-whom=main", "--signal=KILL", unit)
    eventually(lambda: restarts(machine, unit) == 1 and machine.show(unit, "SubState") == "running")
    assert machine.shell("cat /srv/agentfuse/carol/shared/m") == "mine\n"
    machine.systemctl("stop", unit)
    assert machine.show(unit, "Result") == "success"
    assert machine.shell("ls -A /srv/agentfuse/carol") == ""


ASK = """
import json, sys, urllib.request
def ask(method, path, body=None):
    request = urllib.request.Request("http://127.0.0.1:8080/agents/v2" + path, method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"X-Asteroid-Agents-Api-Key": "a-key-for-this-test", "Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))
if len(sys.argv) == 1:
    print(ask("POST", "/agents/gwen/execute", {})["executionId"])
else:
    print(ask("GET", "/executions/" + sys.argv[1])["status"])
"""
GATEWAY_ENV = "FLAGS=--config /etc/agentfuse/gateway.toml\nAGENTFUSE_DEV_KEY=a-key-for-this-test:"
AGENT = "until [ -e workspace/go ]; do sleep 0.05; done; echo out > shared/result"
GATEWAY = f"""
owner = "agent:agent"
state = "/srv/elsewhere"
[gateway]
mounts = "/srv/mounts"
launcher = {json.dumps([*SANDBOX, "--bind", "{home}", "{home}", "--chdir", "{home}", "sh", "-c", AGENT])}
"""


def test_homes_and_launchers_are_units_that_outlive_the_gateway(machine: Machine) -> None:
    machine.write("/etc/agentfuse/gateway.toml", GATEWAY)
    organization = "3f0f9c1e-6f57-4a3e-8d5c-5a4c1d5a7b10"
    machine.write("/etc/agentfuse/gateway.env", f"{GATEWAY_ENV}{organization}\n")
    machine.systemctl("start", "agentfuse-gateway")
    execution = machine.run("/usr/bin/python3", "-c", ASK).stdout.strip()

    def status() -> str:
        return machine.run("/usr/bin/python3", "-c", ASK, execution).stdout.strip()

    units = f"agentfuse-execution@{execution}", f"agentfuse-launcher@{execution}"
    eventually(lambda: status() == "running" and machine.show(units[1], "ActiveState") == "active")
    before = [machine.show(unit, "MainPID") for unit in units]
    home = f"/srv/mounts/{execution}"
    machine.shell(f"echo mine > {home}/shared/note")
    machine.systemctl("restart", "agentfuse-gateway")
    machine.systemctl("kill", "--kill-whom=all", "--signal=KILL", "agentfuse-gateway")
    eventually(lambda: machine.show("agentfuse-gateway", "NRestarts") == "1")
    eventually(lambda: machine.show("agentfuse-gateway", "SubState") == "running")
    assert status() == "running"
    assert [machine.show(unit, "MainPID") for unit in units] == before
    machine.systemctl("stop", "agentfuse-gateway")
    assert machine.shell(f"cat {home}/shared/note; touch {home}/workspace/go") == "mine\n"
    eventually(lambda: machine.show(units[1], "ActiveState") == "inactive")
    machine.systemctl("start", "agentfuse-gateway")
    eventually(lambda: status() == "completed")
    assert [machine.show(unit, "ActiveState") for unit in units] == ["inactive"] * 2
    memory = [machine.shell(f"agentfuse show gwen@{n}:result --state /srv/elsewhere || true") for n in (1, 2)]
    assert "out\n" in memory
    assert machine.shell("ls /srv/mounts") == ""
    machine.systemctl("stop", "agentfuse-gateway")


def test_fstab_mounts_at_boot_and_by_hand(machine: Machine) -> None:
    assert machine.show("home-dora.mount", "ActiveState") == "active"
    assert machine.shell("findmnt -no FSTYPE,SOURCE /home/dora").split() == ["fuse.agentfuse", "agentfuse"]
    assert "noexec" in machine.shell("findmnt -no OPTIONS /home/dora")
    machine.write("/home/dora/shared/note", "by hand\n")
    machine.shell(
        "umount /home/dora; agentfuse show dora@1:note; ! findmnt /home/dora"
    )  # it has waited for the flush
    machine.shell("mount /home/dora; mount -a; cat /home/dora/shared/note; agentfuse df /home/dora")
    refused = machine.run("mount", "-t", "agentfuse", "agentfuse", "/mnt", "-o", "ro,agent=x", check=False)
    assert refused.returncode == 2 and "leave ro out" in refused.stderr
    machine.systemctl("stop", "home-dora.mount")
    machine.systemctl("start", "home-dora.mount")


def test_a_power_cut_loses_nothing_that_was_closed(machine: Machine) -> None:
    machine.write("/run/agentfuse/mounts/bob.env", "AGENT=bob\nMOUNTPOINT=/home/bob\n")
    machine.write("/etc/agentfuse/config.toml", 'owner = "agent:agent"\nsync_delay = "10m"\n')
    machine.write("/etc/systemd/system/agentfuse-recover.timer.d/soon.conf", SOON)
    machine.systemctl("restart", "agentfuse@alice", "agentfuse@bob")
    machine.shell("echo alice > /home/alice/shared/last; echo bob > /home/bob/shared/last")
    machine.kill()
    machine.boot()
    assert machine.shell("cat /home/alice/shared/last") == "alice\n"  # it was enabled
    eventually(lambda: machine.run("agentfuse", "show", "bob@1:last", check=False).stdout == "bob\n")
    machine.power_off()
    machine.boot()
    machine.systemctl("stop", "agentfuse@alice")
    contents = machine.shell("cat /var/lib/agentfuse/store/agents/alice/objects/*/*")
    assert "alice" in contents.splitlines()
    machine.power_off()
