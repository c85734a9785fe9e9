"""Mistakes in systemd units, made on a machine that is booted: named, with the drop-in that mends them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine
from mounts import remove_base

pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="boots a machine"),
]

Finding = dict[str, str]
VALUES = {
    "ProtectProc": "invisible",
    "ProcSubset": "pid",
    "LogNamespace": "x",
    "MountFlags": "private",
    **dict.fromkeys(("ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "NoExecPaths"), "/srv"),
    **dict.fromkeys(("ExecPaths", "BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem"), "/srv"),
}
SWITCHES = (
    *("PrivateMounts", "PrivateTmp", "PrivateDevices", "PrivateIPC", "ProtectSystem", "ProtectHome"),
    *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups"),
)
HIDES = {**dict.fromkeys(SWITCHES, "yes"), **VALUES}
# For a home, by root: what the kernel or systemd forbids, and what doctor says in such a service.
FORBIDS = {
    "PrivateUsers=yes": "PrivateUsers=no in a unit",
    "CapabilityBoundingSet=": "give it CAP_SYS_ADMIN",
    "SystemCallFilter=~@mount\nSystemCallErrorNumber=EPERM": "a seccomp filter forbids mount(2)",
}
# Not enforced in this container: tests/deploy/test_doctor.py has a control group that forbids the device.
UNENFORCED = "DevicePolicy=closed\nDeviceAllow="


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    base = Path(tempfile.mkdtemp(prefix="agentfuse-test-"))
    base.chmod(0o755)
    made = Machine(base)
    made.write("/etc/agentfuse/config.toml", 'owner = "agent:agent"\n')
    (made.root / "home/alice").mkdir()
    try:
        yield made.boot()
    finally:
        made.discard()
        remove_base(base)


def doctor(machine: Machine, *words: object) -> list[Finding]:
    """What is wrong."""
    said = machine.run("agentfuse", "doctor", "--json", *words, check=False).stdout
    findings: list[Finding] = json.loads(said)
    assert findings, said
    return [each for each in findings if each["verdict"] != "ok"]


def settings(finding: Finding) -> str:
    """The lines that a fix says are to be in a drop-in."""
    words = finding["fix"].partition(" and: ")[2].partition("; ")[0]
    return "\n".join(word if "=" in word else f"\\\n{word}" for word in words.split()).replace("\n\\\n", " ")


def in_services(machine: Machine, command: str, options: dict[str, str]) -> dict[str, str]:
    """What a command says in services with these options, by their names."""
    for name, lines in options.items():
        service = (
            f"Type=oneshot\nSuccessExitStatus=69\nExecStart={command}\nStandardOutput=file:/run/said-{name}"
        )
        machine.shell(f"rm -f /run/said-{name}")
        machine.write(f"/run/systemd/system/{name}.service", f"[Service]\n{service}\n{lines}\n")
    machine.systemctl("daemon-reload")
    machine.systemctl("start", *options)
    return {name: machine.shell(f"cat /run/said-{name}") for name in options}


def test_every_option_that_hides_the_mount_is_named(machine: Machine) -> None:
    look = "readlink /proc/self/ns/mnt"
    services = {name: f"{name}={value}" for name, value in HIDES.items()} | {"Nothing": ""}
    seen = in_services(machine, look, services)
    assert seen.pop("Nothing") == machine.shell("readlink /proc/1/ns/mnt")
    assert len(seen) == len(HIDES) and machine.shell("readlink /proc/1/ns/mnt") not in seen.values()
    assert doctor(machine) == []
    machine.drop_in("agentfuse@", "\n".join(f"{name}={value}" for name, value in HIDES.items()))
    (found,) = doctor(machine)
    assert found["check"] == "agentfuse@doctor.service" and found["verdict"] == "fail"
    assert {name for name in HIDES if f" {name}=" in found["found"]} == set(HIDES)
    machine.drop_in("agentfuse@", settings(found))
    assert doctor(machine) == []


@pytest.mark.parametrize("option", [*FORBIDS, UNENFORCED])
def test_an_option_that_forbids_the_mount_is_named_in_the_unit_and_in_the_service(
    machine: Machine, option: str
) -> None:
    inside = in_services(machine, "agentfuse doctor", {"inside": option})["inside"]
    assert FORBIDS.get(option, "") in inside
    machine.drop_in("agentfuse@", option)
    (found,) = doctor(machine)
    assert found["verdict"] == "fail" and option.partition("=")[0] in found["found"]
    machine.drop_in("agentfuse@", f"{option}\n{settings(found)}")
    assert doctor(machine) == []
    inside = in_services(machine, "agentfuse doctor", {"inside": f"{option}\n{settings(found)}"})["inside"]
    assert "a mount was made" in inside and "fail" not in inside, inside
    machine.drop_in("agentfuse@", "")


def test_units_of_ones_own_and_of_users(machine: Machine) -> None:
    start = ("systemd-run", "-q", "--unit=mine", "-p", "Type=notify", "-p", "StateDirectory=agentfuse")
    home = ("agentfuse", "mount", "/home/alice", "--agent", "a")
    machine.run(*start, "-p", "PrivateMounts=yes", "-p", "LimitNOFILE=1024", *home)
    (hidden,) = (each for each in doctor(machine) if each["check"] == "hidden mounts")
    assert hidden["fix"] == "agentfuse doctor --unit mine.service names the option"
    found = doctor(machine, "--unit", "mine.service")
    assert [each["verdict"] for each in found] == ["fail", "warn"]
    assert "PrivateMounts=yes" in found[0]["found"] and settings(found[0]) == "PrivateMounts=no"
    machine.systemctl("stop", "mine")
    machine.run(*start, "-p", "PrivateMounts=no", "-p", settings(found[1]), *home)
    assert doctor(machine, "--unit", "mine") == doctor(machine, "/home/alice") == []
    machine.systemctl("stop", "mine")
    for options, said in (
        (("DynamicUser=yes",), "DynamicUser=yes hides the mount"),
        (("User=agent", "MemoryDenyWriteExecute=yes"), "NoNewPrivileges is on, by MemoryDenyWriteExecute"),
        (("Environment=AGENTFUSE_MOUNT_HELPER=/run/x", "PrivateUsers=yes"), "must be in one user namespace"),
    ):
        machine.write("/run/systemd/system/other.service", "[Service]\nExecStart=" + " ".join(home))
        machine.drop_in("other", "\n".join(options))
        found = [each for each in doctor(machine, "--unit", "other") if said in each["found"]]
        assert len(found) == 1, doctor(machine, "--unit", "other")
        machine.drop_in("other", "\n".join([*options, settings(found[0])]))
        assert not [each for each in doctor(machine, "--unit", "other") if said in each["found"]]
