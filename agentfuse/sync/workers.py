"""A few threads that talk to the store while one thread walks the disk: bounded, and failing at once."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

_T = TypeVar("_T")

TRANSFERS = 4
"""Transfers at a time. Each may hold a pack in memory, so this bounds what a commit or restore takes."""


class Workers:
    """Runs work in threads and what follows from it in the thread of the caller, never two at once.

    Use it as a context manager: leaving it waits for what runs. After an error nothing more is begun, and
    the first error comes out of :meth:`submit` or :meth:`finish`.
    """

    def __init__(self, limit: int = TRANSFERS) -> None:
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  only a home with contents needs it

        self._limit = limit
        self._executor = ThreadPoolExecutor(limit, thread_name_prefix="agentfuse-transfer")
        self._running: dict[Future[Any], Callable[[Any], None]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(cancel_futures=True)

    def make_room(self) -> None:
        """Wait until a thread is free, so that the next :meth:`submit` starts at once and cannot fail."""
        while len(self._running) >= self._limit:
            self._harvest()

    def submit(self, work: Callable[[], _T], then: Callable[[_T], None]) -> None:
        """Run ``work`` in a thread as soon as one is free, which this waits for, and ``then`` later here."""
        self.make_room()
        self._running[self._executor.submit(work)] = then

    def finish(self) -> None:
        """Wait for all work and what follows from it."""
        while self._running:
            self._harvest()

    def _harvest(self) -> None:
        from concurrent.futures import FIRST_COMPLETED, wait  # noqa: PLC0415

        for done in wait(self._running, return_when=FIRST_COMPLETED).done:
            self._running.pop(done)(done.result())
