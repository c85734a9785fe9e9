"""The tree of errors: every one knows its errno, its HTTP status, its exit code and a hint.

    AgentfuseError            EIO      500   70  something we did not foresee
    ├─ UsageError             EINVAL   400    2  the command line or a request is wrong
    │  ├─ ConfigError         EINVAL   400   78  the configuration is wrong (all mistakes together)
    │  ├─ WrongTypeError      ENOTDIR  400    2  a directory where a file is needed, or the other way round
    │  └─ NotEmptyError       ENOTEMPTY 400   2  a directory that holds something
    ├─ EnvironmentProblem     EIO      500   69  the machine lacks something we need
    │  └─ MountError          EBUSY    409   73  the mountpoint cannot be used
    ├─ BusyError              EBUSY    409   75  somebody else holds it
    │  └─ CapacityError       EBUSY    429   75  the host has no room for more now
    ├─ ExistsError            EEXIST   409   73  something has that name already
    ├─ ChangedError           EBUSY    412   75  a file is not what it was when it was read
    ├─ FrozenError            EPERM    409   73  a file is frozen, so it stays as it is
    ├─ NotFoundError          ENOENT   404   66  no such mount, agent, snapshot
    ├─ QuotaExceededError     EDQUOT   507   73  a region's bytes or files are used up
    ├─ StoreError             EIO      502   69  the object store failed or cannot be reached
    │  ├─ ObjectNotFoundError ENOENT   404   66  the object store says: absent (never: unreachable)
    │  └─ IntegrityError      EIO      502   65  bytes are not what their hash or format says
    └─ UnflushedError         EIO      503   75  work is safe on this host, but not yet in the store

Exit codes are those of sysexits.h. An edge (FUSE, HTTP, command line) turns the error into its own
currency once; nobody below an edge logs what it raises.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import ClassVar


class AgentfuseError(Exception):
    """Base of all errors a user may see: ``message`` says what happened, ``hint`` names the fix."""

    errno: ClassVar[int] = errno.EIO
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    @classmethod
    def code(cls) -> str:
        """The kind of error for programs: ``quota_exceeded``."""
        words = re.findall("[A-Z][a-z]+", cls.__name__.removesuffix("Error"))
        return "_".join(words).lower()

    @classmethod
    def kinds(cls) -> Iterator[type[AgentfuseError]]:
        """This kind and all below it."""
        yield cls
        for kind in cls.__subclasses__():
            yield from kind.kinds()


class UsageError(AgentfuseError):
    """The command line or a request is wrong."""

    errno = errno.EINVAL
    http_status = 400
    exit_code = 2


class ConfigError(UsageError):
    """The configuration is wrong. ``problems`` holds every mistake, each naming its key and its fix."""

    exit_code = 78

    def __init__(self, problems: list[str]) -> None:
        super().__init__("configuration: " + "; ".join(problems))
        self.problems = problems


class WrongTypeError(UsageError):
    """A directory is where a file is needed, or the other way round."""

    errno = errno.ENOTDIR


class NotEmptyError(UsageError):
    """A directory holds something, and only an empty one can be removed so."""

    errno = errno.ENOTEMPTY


class EnvironmentProblem(AgentfuseError):  # noqa: N818  # EnvironmentError is a builtin
    """The machine lacks something: /dev/fuse, fusermount3, a writable state directory, disk space."""

    exit_code = 69


class MountError(EnvironmentProblem):
    """The mountpoint cannot be used."""

    errno = errno.EBUSY
    http_status = 409
    exit_code = 73


class BusyError(AgentfuseError):
    """Another process holds what was asked for."""

    errno = errno.EBUSY
    http_status = 409
    exit_code = 75


class CapacityError(BusyError):
    """The host has as many executions as it may have."""

    http_status = 429


class ExistsError(AgentfuseError):
    """Something has that name already."""

    errno = errno.EEXIST
    http_status = 409
    exit_code = 73


class ChangedError(AgentfuseError):
    """A file is not what it was when it was read, on which the request depends."""

    errno = errno.EBUSY
    http_status = 412
    exit_code = 75


class FrozenError(AgentfuseError):
    """A file is frozen, or a directory holds one that is: it stays as it is, where it is."""

    errno = errno.EPERM
    http_status = 409
    exit_code = 73


class NotFoundError(AgentfuseError):
    """No such mount, agent, execution or snapshot."""

    errno = errno.ENOENT
    http_status = 404
    exit_code = 66


class QuotaExceededError(AgentfuseError):
    """A region has no room for the bytes or the files asked for."""

    errno = errno.EDQUOT
    http_status = 507
    exit_code = 73


class StoreError(AgentfuseError):
    """The object store failed or cannot be reached: what it holds is unknown, never absent."""

    http_status = 502
    exit_code = 69


class ObjectNotFoundError(StoreError):
    """The object store answered that it holds no object of this key."""

    errno = errno.ENOENT
    http_status = 404
    exit_code = 66


class IntegrityError(StoreError):
    """Bytes are not what their hash, their size or their format says."""

    exit_code = 65


class UnflushedError(AgentfuseError):
    """The home is safe on this host, but its memory is not in the object store yet."""

    http_status = 503
    exit_code = 75


def leaves(group: BaseExceptionGroup[AgentfuseError]) -> Iterator[AgentfuseError]:
    """The errors in a group: a nursery wraps what leaves it, and callers want the error itself."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
