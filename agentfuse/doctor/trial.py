"""Tries a mount for real without a FUSE library: the kernel answers mount(2) before any daemon speaks."""

from __future__ import annotations

import array
import ctypes
import errno
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

from agentfuse.errors import EnvironmentProblem

_MS_NOSUID_NODEV = 2 | 4
_MNT_DETACH = 2
_CAP_SYS_ADMIN = 1 << 21
_FUSERMOUNT_DEADLINE_S = 10


def try_to_mount(directory: Path) -> None:
    """Mount a filesystem that nobody serves at an empty directory and take it away again.

    Raises EnvironmentProblem that says why this user cannot mount.
    """
    if os.geteuid() == 0:
        _mount_as_root(directory)
    else:
        _mount_by_fusermount(directory)


def _mount_as_root(directory: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        target = os.fsencode(directory)
        data = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"agentfuse-doctor", target, b"fuse", _MS_NOSUID_NODEV, data) != 0:
            raise _refused(ctypes.get_errno())
        libc.umount2(target, _MNT_DETACH)
    finally:
        os.close(device)


def in_user_namespace() -> bool:
    """Whether root here is nobody special on the host."""
    return Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]


def _refused(code: int) -> EnvironmentProblem:
    hint = "see dmesg for the reason"
    if code == errno.ENODEV:
        hint = "modprobe fuse"
    elif code in (errno.EPERM, errno.EACCES):
        hint = _what_forbids()
    return EnvironmentProblem(f"the kernel refuses to mount: {os.strerror(code)}", hint=hint)


def _what_forbids() -> str:
    """What in this process's own state keeps root from mounting, and the fix."""
    if not int(_status("CapEff"), 16) & _CAP_SYS_ADMIN:
        return (
            "give it CAP_SYS_ADMIN: in a container --cap-add SYS_ADMIN, in a unit CapabilityBoundingSet=; "
            "or let agentfuse-mount-helper mount"
        )
    if profile := _confined():
        return f"AppArmor's profile {profile} forbids it: in a container --security-opt apparmor=unconfined"
    if _filtered():
        return (
            "a seccomp filter forbids mount(2): SystemCallFilter=@system-service @mount in a unit, "
            "--security-opt seccomp=… in a container"
        )
    if in_user_namespace():
        return "a user namespace must have a mount namespace, too: unshare -Urm; PrivateUsers=no in a unit"
    return "look into dmesg for a security module (SELinux, AppArmor) that forbids it"


def _filtered() -> bool:
    """Whether mount(2) is refused before the kernel looks at what it is asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount(b"none", b"/nonexistent/agentfuse-doctor", b"tmpfs", 0, None)
    return ctypes.get_errno() != errno.ENOENT


def _confined() -> str:
    """The AppArmor profile of this process; empty when there is none that could forbid."""
    try:
        label = Path("/proc/self/attr/apparmor/current").read_text().strip()
    except OSError:
        return ""
    return "" if label == "unconfined" or label.endswith("(complain)") else label


def _status(field: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((line.split()[1] for line in lines if line.startswith(f"{field}:")), "0")


def _mount_by_fusermount(directory: Path) -> None:
    program = shutil.which("fusermount3")
    if program is None:
        raise EnvironmentProblem(
            "fusermount3 is missing: without it only root can mount", hint="apt-get install fuse3"
        )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [program, "-o", "nosuid,nodev,subtype=agentfuse-doctor", "--", directory],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=_FUSERMOUNT_DEADLINE_S,
            check=False,
        )
        if done.returncode != 0:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            raise EnvironmentProblem(
                f"fusermount3 refuses to mount: {said}", hint=_fusermount_fix(program, said)
            )
        _close_received(ours)
        subprocess.run([program, "-u", "-z", "--", directory], timeout=_FUSERMOUNT_DEADLINE_S, check=True)


def _fusermount_fix(program: str, said: str) -> str:
    """Why a program that should run as root does not, as far as this process can see."""
    reasons = (
        ("determine username" in said, f"give uid {os.getuid()} an entry in /etc/passwd"),
        (
            not os.stat(program).st_mode & stat.S_ISUID,
            f"it is not setuid root: chown root {program} && chmod u+s {program}",
        ),
        (
            _status("NoNewPrivs") == "1",
            "setuid has no effect under NoNewPrivileges (--security-opt no-new-privileges): run without it, "
            "let agentfuse-mount-helper mount, or mount in a user namespace (unshare -Urm)",
        ),
        (
            in_user_namespace(),
            "setuid root has no effect in this user namespace: mount outside of it, or as its root "
            "(unshare -Urm)",
        ),
        (
            bool(os.statvfs(program).f_flag & os.ST_NOSUID),
            f"{program} is on a filesystem that is mounted nosuid: mount that one suid",
        ),
        (
            not int(_status("CapBnd"), 16) & _CAP_SYS_ADMIN,
            "root has no CAP_SYS_ADMIN here: --cap-add SYS_ADMIN in a container, or let "
            "agentfuse-mount-helper mount",
        ),
    )
    otherwise = "mount as root, or in a user namespace (unshare -Urm)"
    return next((fix for holds, fix in reasons if holds), otherwise)


def _close_received(channel: socket.socket) -> None:
    """Take the descriptor of /dev/fuse that fusermount3 sent, and close it: the mount is dead then."""
    fds = array.array("i")
    _, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(fds.itemsize))
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    for fd in fds:
        os.close(fd)
