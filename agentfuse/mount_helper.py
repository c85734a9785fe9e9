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
import fcntl
import json
import os
import pwd
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

_PACKET = 16 * 1024
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CLONE_NEWPID = 0x20000000
_ACCEPTS = 0x10000  # __SO_ACCEPTCON
_MS_NOSUID_NODEV, _MS_NOEXEC = 2 | 4, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_FSTYPE = b"fuse.agentfuse"
_MOST = 1000
"""Connections at once, each of them a process: what a user may cost a host."""
_PATIENCE_S = 10.0
_libc = ctypes.CDLL(None, use_errno=True)

_Answer = tuple[dict[str, Any], int | None]
"""A packet, and the descriptor that goes with it."""


class _RefusedError(OSError):
    """What was asked for is not done; ``hint`` names the fix."""

    def __init__(self, code: int, what: str, hint: str = "") -> None:
        super().__init__(code, what)
        self.hint = hint


class Connection:
    """One daemon, of user ``uid`` and group ``gid``. It gets one mount, below the directory ``below``."""

    def __init__(self, channel: socket.socket, below: str, uid: int, gid: int) -> None:
        self._channel = channel
        self._below = below
        self._uid, self._gid = uid, gid
        self._mounted: tuple[str, int] | None = None

    def serve(self) -> None:
        """Do what is asked, and after the daemon's end take away what is still mounted for it."""
        self._channel.settimeout(_PATIENCE_S)  # whoever connects has something to ask
        try:
            with contextlib.suppress(ConnectionError, TimeoutError):
                self._converse()
        finally:
            if self._mounted is not None:
                path, number = self._mounted
                with contextlib.suppress(OSError):
                    self._unmount(path, number, lazy=True)

    def _converse(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._channel, _PACKET, 1)
            if not data:
                return
            try:
                answer, fd = self._answer(json.loads(data), fds)
            except _RefusedError as error:
                answer, fd = {"errno": error.errno, "what": error.strerror, "hint": error.hint}, None
            except OSError as error:
                code = error.errno or errno.EIO
                answer, fd = {"errno": code, "what": os.strerror(code), "hint": ""}, None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                answer, fd = {"errno": errno.EINVAL, "what": "no request", "hint": ""}, None
            finally:
                for each in fds:
                    os.close(each)
            try:
                socket.send_fds(self._channel, [json.dumps(answer).encode()], [] if fd is None else [fd])
            finally:
                if fd is not None:
                    os.close(fd)  # from here on the mount lives as long as the daemon

    def _answer(self, request: dict[str, Any], fds: Sequence[int]) -> _Answer:
        if request["do"] == "mount":
            return self._mount(request["path"], fds[0] if fds else -1, noexec=bool(request["noexec"]))
        if request["do"] == "unmount":
            self._unmount(request["path"], None, lazy=bool(request["lazy"]))
            return {}, None
        raise ValueError

    def _mount(self, path: str, pid_namespace: int, *, noexec: bool) -> _Answer:
        if self._mounted is not None:
            raise _RefusedError(errno.EBUSY, "this connection has its mount", "connect once for each mount")
        parent, name = self._opened(path)
        with contextlib.ExitStack() as closing, contextlib.ExitStack() as undo:
            closing.callback(os.close, parent)
            at = self._closed(parent, name, path)
            undo.callback(os.close, at)
            device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            undo.callback(os.close, device)
            options = f"fd={device},rootmode=40000,user_id={self._uid},group_id={self._gid}"
            flags = _MS_NOSUID_NODEV | (_MS_NOEXEC if noexec else 0)
            try:
                _mount_for(pid_namespace, at, flags, f"{options},default_permissions,allow_other")
            finally:  # even if its process was killed right after it
                if (number := self._number(parent, name)) >= 0:
                    self._mounted = path, number
            if self._mounted is None or os.readlink(f"/proc/self/fd/{at}") != path:
                raise _RefusedError(errno.ESTALE, "it was moved away meanwhile", "try again")
            namespace = os.stat("/proc/self/ns/user")
            undo.pop_all()
        self._channel.settimeout(None)
        # The mountpoint's own descriptor stays open to the end of this process, and so does the lock on it.
        return {"user_namespace": [namespace.st_dev, namespace.st_ino]}, device

    def _closed(self, parent: int, name: str, path: str) -> int:
        """A directory that is fit for a mount: opened, locked, and closed to whoever might write into it."""
        found = os.open(name, os.O_PATH | _DIRECTORY, dir_fd=parent)
        try:
            if _mount_id(found) != _mount_id(parent):
                raise _RefusedError(errno.EBUSY, "something is mounted there already", f"umount {path}")
            at = os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=found)
        finally:
            os.close(found)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, at)
            _lock(at)
            if os.fstat(at).st_uid not in {0, self._uid}:
                raise _RefusedError(errno.EPERM, "it belongs to another user", "give a directory of your own")
            with os.scandir(at) as entries:
                if next(entries, None) is not None:
                    raise _RefusedError(
                        errno.ENOTEMPTY, "it is not empty: the mount would hide what is in it"
                    )
            os.fchown(at, 0, 0)
            os.fchmod(at, 0o555)  # while nothing is mounted, nothing is written under it
            undo.pop_all()
        return at

    def _unmount(self, path: str, number: int | None, *, lazy: bool) -> None:
        """Unmount a mount of this user's; ``number``: that one only."""
        parent, name = self._opened(path)
        try:
            found = self._number(parent, name)
            if found < 0 or number not in {None, found}:
                raise _RefusedError(errno.EINVAL, "no mount of yours is there")
            target = os.fsencode(f"/proc/self/fd/{parent}/{name}")
            if _libc.umount2(target, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)) != 0:
                raise OSError(ctypes.get_errno(), "umount2")
        finally:
            os.close(parent)

    def _number(self, parent: int, name: str) -> int:
        """The number of this user's mount on a name, which is not asked itself; -1 if there is none."""
        found = os.open(name, os.O_PATH | _DIRECTORY, dir_fd=parent)
        try:
            mount_id = _mount_id(found)
        finally:
            os.close(found)
        with open("/proc/self/mountinfo", "rb") as lines:
            for line in lines:
                fields, _, after = line.rstrip(b"\n").partition(b" - ")
                if fields.split(b" ", 1)[0] == mount_id:
                    fstype, _, options = after.split(b" ")
                    if fstype == _FSTYPE and b"user_id=%d" % self._uid in options.split(b","):
                        return int(fields.split(b" ")[2].partition(b":")[2])
        return -1

    def _opened(self, path: str) -> tuple[int, str]:
        """The directory that a mountpoint is in, reached without any symlink, and its name."""
        if path != os.path.normpath(path) or not path.startswith(self._below.rstrip("/") + "/"):
            raise _RefusedError(
                errno.EPERM, f"it is not below {self._below}", "start the helper with another --below"
            )
        _, *names, name = path.split("/")
        fd = os.open("/", os.O_PATH | _DIRECTORY)
        for each in names:
            try:
                below = os.open(each, os.O_PATH | _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd, name


def _mount_id(fd: int) -> bytes:
    """Which mount a descriptor is in, as the first column of mountinfo has it."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
        return next(line.split()[1] for line in lines if line.startswith(b"mnt_id:"))


def _lock(at: int) -> None:
    """Take a mountpoint for this process. Who mounted there before keeps it until that mount is taken away:
    afterwards it could not tell another's mount, with the same number, from its own."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise _RefusedError(
                    errno.EBUSY, "it is another daemon's", "end that one first: agentfuse ps"
                ) from None
            time.sleep(0.02)
        else:
            return


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
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise _RefusedError(errno.EINTR, "the process that mounts was killed", "try again")
    if code:
        hint = "give the helper CAP_SYS_ADMIN (and no AppArmor)" if code == errno.EPERM else "modprobe fuse"
        raise _RefusedError(code, f"the kernel refuses: {os.strerror(code)}", hint)


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
    os.umask(0o177)
    try:
        listening = _listening(arguments.socket, arguments.user)
    except OSError as error:
        parser.error(f"--socket {arguments.socket}: {error.strerror}")
    # Its default does not end the first process of a container.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with listening:
        print(f"ready: mounts below {below} for uid {arguments.user}", flush=True)  # noqa: T201
        if manager := os.environ.get("NOTIFY_SOCKET"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
                telling.sendto(b"READY=1", manager.replace("@", "\0", 1))
        _accept(listening, below, arguments.user)


def _listening(path: str, user: int) -> socket.socket:
    """A new socket at a path, where ``user`` alone may connect."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            if _is_listened_to(path):
                raise OSError(errno.EADDRINUSE, "another helper listens there; end that one first")
            os.unlink(path)
    listening.bind(path)
    made = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:  # the directory may be somebody's, who has put something else in its place
        st = os.fstat(made)
        if not stat.S_ISSOCK(st.st_mode) or st.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "it was replaced meanwhile; give a path in a directory of root's")
        os.chown(f"/proc/self/fd/{made}", user, -1)
    finally:
        os.close(made)
    listening.listen(64)
    return listening


def _is_listened_to(path: str) -> bool:
    """Not by connecting: without CAP_DAC_OVERRIDE root may not, to a user's socket."""
    with open("/proc/net/unix", "rb") as lines:
        for line in lines:
            _, _, _, flags, _, _, _, *name = line.rstrip(b"\n").split(maxsplit=7)
            if name == [os.fsencode(path)] and flags != b"Flags" and int(flags, 16) & _ACCEPTS:
                return True
    return False


def _accept(listening: socket.socket, below: str, allowed: int) -> NoReturn:
    """Give each connection of the user's a process of its own."""
    running = 0

    def reap(*_: object) -> None:
        nonlocal running
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                running -= 1

    signal.signal(signal.SIGCHLD, reap)
    while True:
        channel, _ = listening.accept()
        with channel:
            _, uid, gid = struct.unpack("iII", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != allowed:
                continue
            if running >= _MOST:
                _complain(f"{running} connections are the most that there may be")
                continue
            running += 1
            try:
                child = os.fork()
            except OSError as error:
                running -= 1
                _complain(f"no process for a connection: {error.strerror}")
                continue
            if child == 0:
                listening.close()
                _serve(Connection(channel, below, uid, gid))


def _uid(user: str) -> int:
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise argparse.ArgumentTypeError(f"no user {user!r} on this host") from None


def _serve(connection: Connection) -> NoReturn:
    """The whole life of a connection's process."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    code = 1
    try:
        connection.serve()
        code = 0
    except BaseException as error:  # noqa: BLE001 -- the outermost edge of this process
        _complain(repr(error))
    finally:
        os._exit(code)


def _complain(text: str) -> None:
    print(f"agentfuse-mount-helper: {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
