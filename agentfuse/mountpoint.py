"""The directory that a home is mounted on: fit for it before, closed to writes while nothing is mounted.

Mounted by ourselves, as root or through fusermount3, or by ``agentfuse-mount-helper`` for a daemon without
privileges. Never stats a path that may be a dead mount; asks mountinfo instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from agentfuse.control.liveness import liveness
from agentfuse.control.mountinfo import mounts_at
from agentfuse.errors import BusyError, EnvironmentProblem, MountError

log = logging.getLogger(__name__)

CLOSED_MODE = 0o555
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_FUSERMOUNT_DEADLINE_S = 60.0
_LONG = ctypes.sizeof(ctypes.c_long)
# FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of linux/fs.h, and the flag that chattr +i sets
_GET_FLAGS, _SET_FLAGS = 2 << 30 | _LONG << 16 | 0x6601, 1 << 30 | _LONG << 16 | 0x6602
_IMMUTABLE = 0x10
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class Mounter(Protocol):
    """Mounts and unmounts one resolved mountpoint. ``allow_other``: whether other users are let in."""

    allow_other: bool

    def prepare(self) -> bool:
        """Make sure that it can be mounted on.

        A stale mount of ours is detached first; the caller holds the mountpoint's lock, so its daemon is
        dead. Returns whether there was one. Raises ``MountError`` and ``EnvironmentProblem``.
        """

    def mounting(self, *, noexec: bool) -> contextlib.AbstractContextManager[tuple[str, Callable[[], None]]]:
        """What libfuse is to mount at, and what to call once it has.

        Afterwards the directory below is 0555, for good; with the privilege it is root's, and immutable until
        ``reopen``, so that not even root writes there.
        """

    def reopen(self) -> None:
        """The home is not going to be mounted again soon: the directory may be removed, by those who could
        before."""

    def detach(self, *, lazy: bool) -> None:
        """Unmount what is on top; blocks while the kernel writes back.

        Raises ``MountError`` when it is busy (never when ``lazy``) or not mounted.
        """


class OwnMounter:
    """Mounts as root, or as fusermount3 lets its user."""

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self.allow_other = may_allow_other()

    def prepare(self) -> bool:
        """As the protocol says."""
        require_fuse()
        replaced = detach_stale(self._mountpoint, self)
        st = require_directory(self._mountpoint)
        if os.geteuid() != 0:
            _require_fusermount(self._mountpoint, st)
        return replaced

    @contextlib.contextmanager
    def mounting(self, *, noexec: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        """As the protocol says; fusermount3 mounts only on what its user may write, so an ordinary user's
        directory is closed once it is mounted, through a descriptor from before the mount covered it.
        """
        with _closed_below(self._mountpoint) as close_below:
            yield str(self._mountpoint), close_below

    def reopen(self) -> None:
        """As the protocol says."""
        reopen(self._mountpoint)

    def detach(self, *, lazy: bool) -> None:
        """As the protocol says."""
        detach(self._mountpoint, lazy=lazy)


def detach_stale(mountpoint: Path, mounter: Mounter | None = None) -> bool:
    """Detach mounts whose daemon is dead from a resolved path; whether there were any.

    The caller holds the mountpoint's lock. Raises ``BusyError`` when a daemon lives there after all,
    ``MountError`` when something else is mounted.
    """
    found = mounts_at(mountpoint)
    if found and not found[-1].is_ours:
        raise MountError(
            f"{mountpoint} is already a mount ({found[-1].fstype})",
            hint=f"umount {mountpoint}, or give another directory",
        )
    ours = [entry for entry in found if entry.is_ours]
    if ours and (state := liveness(mountpoint)) != "dead":
        raise BusyError(
            f"{mountpoint} is already mounted by a daemon that is {state}",
            hint=f"end that one first: agentfuse umount {mountpoint}",
        )
    mounter = mounter or OwnMounter(mountpoint)
    for _ in ours:  # they stack
        mounter.detach(lazy=True)
    return bool(ours)


def require_directory(mountpoint: Path) -> os.stat_result:
    """Raise ``MountError`` unless it is an empty directory."""
    try:
        st = os.stat(mountpoint)
        entries = os.listdir(mountpoint)
    except FileNotFoundError:
        raise MountError(f"{mountpoint} does not exist", hint=f"mkdir -p {mountpoint}") from None
    except NotADirectoryError:
        raise MountError(f"{mountpoint} is not a directory", hint="give an empty directory") from None
    except OSError as error:
        raise MountError(
            f"{mountpoint} cannot be read: {os.strerror(error.errno or 0)}",
            hint="give a directory of your own",
        ) from error
    if not stat.S_ISDIR(st.st_mode):
        raise MountError(f"{mountpoint} is not a directory", hint="give an empty directory")
    if entries:
        raise MountError(
            f"{mountpoint} is not empty: the mount would hide {min(entries)!r} and whatever else is in it",
            hint="move it away, or give another directory",
        )
    return st


@contextlib.contextmanager
def _closed_below(mountpoint: Path) -> Iterator[Callable[[], None]]:
    below = os.open(mountpoint, _DIRECTORY)
    try:
        if os.geteuid() == 0:
            _close_to_root(below)
            yield lambda: None
            return
        os.fchmod(below, stat.S_IMODE(os.fstat(below).st_mode) | 0o700)
        try:
            yield lambda: os.fchmod(below, CLOSED_MODE)
        finally:
            os.fchmod(below, CLOSED_MODE)
    finally:
        os.close(below)


def _close_to_root(directory: int) -> None:
    """Mode 0555 keeps everybody out but root, for whom it takes the immutable flag."""
    if not _is_closed(os.fstat(directory)):
        with contextlib.suppress(OSError):
            _set_immutable(directory, immutable=False)  # which would be in the way
        os.fchown(directory, 0, 0)
        os.fchmod(directory, CLOSED_MODE)
    try:
        _set_immutable(directory, immutable=True)
    except OSError as error:  # another filesystem, or no CAP_LINUX_IMMUTABLE
        log.info(
            "the mountpoint cannot be made immutable, so it is closed to all but root: %s", error.strerror
        )


def _is_closed(st: os.stat_result) -> bool:
    return (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (0, 0, CLOSED_MODE)


def _set_immutable(directory: int, *, immutable: bool) -> bool:
    """Whether that changed anything."""
    flags = bytearray(_LONG)
    fcntl.ioctl(directory, _GET_FLAGS, flags)
    before = int.from_bytes(flags[:4], sys.byteorder)
    after = before | _IMMUTABLE if immutable else before & ~_IMMUTABLE
    if after != before:
        fcntl.ioctl(directory, _SET_FLAGS, after.to_bytes(4, sys.byteorder) + flags[4:])
    return after != before


def reopen(mountpoint: Path) -> bool:
    """Take the immutable flag from a directory that we closed and nothing is mounted on.

    False where there was none, or it is somebody else's.
    """
    with contextlib.suppress(OSError):
        if not mounts_at(mountpoint):
            directory = os.open(mountpoint, _DIRECTORY)
            try:
                return _is_closed(os.fstat(directory)) and _set_immutable(directory, immutable=False)
            finally:
                os.close(directory)
    return False


def remove(mountpoint: Path) -> None:
    """Remove a directory that nothing is mounted on. Raises ``OSError``."""
    reopen(mountpoint)
    os.rmdir(mountpoint)


def require_fuse() -> None:
    """Raise ``EnvironmentProblem`` unless this machine lets us open /dev/fuse."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise EnvironmentProblem(
            "/dev/fuse is missing", hint="modprobe fuse; in a container add --device /dev/fuse"
        ) from None
    except OSError as error:
        if error.errno == errno.EPERM:
            raise EnvironmentProblem(
                "/dev/fuse is there, but this control group may not use it",
                hint="in a container --device /dev/fuse (a bind of it is not enough), in a unit "
                "DeviceAllow=/dev/fuse rw",
            ) from None
        if error.errno == errno.EACCES:
            raise EnvironmentProblem(
                "/dev/fuse may not be opened by this user",
                hint='run as root, or chmod 0666 /dev/fuse, as distributions have it (udev: KERNEL=="fuse", '
                'MODE="0666")',
            ) from None
        raise EnvironmentProblem(
            f"/dev/fuse does not work: {os.strerror(error.errno or 0)}", hint="modprobe fuse"
        ) from error


def may_allow_other() -> bool:
    """Whether other users may be let in: always as root, else only when /etc/fuse.conf says so."""
    if os.geteuid() == 0:
        return True
    try:
        lines = Path("/etc/fuse.conf").read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.split("#")[0].strip() == "user_allow_other" for line in lines)


def detach(mountpoint: Path, *, lazy: bool) -> None:
    """Unmount what is on top at ``mountpoint``; blocks while the kernel writes back.

    Raises ``MountError`` when it is busy (never when ``lazy``) or not mounted.
    """
    if os.geteuid() != 0:
        _fusermount_unmount(mountpoint, lazy=lazy)
        return
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
        raise unmount_error(mountpoint, ctypes.get_errno())


def _require_fusermount(mountpoint: Path, st: os.stat_result) -> None:
    if shutil.which("fusermount3") is None:
        raise EnvironmentProblem(
            "fusermount3 is missing: without it only root can mount", hint="apt-get install fuse3"
        )
    if st.st_uid != os.geteuid():
        raise MountError(f"{mountpoint} belongs to another user", hint="give a directory of your own")


def _fusermount_unmount(mountpoint: Path, *, lazy: bool) -> None:
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FUSERMOUNT_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountError(f"fusermount3 did not unmount {mountpoint}: {error}") from error
    if done.returncode != 0:
        code = errno.EBUSY if "busy" in done.stderr.lower() else errno.EINVAL
        raise unmount_error(mountpoint, code)


def unmount_error(mountpoint: Path, code: int) -> MountError:
    """Why the kernel does not unmount it."""
    if code == errno.EBUSY:
        return MountError(
            f"{mountpoint} is busy: a process works in it or has a file of it open",
            hint="end that process, or unmount with --lazy",
        )
    if code == errno.EINVAL:
        return MountError(f"{mountpoint} is not mounted", hint="agentfuse ps lists the mounts")
    return MountError(f"{mountpoint} cannot be unmounted: {os.strerror(code)}")
