"""Tries a mount for real without a FUSE library: the kernel answers mount(2) before any daemon speaks."""

from __future__ import annotations

import array
import ctypes
import errno
import os
import shutil
import socket
import subprocess
from pathlib import Path

from agentfuse.errors import EnvironmentProblem

_MS_NOSUID_NODEV = 2 | 4
_MNT_DETACH = 2
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


def _refused(code: int) -> EnvironmentProblem:
    hints = {
        errno.EPERM: "give it CAP_SYS_ADMIN: in a container --cap-add SYS_ADMIN, "
        "with AppArmor also --security-opt apparmor=unconfined",
        errno.ENODEV: "modprobe fuse",
    }
    return EnvironmentProblem(
        f"the kernel refuses to mount: {os.strerror(code)}", hint=hints.get(code, "see dmesg for the reason")
    )


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
            raise EnvironmentProblem(f"fusermount3 refuses to mount: {said}", hint=_fusermount_fix(said))
        _close_received(ours)
        subprocess.run([program, "-u", "-z", "--", directory], timeout=_FUSERMOUNT_DEADLINE_S, check=True)


def _fusermount_fix(said: str) -> str:
    if "determine username" in said:
        return f"give uid {os.getuid()} an entry in /etc/passwd"
    return (
        "it must be setuid root and run without NoNewPrivileges; "
        "or mount as root, or in a user namespace (unshare -Urm)"
    )


def _close_received(channel: socket.socket) -> None:
    """Take the descriptor of /dev/fuse that fusermount3 sent, and close it: the mount is dead then."""
    fds = array.array("i")
    _, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(fds.itemsize))
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    for fd in fds:
        os.close(fd)
