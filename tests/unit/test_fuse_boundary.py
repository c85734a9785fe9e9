"""The edge to the kernel: what a handler raises becomes an errno; what was not foreseen is logged once."""

from __future__ import annotations

import errno
import logging

import pytest
from pyfuse3 import FUSEError

from agentfuse.errors import QuotaExceededError, StoreError
from agentfuse.fuse.boundary import handler, requests_from_zero, slow_handler


class Raises:
    """Handlers that raise what they are given."""

    def __init__(self) -> None:
        self.requests = requests_from_zero()

    @handler
    def read(self, error: Exception) -> bytes:
        raise error

    @slow_handler
    async def fsync(self, error: Exception) -> None:
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


async def test_requests_are_counted_whether_they_succeed_or_not() -> None:
    handlers = Raises()
    for _ in range(3):
        with pytest.raises(FUSEError):
            await handlers.read(OSError(errno.EIO, ""))
    assert handlers.requests["read"] == 3
    assert sum(handlers.requests.values()) == 3
