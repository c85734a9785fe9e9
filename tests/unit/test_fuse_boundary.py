"""The edge to the kernel: what a handler raises becomes an errno; what was not foreseen is logged once."""

from __future__ import annotations

import errno
import logging

import pytest
from pyfuse3 import FUSEError

from agentfuse.errors import QuotaExceededError, StoreError
from agentfuse.fuse.boundary import handler, slow_handler
from agentfuse.fuse.tally import Tally
from agentfuse.timings import number_of


class Raises:
    """Handlers that raise what they are given."""

    def __init__(self) -> None:
        self.tally = Tally()

    @handler
    def read(self, error: Exception) -> bytes:
        raise error

    @slow_handler
    async def fsync(self, error: Exception | None) -> None:
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FUSEError(errno.ENOTEMPTY), errno.ENOTEMPTY),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EMFILE, "our own limit, not the caller's"), errno.ENFILE),
        (QuotaExceededError("full"), errno.EDQUOT),
        (StoreError("unreachable"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
    ],
)
@pytest.mark.parametrize("operation", ["read", "fsync"])
async def test_an_error_becomes_its_errno(
    error: Exception, code: int, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FUSEError) as raised:
        await getattr(Raises(), operation)(error)
    assert raised.value.errno == code
    assert not caplog.records


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyError("x"), OSError("no errno"), RecursionError()])
@pytest.mark.parametrize("operation", ["read", "fsync"])
async def test_what_nobody_foresaw_is_eio_and_one_traceback(
    error: Exception, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FUSEError) as raised:
        await getattr(Raises(), operation)(error)
    assert raised.value.errno == errno.EIO
    assert [(record.levelno, record.exc_info and record.exc_info[1]) for record in caplog.records] == [
        (logging.ERROR, error)
    ]


async def test_requests_are_counted_and_timed_whether_they_succeed_or_not() -> None:
    handlers = Raises()
    for number in (errno.EIO, errno.EIO, errno.EDQUOT):
        with pytest.raises(FUSEError):
            await handlers.read(OSError(number, ""))
    await handlers.fsync(None)
    tally = handlers.tally
    assert {name: n for name, n in tally.requests.items() if n} == {"read": 3, "fsync": 1}
    assert tally.errors == {("read", errno.EIO): 2, ("read", errno.EDQUOT): 1}
    assert {name: number_of(t) for name, t in tally.timings.items() if any(t)} == {"read": 3, "fsync": 1}
