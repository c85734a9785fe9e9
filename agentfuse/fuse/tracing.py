"""Tells whoever listens of each request as it is answered. While nobody listens it does not exist: the
handlers are replaced by ones that tell on the first listener, and put back with the last.

The trio thread's. What a listener does with a request it does at once and quickly, for the request waits.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from agentfuse.processes import Process, Processes

if TYPE_CHECKING:
    from agentfuse.fuse.operations import Operations

log = logging.getLogger(__name__)

_NOBODY = Process(0, "")


class Subject(NamedTuple):
    """What a request is about. Paths are below the mountpoint; None for a file that has none any more."""

    path: bytes | None = None
    to: bytes | None = None
    offset: int | None = None
    size: int | None = None
    thread: int = 0


class Traced(NamedTuple):
    """One request: ``at`` when it came, in Unix time, ``errno`` 0 when it went well.

    ``size`` is what was read or written, or what was asked for when that failed.
    """

    at: float
    operation: str
    process: Process
    region: str
    path: str | None
    to: str | None
    offset: int | None
    size: int | None
    errno: int
    spent_ns: int

    def as_dict(self) -> dict[str, object]:
        """JSON values; bytes that are no UTF-8 are lone surrogates."""
        return {
            "time": round(self.at, 6),
            "operation": self.operation,
            "pid": self.process.pid or None,
            "process": self.process.name or None,
            "region": self.region or None,
            "path": self.path,
            "to": self.to,
            "offset": self.offset,
            "size": self.size,
            "errno": errno.errorcode.get(self.errno, str(self.errno)) if self.errno else None,
            "duration_us": round(self.spent_ns / 1000, 1),
        }


Listener = Callable[[Traced], None]


class Tracer:
    """The tracer of one mount's handlers. ``region_of`` tells the region of a path."""

    def __init__(self, operations: Operations, region_of: Callable[[bytes], str]) -> None:
        self._operations = operations
        self._region_of = region_of
        self._listeners: list[Listener] = []
        self._processes = Processes()

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return len(self._listeners)

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Tell ``listener`` of every request that comes meanwhile; forgetting and FLUSH, which is never sent,
        are left out.
        """
        if not self._listeners:
            for operation in _SUBJECTS:
                setattr(self._operations, operation, self._telling(operation))
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)
            if not self._listeners:
                for operation in _SUBJECTS:
                    delattr(self._operations, operation)

    def _telling(self, operation: str) -> Callable[..., Awaitable[Any]]:
        plain = getattr(self._operations, operation)

        async def handle(*args: Any) -> Any:
            begun = perf_counter_ns()
            subject, process = self._before(operation, args)
            result, number = None, 0
            try:
                result = await plain(*args)
            except FUSEError as error:
                number = error.errno
                raise
            finally:
                spent_ns = perf_counter_ns() - begun
                self._after(operation, subject, process, result=result, number=number, spent_ns=spent_ns)
            return result

        return handle

    def _before(self, operation: str, args: Sequence[Any]) -> tuple[Subject, Process]:
        """Who asks for what, while the names still are what they are in the request."""
        try:
            subject = _SUBJECTS[operation](self._operations, args)
            return subject, self._processes.of(subject.thread)
        except Exception:  # noqa: BLE001  # a number that nobody knows: the handler says so
            return Subject(), _NOBODY

    def _after(
        self, operation: str, subject: Subject, process: Process, *, result: Any, number: int, spent_ns: int
    ) -> None:
        try:
            size = subject.size
            if operation == "read" and result is not None:
                size = len(result)
            elif operation == "write" and result is not None:
                size = result
            elif isinstance(result, EntryAttributes) and not result.st_ino:
                number = errno.ENOENT  # answered as a name to be remembered as missing
            traced = Traced(
                at=time.time() - spent_ns / 1e9,
                operation=operation,
                process=process,
                region="" if subject.path is None else self._region_of(subject.path),
                path=_text(subject.path),
                to=_text(subject.to),
                offset=subject.offset,
                size=size,
                errno=number,
                spent_ns=spent_ns,
            )
            for listener in self._listeners:
                listener(traced)
        except Exception:
            log.exception("unexpected error while tracing")


def _text(path: bytes | None) -> str | None:
    return None if path is None else os.fsdecode(path)


# What a request is about, by the arguments that pyfuse3 hands to its handler --------------------------

_Subject = Callable[["Operations", Sequence[Any]], Subject]


def _thread(args: Sequence[Any]) -> int:
    return args[-1].pid if isinstance(args[-1], RequestContext) else 0


def _path(operations: Operations, nodeid: int) -> bytes | None:
    return operations.filesystem.inodes.get(nodeid).path()


def _join(operations: Operations, parent_id: int, name: bytes) -> bytes | None:
    parent = _path(operations, parent_id)
    return None if parent is None else parent + b"/" + name if parent else name


def _of_name(operations: Operations, args: Sequence[Any]) -> Subject:
    return Subject(_join(operations, args[0], args[1]), thread=_thread(args))


def _of_inode(operations: Operations, args: Sequence[Any]) -> Subject:
    return Subject(_path(operations, args[0]), thread=_thread(args))


def _of_setattr(operations: Operations, args: Sequence[Any]) -> Subject:
    size = args[1].st_size if args[2].update_size else None
    return Subject(_path(operations, args[0]), size=size, thread=_thread(args))


def _of_symlink(operations: Operations, args: Sequence[Any]) -> Subject:
    return Subject(_join(operations, args[0], args[1]), to=args[2], thread=_thread(args))


def _of_link(operations: Operations, args: Sequence[Any]) -> Subject:
    to = _join(operations, args[1], args[2])
    return Subject(_path(operations, args[0]), to=to, thread=_thread(args))


def _of_rename(operations: Operations, args: Sequence[Any]) -> Subject:
    old, new = _join(operations, args[0], args[1]), _join(operations, args[2], args[3])
    return Subject(old, to=new, thread=_thread(args))


def _of_handle(operations: Operations, args: Sequence[Any]) -> Subject:
    handle = operations.filesystem.content.handle(args[0])
    return Subject(handle.file.inode.path(), thread=handle.opener)


def _of_read(operations: Operations, args: Sequence[Any]) -> Subject:
    return _of_handle(operations, args)._replace(offset=args[1], size=args[2])


def _of_write(operations: Operations, args: Sequence[Any]) -> Subject:
    return _of_handle(operations, args)._replace(offset=args[1], size=len(args[2]))


def _of_listing(operations: Operations, args: Sequence[Any]) -> Subject:
    listing = operations.listing(args[0])
    return Subject(listing.inode.path(), thread=listing.opener)


def _of_nothing(operations: Operations, args: Sequence[Any]) -> Subject:
    return Subject(thread=_thread(args))


_SUBJECTS: dict[str, _Subject] = {
    **dict.fromkeys(("lookup", "mknod", "mkdir", "unlink", "rmdir", "create"), _of_name),
    **dict.fromkeys(("getattr", "readlink", "open", "opendir"), _of_inode),
    **dict.fromkeys(("getxattr", "setxattr", "listxattr", "removexattr"), _of_inode),
    **dict.fromkeys(("release", "fsync"), _of_handle),
    **dict.fromkeys(("readdir", "releasedir", "fsyncdir"), _of_listing),
    "setattr": _of_setattr,
    "symlink": _of_symlink,
    "link": _of_link,
    "rename": _of_rename,
    "read": _of_read,
    "write": _of_write,
    "statfs": _of_nothing,
}
TRACED = tuple(_SUBJECTS)
