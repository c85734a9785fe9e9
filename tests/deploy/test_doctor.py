"""Each mistake of a deployment is made, named by ``agentfuse doctor`` with its fix, and gone after it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mounts
import pytest
from ordinary import ALONE, ordinary

from agentfuse.control.registry import Registry

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, mounts and control groups"),
]

Finding = dict[str, str]


@dataclass
class Place:
    """A mount namespace of its own, nothing of which reaches the machine; a host's directories in it."""

    base: Path
    holder: subprocess.Popen[str]

    def __post_init__(self) -> None:
        self.parent = self.base / "homes"
        self.mountpoint = self.parent / "agent"
        self.state = self.base / "state"
        self.mountpoint.mkdir(parents=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AGENTFUSE_")},
            "AGENTFUSE_RUNTIME_DIR": str(self.base / "run"),
            "AGENTFUSE_STATE": str(self.state),
            "AGENTFUSE_STORE": (self.base / "store").as_uri(),
            "AGENTFUSE_CONFIG": "/dev/null",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def command(self, *words: object) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", "--", *map(str, words)]

    def run(self, *words: object, check: bool = True, **environment: str) -> str:
        """Run a command there; what it said."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fix(self, script: str) -> None:
        """Do what doctor said."""
        self.run("sh", "-ec", script)

    def doctor(self, *words: object, before: tuple[object, ...] = (), **environment: str) -> list[Finding]:
        """All that doctor finds wrong. ``before``: a command that runs it."""
        said = self.run(*before, "agentfuse", "doctor", *words, "--json", check=False, **environment)
        findings: list[Finding] = json.loads(said)
        assert findings, said
        return [each for each in findings if each["verdict"] != "ok" and self._is_ours(each)]

    def _is_ours(self, finding: Finding) -> bool:
        """Whether it is not about the sandbox of somebody else on this machine."""
        named = re.match(r"process (\d+) ", finding["found"])
        if named is None:
            return True
        with contextlib.suppress(OSError):  # it ended
            return os.fsencode(self.base) in Path(f"/proc/{named[1]}/environ").read_bytes()
        return False

    def mount(self, *words: object) -> None:
        self.run("agentfuse", "mount", self.mountpoint, "--agent", "a", "--background", *words)

    def open_device(self) -> None:
        """As on most systems."""
        self.run("mount", "-t", "tmpfs", "-o", "dev,mode=0755", "none", "/mnt")
        self.run("mknod", "-m", "0666", "/mnt/fuse", "c", "10", "229")
        self.run("mount", "--bind", "/mnt/fuse", "/dev/fuse")

    def share(self) -> None:
        """As the recipe for containers does."""
        self.run("mount", "--bind", self.parent, self.parent)
        self.run("mount", "--make-shared", self.parent)

    @property
    def registry(self) -> Registry:
        return Registry(self.base / "run")

    def kill(self) -> None:
        """SIGKILL the daemon."""
        os.kill(self.registry.find(self.mountpoint).record.pid, signal.SIGKILL)
        assert self.registry.wait_until_released(self.mountpoint, timeout_s=30)

    def sandbox(self, *binds: object) -> subprocess.Popen[str]:
        """An agent in bubblewrap that lives on."""
        command = ("bwrap", "--unshare-user", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin")
        libraries = ("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc")
        agent = subprocess.Popen(
            self.command(*command, *libraries, *binds, "sh", "-c", "echo up; read x"),
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert agent.stdout and agent.stdout.readline() == "up\n"
        return agent

    def discard(self) -> None:
        for entry in self.registry.list() if (self.base / "run").is_dir() else []:
            if entry.alive:
                os.kill(entry.record.pid, signal.SIGCONT)
                os.kill(entry.record.pid, signal.SIGKILL)
        self.holder.kill()
        self.holder.wait()


def end(agent: subprocess.Popen[str]) -> None:
    agent.kill()
    agent.communicate()


@pytest.fixture
def place() -> Iterator[Place]:
    base = mounts.base_directory()
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", ALONE + "echo up; read x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout and holder.stdout.readline() == "up\n"
    made = Place(base, holder)
    try:
        yield made
    finally:
        made.discard()
        mounts.remove_base(base)


def of(check: str, findings: list[Finding]) -> Finding:
    """The one finding of a check."""
    found = [each for each in findings if each["check"] == check]
    assert len(found) == 1, findings
    assert found[0]["fix"]
    return found[0]


# --- the mountpoint


def test_a_parent_that_is_not_shared_and_a_mountpoint_that_is_open(place: Place) -> None:
    found = place.doctor(place.mountpoint)
    assert {each["check"] for each in found} == {"propagation", "below the mount"}, found
    assert "not a shared mount" in of("propagation", found)["found"]
    place.fix(of("propagation", found)["fix"].partition(": ")[2])
    assert "mode 0755" in of("below the mount", found)["found"]
    place.fix(of("below the mount", found)["fix"])
    assert place.doctor(place.mountpoint) == []
    place.mount()
    assert place.doctor(place.mountpoint) == []


def test_files_that_were_written_under_the_mount(place: Place) -> None:
    place.share()
    aside = place.base / "aside"
    aside.mkdir()
    place.run("mount", "--bind", place.parent, aside)  # the directory, whatever is mounted on it
    place.run("mount", "--make-private", aside)
    place.mount()
    assert place.doctor(place.mountpoint) == []
    place.run("sh", "-c", f"cd {aside}/agent; chattr -f -i . || :; echo lost >report; chmod 0777 .")
    entries, mode = (each for each in place.doctor(place.mountpoint) if each["check"] == "below the mount")
    assert "1 entries lie in the directory" in entries["found"] and "report" in entries["found"]
    assert "mode 0777" in mode["found"]
    assert f"agentfuse umount {place.mountpoint}, move them away" in entries["fix"]
    place.run("agentfuse", "umount", place.mountpoint)
    place.run("mv", place.mountpoint / "report", place.base)
    assert "mount again, which closes it" in mode["fix"]
    place.mount()
    assert place.doctor(place.mountpoint) == []


def test_homes_on_homes_and_another_mount_on_the_home(place: Place) -> None:
    place.share()
    place.mount()
    place.run("mount", "--bind", place.mountpoint, place.mountpoint)
    found = of("stacked mounts", place.doctor())
    assert found["found"].startswith("2 homes are mounted on each other")
    place.run("mount", "-t", "tmpfs", "none", place.mountpoint)
    hides = of("mountpoint", place.doctor(place.mountpoint))
    assert "tmpfs" in hides["found"] and "hides the home" in hides["found"]
    place.fix(hides["fix"])
    place.fix(found["fix"].partition("; then mount")[0])
    assert place.registry.wait_until_released(place.mountpoint, timeout_s=30)  # it flushed
    place.mount()
    assert place.doctor(place.mountpoint) == []


def test_a_mount_in_a_namespace_of_its_daemons_own(place: Place) -> None:
    place.run("unshare", "-m", "agentfuse", "mount", place.mountpoint, "--agent", "a", "--background")
    found = of("hidden mounts", place.doctor())
    assert found["verdict"] == "fail" and "nobody else sees the home" in found["found"]
    assert "without a mount namespace of its own" in found["fix"]
    place.run("agentfuse", "umount", place.mountpoint)
    place.mount()
    assert place.doctor() == []


def test_dead_and_hung_daemons_hold_nobody_up_and_leave_work_that_is_named(place: Place) -> None:
    place.mount("--execution", "e1")
    place.run("sh", "-c", f"echo x >{place.mountpoint}/shared/x")
    pid = place.registry.find(place.mountpoint).record.pid
    os.kill(pid, signal.SIGSTOP)
    found = place.doctor(place.mountpoint, "--state", place.mountpoint / "workspace/state")
    assert f"kill -9 {pid}, then agentfuse umount {place.mountpoint}" == of("dead mounts", found)["fix"]
    state = of("state", found)
    assert "a home cannot be kept in a home" in state["found"] and "--state" in state["fix"]
    os.kill(pid, signal.SIGKILL)
    place.registry.wait_until_released(place.mountpoint, timeout_s=30)
    found = place.doctor()
    place.run("sh", "-c", of("dead mounts", found)["fix"], check=False)  # 75: not in the store yet
    assert "execution e1 of agent a is not in the store yet" in of("unflushed homes", found)["found"]
    place.fix(of("unflushed homes", found)["fix"].partition(" (")[0])
    assert place.doctor() == []
    assert place.run("agentfuse", "show", "a@latest:x") == "x\n"


# --- sandboxes, seen from the host


def test_a_sandbox_that_was_given_the_mountpoint_itself(place: Place) -> None:
    place.share()
    place.mount("--execution", "e1")
    agent = place.sandbox("--dir", "/home", "--bind", place.mountpoint, "/home/agent")
    found = of("sandboxes", place.doctor())
    assert f"was given {place.mountpoint} itself" in found["found"]
    assert f"--bind {place.parent} /home" in found["fix"]
    place.kill()
    place.mount("--execution", "e1")
    dead = [each["found"] for each in place.doctor() if "keeps a dead mount" in each["found"]]
    assert len(dead) == 1 and "/home/agent" in dead[0]
    end(agent)
    agent = place.sandbox("--bind", place.parent, "/home")
    assert place.doctor() == []
    place.kill()
    place.mount("--execution", "e1")
    assert place.doctor() == []
    end(agent)


def test_a_sandbox_without_propagation_and_one_with_the_state(place: Place) -> None:
    agent = place.sandbox("--bind", place.parent, "/home")  # the parent is private here
    place.mount("--execution", "e1")
    found = of("sandboxes", place.doctor())
    assert f"has {place.parent} without propagation" in found["found"]
    end(agent)
    place.run("agentfuse", "umount", place.mountpoint)
    assert f"mount --bind {place.parent} {place.parent} && mount --make-shared {place.parent}" in found["fix"]
    place.share()
    agent = place.sandbox("--bind", place.parent, "/home")
    place.mount("--execution", "e2")
    assert place.doctor() == []
    end(agent)
    agent = place.sandbox("--bind", place.state / "homes/e2/tree", "/home")
    found = of("sandboxes", place.doctor())
    assert found["verdict"] == "fail" and "of the state at /home" in found["found"]
    end(agent)
    assert place.doctor() == []


# --- the state


def test_a_state_that_does_not_last(place: Place) -> None:
    place.state.mkdir(mode=0o700)
    for name in ("upper", "work"):
        (place.base / name).mkdir(mode=0o700)
    layers = f"lowerdir={place.state},upperdir={place.base}/upper,workdir={place.base}/work"
    for command, lost in (
        (("-t", "tmpfs", "-o", "mode=0700", "none"), "lost when the machine ends"),
        (("-t", "overlay", "-o", layers, "none"), "lost with the container"),
    ):
        place.run("mount", *command, place.state)
        found = of("state", place.doctor())
        assert lost in found["found"] and "volume" in found["fix"]
        place.run("umount", place.state)
    assert place.doctor() == []


def test_a_low_limit_of_open_files(place: Place) -> None:
    found = of("open files", place.doctor(before=("prlimit", "--nofile=1024:1024")))
    assert "ulimit -Hn 4096" in found["fix"]
    assert place.doctor(before=("prlimit", "--nofile=4096:4096")) == []


# --- who may mount


def test_a_control_group_that_may_not_use_the_device(place: Place) -> None:
    devices = Path("/sys/fs/cgroup/devices")
    if not (devices / "devices.deny").exists():
        pytest.skip(
            "this kernel's control groups have no devices.deny; tests/deploy/test_doctor_units.py has it"
        )
    group = devices / f"agentfuse-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "devices.deny").write_text("c 10:229 rwm")
        into = ("sh", "-c", f'echo $$ >{group}/cgroup.procs; exec "$@"', "sh")
        found = of("/dev/fuse", place.doctor(before=into))
        assert "this control group may not use it" in found["found"]
        assert "--device /dev/fuse" in found["fix"] and "DeviceAllow=/dev/fuse rw" in found["fix"]
        (group / "devices.allow").write_text("c 10:229 rwm")
        assert place.doctor(before=into) == []
    finally:
        group.rmdir()


def test_a_user_namespace_without_a_mount_namespace_and_an_owner_that_it_has_not(place: Place) -> None:
    place.open_device()
    config = place.base / "config.toml"
    config.write_text('owner = "1000:1000"\n')
    found = place.doctor("--state", place.base / "s", before=("unshare", "-Ur"))
    assert "unshare -Urm" in of("mounting", found)["fix"]
    found = place.doctor(before=("unshare", "-Urm"), AGENTFUSE_CONFIG=str(config))
    assert "uid 1000 is not in this user namespace" in of("configuration", found)["found"]
    assert "leave the key out" in of("configuration", found)["found"]
    assert place.doctor(before=("unshare", "-Urm")) == []


NOBODY = 65534  # fusermount3 wants a user that has a name


@pytest.fixture
def user(place: Place) -> Callable[..., list[Finding]]:
    """Doctor as an ordinary user, whose system has everything that he needs."""
    place.fix("chown 65534:65534 " + str(place.base))
    place.open_device()
    (place.base / "fuse.conf").write_text("user_allow_other\n")
    place.run("mount", "--bind", place.base / "fuse.conf", "/etc/fuse.conf")

    def doctor(*before: object) -> list[Finding]:
        return place.doctor(before=(*ordinary(NOBODY, setuid=True), *before))

    assert doctor() == []
    return doctor


def test_a_device_that_is_roots_alone_and_others_who_are_not_let_in(
    place: Place, user: Callable[..., list[Finding]]
) -> None:
    place.run("chmod", "0600", "/dev/fuse")
    (place.base / "fuse.conf").write_text("# user_allow_other\n")
    found = user()
    place.fix(re.findall(r"chmod 0666 /dev/fuse", of("/dev/fuse", found)["fix"])[0])
    assert of("allow_other", found)["fix"].endswith("add a line user_allow_other to /etc/fuse.conf")
    (place.base / "fuse.conf").write_text("user_allow_other\n")
    assert user() == []


def test_a_fusermount_that_is_missing_or_not_setuid(place: Place, user: Callable[..., list[Finding]]) -> None:
    program = shutil.which("fusermount3")
    assert program
    place.run("cp", program, "/mnt/fusermount3")  # without the bit
    place.run("mount", "--bind", "/mnt/fusermount3", program)
    found = of("mounting", user())
    assert "it is not setuid root" in found["fix"]
    place.fix(found["fix"].partition(": ")[2])
    assert user() == []
    place.run("mount", "-o", "remount,bind,nosuid", program)
    assert "is on a filesystem that is mounted nosuid" in of("mounting", user())["fix"]
    place.run("umount", program)
    place.run("mount", "--bind", "/dev/null", program)
    assert of("mounting", user())["fix"] == "apt-get install fuse3"
    place.run("umount", program)
    assert user() == []


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (("setpriv", "--no-new-privs"), "setuid has no effect under NoNewPrivileges"),
        (("bwrap", "--unshare-user", "--dev-bind", "/", "/"), "setuid has no effect under NoNewPrivileges"),
        (("unshare", "--user"), "setuid root has no effect in this user namespace"),
    ],
)
def test_a_user_for_whom_setuid_has_no_effect(
    user: Callable[..., list[Finding]], before: tuple[str, ...], said: str
) -> None:
    found = of("mounting", user(*before))
    assert said in found["fix"] and "unshare -Urm" in found["fix"]
    assert user(*(before if before[0] != "unshare" else ()), "unshare", "-Urm") == []
