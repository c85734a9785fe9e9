"""Closes what bubblewrap leaves open: the keys of whoever starts a sandbox, the input of its terminal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from typing import NamedTuple

_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_KEYCTL_JOIN_SESSION_KEYRING = 1
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # with EPERM
_NUMBER, _ARCHITECTURE, _SECOND_ARGUMENT = 0, 4, 24  # in struct seccomp_data, little-endian


class _Machine(NamedTuple):
    keyctl: int
    ioctls: tuple[tuple[int, int], ...]
    """Under each architecture that it runs programs of (linux/audit.h), the number of ioctl(2)."""


_MACHINES = {
    "x86_64": _Machine(250, ((0xC000003E, 16), (0xC000003E, 0x40000202), (0x40000003, 54))),
    "aarch64": _Machine(219, ((0xC00000B7, 29), (0x40000028, 54))),
}


@contextlib.contextmanager
def terminal_filter() -> Iterator[int | None]:
    """A descriptor for ``bwrap --seccomp`` that forbids to type into the terminal; None: not on this machine.

    What is typed so is read by the shell outside, once the sandbox has ended (CVE-2017-5226).
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        yield None
        return
    fd = os.memfd_create("seccomp")
    try:
        os.write(fd, _program(machine.ioctls))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def leave_keyring() -> None:
    """Have a session keyring of our own: by that of a login one reads its keys, in any namespace."""
    if machine := _MACHINES.get(platform.machine()):
        ctypes.CDLL(None).syscall(machine.keyctl, _KEYCTL_JOIN_SESSION_KEYRING, None)


def _program(ioctls: tuple[tuple[int, int], ...]) -> bytes:
    steps = []
    for at, (architecture, number) in enumerate(ioctls):
        to_request = 4 * (len(ioctls) - at) - 3
        steps += [
            (_LOAD, 0, 0, _ARCHITECTURE),
            (_IF_EQUAL, 0, 2, architecture),
            (_LOAD, 0, 0, _NUMBER),
            (_IF_EQUAL, to_request, 0, number),
        ]
    steps += [
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _SECOND_ARGUMENT),  # the kernel looks at 32 bits of it, too
        (_IF_EQUAL, 2, 0, _TIOCSTI),
        (_IF_EQUAL, 1, 0, _TIOCLINUX),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
