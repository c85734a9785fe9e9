"""Options of systemd units that hide a mount from the host, while the start succeeds, or forbid it.

By ``systemctl show``, which has what drop-ins add and what options imply, whether the unit runs or not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

from agentfuse.doctor import MIN_DESCRIPTORS, Finding
from agentfuse.errors import EnvironmentProblem, NotFoundError

# Each gives the service a mount namespace of its own (exec_needs_mount_namespace() of systemd 252), from
# which nothing comes back to the host, whatever MountFlags= says.
HIDING = (
    *("PrivateMounts", "PrivateTmp", "PrivateDevices", "PrivateIPC", "ProtectSystem", "ProtectHome"),
    *(
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "ProtectProc",
    ),
    *("ProcSubset", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths"),
    *(
        "TemporaryFileSystem",
        "BindPaths",
        "BindReadOnlyPaths",
        "LogNamespace",
        "MountFlags",
        "IPCNamespacePath",
    ),
    *("RootDirectory", "RootImage", "MountImages", "ExtensionImages"),
)
_HARMLESS = {"", "no", "default", "all", "shared", "~"}
_EMPTIED = ("Paths", "FileSystem", "Images", "Image", "Directory", "Path", "Namespace", "Flags")
# With User=, each of them implies NoNewPrivileges (systemd.exec(5)).
_NO_NEW_PRIVILEGES = (
    *("NoNewPrivileges", "SystemCallFilter", "SystemCallArchitectures", "RestrictAddressFamilies"),
    *(
        "RestrictNamespaces",
        "PrivateDevices",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
    ),
    *("ProtectClock", "MemoryDenyWriteExecute", "RestrictRealtime", "RestrictSUIDSGID", "DynamicUser"),
    *("LockPersonality", "ProtectHostname"),
)
_OTHERS = (
    *("Id", "LoadState", "ExecStart", "Environment", "User", "DynamicUser", "PrivateUsers"),
    *("CapabilityBoundingSet", "DevicePolicy", "DeviceAllow", "LimitNOFILE"),
)
_SHOWN = ",".join(dict.fromkeys((*_OTHERS, *HIDING, *_NO_NEW_PRIVILEGES)))
_CAPABILITIES = "CapabilityBoundingSet=CAP_SYS_ADMIN CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID"
_DEADLINE_S = 15
Unit = dict[str, str]


def units(names: list[str]) -> Iterator[Finding]:
    """What is wrong with these units, or with all units of agentfuse that there are if none is named."""
    asked = names or _ours()
    for unit in _show(asked) if asked else []:
        if unit["LoadState"] != "loaded":
            raise NotFoundError(f"there is no unit {unit['Id']}", hint="systemctl list-units --all")
        findings = list(mistakes(unit))
        yield from findings
        if not findings:
            yield Finding(unit["Id"], "ok", "nothing hides or forbids the mount")


def is_there() -> bool:
    """Whether systemd manages this machine and can be asked."""
    return os.path.isdir("/run/systemd/system") and shutil.which("systemctl") is not None


def mistakes(unit: Unit) -> Iterator[Finding]:
    """Of one unit, by its properties."""
    command = re.search(r"argv\[\]=(.*?) ;", unit["ExecStart"])
    words = [os.path.basename(word) for word in command[1].split()] if command else []
    is_helper = "agentfuse-mount-helper" in words
    if not is_helper and not {"mount", "run"} & set(words):
        return
    if "AGENTFUSE_MOUNT_HELPER=" in unit["Environment"]:
        yield from _helped(unit)
        return
    yield from _hiding(unit)
    yield from _forbidding(unit)
    if not is_helper and unit["User"] not in ("", "root", "0"):
        yield from _of_a_user(unit)
    if not is_helper and unit["LimitNOFILE"].isdecimal() and int(unit["LimitNOFILE"]) < MIN_DESCRIPTORS:
        yield _warning(
            unit, f"LimitNOFILE={unit['LimitNOFILE']}: programs in a home share them", "LimitNOFILE=65536"
        )


def _hiding(unit: Unit) -> Iterator[Finding]:
    if unit["DynamicUser"] == "yes":
        yield _failure(
            unit,
            "DynamicUser=yes hides the mount from the host, and its user may not mount",
            "DynamicUser=no",
        )
        return
    options = {name: unit[name] for name in HIDING if unit[name] not in _HARMLESS}
    if options:
        yield _failure(
            unit,
            "hides the mount from the host, though the start succeeds: "
            + " ".join(f"{name}={value}" for name, value in options.items()),
            " ".join(f"{name}={_neutral(name)}" for name in options),
            "; agentfuse-unprivileged@ may have them",
        )


def _forbidding(unit: Unit) -> Iterator[Finding]:
    if unit["PrivateUsers"] == "yes":
        yield _failure(unit, "PrivateUsers=yes: the kernel refuses to mount", "PrivateUsers=no")
    if "cap_sys_admin" not in unit["CapabilityBoundingSet"].split():
        yield _failure(
            unit,
            "CapabilityBoundingSet= is without CAP_SYS_ADMIN, which mounts",
            _CAPABILITIES,
        )
    calls = unit["SystemCallFilter"]
    if calls and ("mount" in calls.removeprefix("~").split()) == calls.startswith("~"):
        yield _failure(unit, "SystemCallFilter= is without mount(2)", "SystemCallFilter=@mount")
    closed = unit["DevicePolicy"] in ("closed", "strict") or unit["DeviceAllow"]
    if closed and not re.search(r"(/dev/fuse|char-misc|char-\*) rw", unit["DeviceAllow"]):
        yield _failure(
            unit,
            f"DevicePolicy={unit['DevicePolicy']} without /dev/fuse",
            "DeviceAllow=/dev/fuse rw",
        )


def _of_a_user(unit: Unit) -> Iterator[Finding]:
    """An ordinary user mounts by fusermount3, which is setuid."""
    options = [name for name in _NO_NEW_PRIVILEGES if unit[name] not in _HARMLESS]
    if options:
        yield _failure(
            unit,
            f"fusermount3 cannot become root for User={unit['User']}: "
            f"NoNewPrivileges is on, by {', '.join(options)}",
            "User=root",
            "; or use agentfuse-unprivileged@, for which a helper mounts",
        )
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        yield _failure(
            unit,
            f"/dev/fuse may not be opened by User={unit['User']}",
            "User=root",
            "; or chmod 0666 /dev/fuse, as distributions have it",
        )


def _helped(unit: Unit) -> Iterator[Finding]:
    """A daemon for which the helper mounts on the host: that must come into its namespace."""
    if unit["MountFlags"] == "private":
        yield _failure(
            unit, "MountFlags=private: what the helper mounts does not come into the service", "MountFlags="
        )
    if unit["PrivateUsers"] == "yes":
        yield _failure(
            unit,
            "PrivateUsers=yes: daemon and helper must be in one user namespace, or users would be mixed up",
            "PrivateUsers=no",
        )


def _failure(unit: Unit, found: str, settings: str, more: str = "") -> Finding:
    return Finding(unit["Id"], "fail", found, _fix(unit, settings) + more)


def _warning(unit: Unit, found: str, settings: str) -> Finding:
    return Finding(unit["Id"], "warn", found, _fix(unit, settings))


def _fix(unit: Unit, settings: str) -> str:
    return f"systemctl edit {unit['Id']}, with [Service] and: {settings}"


def _neutral(name: str) -> str:
    """What takes an option back."""
    if name == "ProcSubset":
        return "all"
    if name == "ProtectProc":
        return "default"
    return "" if name.endswith(_EMPTIED) else "no"


def _ours() -> list[str]:
    """The units of agentfuse by name: those that are loaded, and of each template one that need not exist."""
    loaded = _lines("list-units", "--all", "--plain", "--no-legend", "--type=service", "agentfuse*")
    files = _lines("list-unit-files", "--plain", "--no-legend", "--type=service", "agentfuse*")
    templates = [name.replace("@.", "@doctor.") for name in files]
    used = {name.partition("@")[0] for name in loaded if "@" in name}
    return sorted(
        {*loaded, *(name for name in templates if "@" not in name or name.partition("@")[0] not in used)}
    )


def _lines(*words: str) -> list[str]:
    return [line.split()[0] for line in _systemctl(*words).splitlines() if line.strip()]


def _show(names: list[str]) -> list[Unit]:
    shown = []
    for block in _systemctl("show", f"--property={_SHOWN}", "--", *names).strip().split("\n\n"):
        unit = dict.fromkeys(_SHOWN.split(","), "")
        for line in block.splitlines():
            name, _, value = line.partition("=")
            unit[name] = f"{unit[name]}; {value}" if unit.get(name) else value
        shown.append(unit)
    return shown


def _systemctl(*words: str) -> str:
    try:
        done = subprocess.run(
            ["systemctl", "--no-pager", *words],
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or error
        raise EnvironmentProblem(
            f"systemctl {words[0]} fails: {said}".strip(), hint="act as root on the host that systemd manages"
        ) from error
    return done.stdout
