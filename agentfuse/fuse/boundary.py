"""The edge to the kernel: errors become errno here and nowhere else, and requests are counted and timed.

pyfuse3 ends the whole session when a handler raises anything but FUSEError, so nothing else passes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from time import perf_counter_ns
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import trio
from pyfuse3 import FUSEError

from agentfuse.errors import AgentfuseError
from agentfuse.fuse.tally import Tally

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Gate:
    """Where requests that change the home wait while it must stand still. The trio thread's alone."""

    def __init__(self) -> None:
        self._opened: trio.Event | None = None
        self._holders = 0

    @property
    def is_closed(self) -> bool:
        """Whether who wants to change anything has to wait."""
        return self._opened is not None

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Nothing changes while anybody holds this."""
        if self._opened is None:
            self._opened = trio.Event()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._opened.set()
                self._opened = None

    async def passed(self) -> None:
        """Wait until it is open; the caller then acts without a checkpoint in between."""
        while self._opened is not None:
            await self._opened.wait()


class Handles(Protocol):
    """Whose handlers these are: ``tally`` counts them."""

    tally: Tally
    gate: Gate


S = TypeVar("S", bound=Handles)


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


def _answer(error: Exception, operation: str, tally: Tally) -> FUSEError:
    answer = to_fuse_error(error, operation)
    tally.failed(operation, answer.errno)
    return answer


def handler(
    function: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a FUSE handler of a plain function: being no coroutine, it acts without a checkpoint."""
    operation = function.__name__

    async def handle(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        tally = self.tally
        tally.requests[operation] += 1
        begun = perf_counter_ns()
        try:
            return function(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  # the edge: every error is answered
            raise _answer(error, operation, tally) from None
        finally:
            tally.took(operation, perf_counter_ns() - begun)

    functools.update_wrapper(handle, function)
    return handle


def changing_handler(
    function: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """As ``handler``, of a function that changes the home: it waits at the gate first."""
    operation = function.__name__

    async def handle(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        tally = self.tally
        tally.requests[operation] += 1
        begun = perf_counter_ns()
        try:
            if self.gate.is_closed:
                await self.gate.passed()
            return function(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  # the edge: every error is answered
            raise _answer(error, operation, tally) from None
        finally:
            tally.took(operation, perf_counter_ns() - begun)

    functools.update_wrapper(handle, function)
    return handle


def slow_handler(
    function: Callable[Concatenate[S, P], Awaitable[R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a FUSE handler of a coroutine: one that waits for a thread (fsync), so others go on meanwhile."""
    operation = function.__name__

    async def handle(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        tally = self.tally
        tally.requests[operation] += 1
        begun = perf_counter_ns()
        try:
            return await function(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  # the edge: every error is answered
            raise _answer(error, operation, tally) from None
        finally:
            tally.took(operation, perf_counter_ns() - begun)

    functools.update_wrapper(handle, function)
    return handle
