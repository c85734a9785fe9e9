"""``agentfuse-mount-helper``: the one step of a mount that needs privilege, for daemons that have none.

It opens /dev/fuse, mounts it and hands the descriptor over; it unmounts when it is asked to, or when the
daemon that asked is gone. It never looks at what is mounted. All that it needs is CAP_SYS_ADMIN, and
CAP_CHOWN and CAP_FOWNER where mountpoints are not root's. It knows the standard library only.

A daemon keeps one connection (SOCK_SEQPACKET) for its mount. Requests and answers are packets of JSON:
``{"do": "mount", "path", "noexec"}``, with the descriptor of the daemon's own PID namespace, is answered by
``{"user_namespace": [device, inode]}`` with the descriptor of /dev/fuse, and ``{"do": "unmount", "path",
"lazy"}`` by ``{}``; what is refused, by ``{"errno", "what", "hint"}``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import os
import pwd
import re
import signal
import socket
import stat
import struct
import sys
from collections.abc import Sequence
from typing import Any

_PACKET = 16 * 1024
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CLONE_NEWPID = 0x20000000
_MS_NOSUID_NODEV, _MS_NOEXEC = 2 | 4, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_FSTYPE = "fuse.agentfuse"
_libc = ctypes.CDLL(None, use_errno=True)

_Answer = tuple[dict[str, Any], int | None]
"""A packet, and the descriptor that goes with it."""


class _RefusedError(OSError):
    """What was asked for is not done; ``hint`` names the fix."""

    def __init__(self, code: int, what: str, hint: str = "") -> None:
        super().__init__(code, what)
        self.hint = hint


class Connection:
    """One daemon, of user ``uid`` and group ``gid``. It gets mounts below the directory ``below`` only."""

    def __init__(self, channel: socket.socket, below: str, uid: int, gid: int) -> None:
        self._channel = channel
        self._below = below
        self._uid, self._gid = uid, gid
        self._mounted: tuple[str, int] | None = None

    def serve(self) -> None:
        """Do what is asked, and after the daemon's end take away what is still mounted for it."""
        with contextlib.suppress(ConnectionError):
            while True:
                data, fds, _, _ = socket.recv_fds(self._channel, _PACKET, 1)
                if not data:
                    break
                try:
                    answer, fd = self._answer(json.loads(data), fds)
                except _RefusedError as error:
                    answer, fd = {"errno": error.errno, "what": error.strerror, "hint": error.hint}, None
                except OSError as error:
                    code = error.errno or errno.EIO
                    answer, fd = {"errno": code, "what": os.strerror(code), "hint": ""}, None
                except (ValueError, KeyError, TypeError, AttributeError):
                    answer, fd = {"errno": errno.EINVAL, "what": "no request", "hint": ""}, None
                finally:
                    for each in fds:
                        os.close(each)
                try:
                    socket.send_fds(self._channel, [json.dumps(answer).encode()], [] if fd is None else [fd])
                finally:
                    if fd is not None:
                        os.close(fd)  # from here on the mount lives as long as the daemon
        if self._mounted is not None:
            path, minor = self._mounted
            if _top(path)[:2] == (_FSTYPE, minor):
                with contextlib.suppress(OSError):
                    self._unmount(path, lazy=True)

    def _answer(self, request: dict[str, Any], fds: Sequence[int]) -> _Answer:
        if request["do"] == "mount":
            return self._mount(request["path"], fds[0] if fds else -1, noexec=bool(request["noexec"]))
        if request["do"] == "unmount":
            self._unmount(request["path"], lazy=bool(request["lazy"]))
            return {}, None
        raise ValueError

    def _mount(self, path: str, pid_namespace: int, *, noexec: bool) -> _Answer:
        parent, name = self._opened(path)
        try:
            at = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=parent)
        finally:
            os.close(parent)
        try:
            if os.fstat(at).st_dev != os.stat(self._below).st_dev:
                raise _RefusedError(errno.EBUSY, "something is mounted there already", f"umount {path}")
            if os.listdir(at):
                raise _RefusedError(errno.ENOTEMPTY, "it is not empty: the mount would hide what is in it")
            os.fchown(at, 0, 0)
            os.fchmod(at, 0o555)  # while nothing is mounted, nothing is written under it
            device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            try:
                options = f"fd={device},rootmode=40000,user_id={self._uid},group_id={self._gid}"
                flags = _MS_NOSUID_NODEV | (_MS_NOEXEC if noexec else 0)
                _mount_for(pid_namespace, at, flags, f"{options},default_permissions,allow_other")
            except BaseException:
                os.close(device)
                raise
        finally:
            os.close(at)
        self._mounted = path, _top(path)[1]
        namespace = os.stat("/proc/self/ns/user")
        return {"user_namespace": [namespace.st_dev, namespace.st_ino]}, device

    def _unmount(self, path: str, *, lazy: bool) -> None:
        fstype, _, options = _top(path)
        if fstype != _FSTYPE or f"user_id={self._uid}" not in options:
            raise _RefusedError(errno.EINVAL, "no mount of yours is there")
        parent, name = self._opened(path)
        try:
            target = os.fsencode(f"/proc/self/fd/{parent}/{name}")
            if _libc.umount2(target, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)) != 0:
                raise OSError(ctypes.get_errno(), "umount2")
        finally:
            os.close(parent)

    def _opened(self, path: str) -> tuple[int, str]:
        """The directory that a mountpoint is in, reached from ``below`` without a symlink, and its name."""
        if path != os.path.normpath(path) or not path.startswith(self._below.rstrip("/") + "/"):
            raise _RefusedError(
                errno.EPERM, f"it is not below {self._below}", "start the helper with another --below"
            )
        *names, name = os.path.relpath(path, self._below).split("/")
        fd = os.open(self._below, os.O_PATH | _DIRECTORY)
        for each in names:
            try:
                below = os.open(each, os.O_PATH | _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd, name


def _mount_for(pid_namespace: int, at: int, flags: int, options: str) -> None:
    """Mount, in a process of that PID namespace: FUSE tells of processes by their numbers there.

    A daemon knows its own helpers by these numbers. In a namespace that they are not seen from all are 0.
    """
    if _libc.setns(pid_namespace, _CLONE_NEWPID) != 0:
        raise _RefusedError(
            ctypes.get_errno(),
            "the daemon's processes cannot be seen from the helper's PID namespace",
            "run both in one PID namespace (one container), or the helper in an outer one (the host's)",
        )
    child = os.fork()
    if child == 0:
        code = errno.EIO
        with contextlib.suppress(BaseException):
            done = _libc.mount(
                b"agentfuse", b"/proc/self/fd/%d" % at, b"fuse.agentfuse", flags, options.encode()
            )
            code = 0 if done == 0 else ctypes.get_errno()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        hint = "give the helper CAP_SYS_ADMIN (and no AppArmor)" if code == errno.EPERM else "modprobe fuse"
        raise _RefusedError(abs(code), f"the kernel refuses: {os.strerror(abs(code))}", hint)


def _top(path: str) -> tuple[str, int, list[str]]:
    """The type, the number and the options of what is mounted at a path; an empty type if nothing is."""
    found: tuple[str, int, list[str]] = ("", -1, [])
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            fields = before.split(" ")
            at = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            if at == path:
                fstype, _, options = after.rstrip("\n").split(" ")
                found = fstype, int(fields[2].partition(":")[2]), options.split(",")
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Listen, and answer each connection in a process of its own, which outlives this one."""
    parser = argparse.ArgumentParser(
        prog="agentfuse-mount-helper",
        description="Mounts and unmounts for agentfuse daemons that run without any privilege.",
    )
    parser.add_argument("--socket", required=True, metavar="PATH", help="where daemons ask (mount_helper)")
    parser.add_argument(
        "--below", required=True, metavar="DIR", help="mountpoints are below it, nowhere else"
    )
    parser.add_argument(
        "--user", required=True, type=_uid, metavar="NAME|UID", help="the user whose daemons may ask"
    )
    arguments = parser.parse_args(words)
    below = os.path.realpath(arguments.below)
    if not os.path.isdir(below):
        parser.error(f"--below: {below} is not a directory; mkdir -p {below}")
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(arguments.socket).st_mode):
            os.unlink(arguments.socket)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # its default does not end the first process of a container
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        os.umask(0o177)
        listening.bind(arguments.socket)
        os.chown(arguments.socket, arguments.user, -1)
        listening.listen(64)
        print(f"ready: mounts below {below} for uid {arguments.user}", flush=True)  # noqa: T201
        if manager := os.environ.get("NOTIFY_SOCKET"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
                telling.sendto(b"READY=1", manager.replace("@", "\0", 1))
        while True:
            channel, _ = listening.accept()
            with channel:
                if os.fork() == 0:
                    listening.close()
                    _serve(channel, below, arguments.user)


def _uid(user: str) -> int:
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise argparse.ArgumentTypeError(f"no user {user!r} on this host") from None


def _serve(channel: socket.socket, below: str, allowed: int) -> None:
    """The whole life of a connection's process."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    code = 1
    try:
        _, uid, gid = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid == allowed:
            Connection(channel, below, uid, gid).serve()
        code = 0
    except BaseException as error:  # noqa: BLE001 -- the outermost edge of this process
        print(f"agentfuse-mount-helper: {error!r}", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
