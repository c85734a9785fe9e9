"""Freezing files of a mounted home, for who is outside: from when it is asked, until the mark is durable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from agentfuse.errors import BusyError
from agentfuse.home.frozen import Frozen, Whereabouts, locate, set_mark

_T = TypeVar("_T")


class Freezer:
    """Freezes files below ``tree``, and thaws them. The trio thread's.

    ``is_written``: whether a file, given by its inode, is open for writing. ``remember``: keeps the paths of
    all that are frozen for the next mount of the home.
    """

    def __init__(
        self,
        tree: Path,
        frozen: Frozen,
        is_written: Callable[[int], bool],
        remember: Callable[[Iterable[bytes]], None],
    ) -> None:
        self._tree = tree
        self._frozen = frozen
        self._is_written = is_written
        self._remember = remember
        self._one = trio.Lock()
        self._limiter = trio.CapacityLimiter(1)

    async def set_frozen(self, path: bytes, *, frozen: bool) -> int:
        """Freeze a file, given from the home's root, or thaw it; its inode. It is durable then.

        Raises ``OSError`` when it cannot be found, ``WrongTypeError`` for what is no file, ``BusyError``
        for one that somebody has open for writing, who would go on.
        """
        async with self._one:
            file = await self._in_thread(partial(locate, self._tree, path))
            with trio.CancelScope(shield=True):
                await (self._freeze(file) if frozen else self._thaw(file))
        return file.ino

    async def _freeze(self, file: Whereabouts) -> None:
        if self._is_written(file.ino):
            raise BusyError("somebody has the file open for writing", hint="ask again when it is closed")
        self._frozen.add(file)  # nobody changes or moves it from here on
        try:
            paths = self._frozen.paths()
            await self._in_thread(partial(self._remember, paths))
            await self._in_thread(partial(set_mark, self._tree, file, frozen=True))
        except BaseException:
            self._frozen.remove(file.ino)
            raise

    async def _thaw(self, file: Whereabouts) -> None:
        await self._in_thread(partial(set_mark, self._tree, file, frozen=False))
        self._frozen.remove(file.ino)
        await self._in_thread(partial(self._remember, self._frozen.paths()))

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(work, limiter=self._limiter)
