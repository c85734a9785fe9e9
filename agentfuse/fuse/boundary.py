"""The edge to the kernel: errors become errno here and nowhere else, and requests are counted.

pyfuse3 ends the whole session when a handler raises anything but FUSEError, so nothing else passes.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pyfuse3 import FUSEError

from agentfuse.errors import AgentfuseError

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class CountsRequests(Protocol):
    """Whose handlers these are: ``requests`` counts them by the kernel's name of the operation."""

    requests: dict[str, int]


S = TypeVar("S", bound=CountsRequests)


def to_fuse_error(error: Exception, operation: str) -> FUSEError:
    """The errno that says what happened; what nobody expected is logged and becomes EIO."""
    if isinstance(error, FUSEError):
        return error
    if isinstance(error, AgentfuseError):
        return FUSEError(error.errno)
    if isinstance(error, OSError) and error.errno:
        # The limit on descriptors that was hit is ours, not the caller's.
        return FUSEError(errno.ENFILE if error.errno == errno.EMFILE else error.errno)
    if isinstance(error, MemoryError):
        return FUSEError(errno.ENOMEM)
    log.error("%s: unexpected error, answered EIO", operation, exc_info=error)
    return FUSEError(errno.EIO)


def handler(
    function: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a FUSE handler of a plain function: being no coroutine, it acts without a checkpoint."""
    operation = function.__name__

    async def handle(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.requests[operation] += 1
        try:
            return function(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  # the edge: every error is answered
            raise to_fuse_error(error, operation) from None

    functools.update_wrapper(handle, function)
    return handle


def slow_handler(
    function: Callable[Concatenate[S, P], Awaitable[R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a FUSE handler of a coroutine: one that waits for a thread (fsync), so others go on meanwhile."""
    operation = function.__name__

    async def handle(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.requests[operation] += 1
        try:
            return await function(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  # the edge: every error is answered
            raise to_fuse_error(error, operation) from None

    functools.update_wrapper(handle, function)
    return handle


def requests_from_zero() -> dict[str, int]:
    """A counter for every operation that the kernel may ask for."""
    return dict.fromkeys(OPERATIONS, 0)


OPERATIONS: tuple[str, ...] = (
    "lookup", "forget", "getattr", "setattr", "readlink", "symlink", "link", "mknod", "mkdir", "rmdir",
    "unlink", "rename", "create", "open", "read", "write", "flush", "release", "fsync", "fsyncdir",
    "opendir", "readdir", "releasedir", "statfs", "access",
    "getxattr", "setxattr", "listxattr", "removexattr",
)  # fmt: skip
