"""Progress of a restore or a flush as bars on a terminal. Needs rich."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from agentfuse.cli.output import describe
from agentfuse.progress import Progress


class BarReporter:
    """Lines and one bar on stderr, which goes when its phase ends. Safe from any thread.

    A terminal that is gone (rich raises OSError, or SystemExit for a closed pipe) ends the bars, never
    the work that they tell of.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._bars: Bars | None = None
        self._task = TaskID(0)
        self._phase = ""

    def say(self, text: str) -> None:
        """The line, in place of the bar."""
        with self._lock:
            self._end()
            self._tell(text)

    def progress(self, moment: Progress) -> None:
        """Move the bar; a phase that is complete, or over, has none."""
        with self._lock:
            if moment.phase != self._phase:
                self._end()
            if 0 < moment.total_files <= moment.done_files and moment.total_bytes <= moment.done_bytes:
                self._end()
                return
            with contextlib.suppress(OSError, SystemExit):
                bars = self._bars or self._begin(moment)
                bars.update(
                    self._task,
                    description=describe(moment).partition(",")[0],
                    completed=moment.done_bytes,
                    total=moment.total_bytes or None,
                    refresh=True,
                )

    def _begin(self, moment: Progress) -> Bars:
        self._phase = moment.phase
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,  # no thread: a moment comes often enough
        )
        self._task = self._bars.add_task(describe(moment))
        self._bars.start()
        return self._bars

    def _end(self) -> None:
        if self._bars:
            with contextlib.suppress(OSError, SystemExit):
                self._bars.stop()
            self._bars = None
