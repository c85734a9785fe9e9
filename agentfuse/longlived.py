"""What a process that serves many requests, in threads beside a loop, sets for itself when it begins."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys

_SWITCH_S = 0.0005
"""A thread that hashes or packs gives way to requests so soon; Python's default is 5 ms."""

_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 1024 * 1024
"""Buffers of this size go back to the system when they are freed."""

_M_ARENA_MAX = -8
_ARENAS = 1
"""Python's threads allocate one after the other: an arena for each would only keep what it once needed."""


def prepare() -> None:
    """Threads give way soon, what they free is given back or used by the next, and as many descriptors as
    may be."""
    sys.setswitchinterval(_SWITCH_S)
    with contextlib.suppress(OSError, AttributeError):  # glibc's; it would keep every thread's last buffers
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
