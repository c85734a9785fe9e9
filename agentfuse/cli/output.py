"""What every verb prints: facts on stdout, errors and progress on stderr, each text made harmless.

Light on purpose: tables and bars are in ``tables`` and ``bars``, which need rich.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from agentfuse.config import count, format_size
from agentfuse.errors import AgentfuseError, ConfigError
from agentfuse.progress import Progress, Reporter
from agentfuse.redaction import redact

_PROGRESS_EVERY_S = 2.0
_PHASES = {
    "restore": "restoring",
    "scan": "looking for changes",
    "flush": "flushing",
    "verify": "verifying",
}


def plain(text: object) -> str:
    """A text that cannot move a terminal's cursor and can be written in any encoding that is UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


@contextlib.contextmanager
def until_nobody_reads() -> Iterator[None]:
    """Ends, in peace, what writes to stdout when whoever read it has seen enough."""
    try:
        yield
    except BrokenPipeError:
        # Or the interpreter would try once more, at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """One line of fact on stdout, at once."""
    _write(sys.stdout, text)


def note(text: str) -> None:
    """One line on stderr: progress, a warning."""
    _write(sys.stderr, text)


def print_json(value: object) -> None:
    """A value on stdout as JSON, ASCII only: names that are not UTF-8 are escaped lone surrogates."""
    _write(sys.stdout, json.dumps(value, indent=2), escape=False)


def print_error(error: AgentfuseError) -> None:
    """The one place where a verb's error reaches a person."""
    if isinstance(error, ConfigError) and error.problems:
        note(f"agentfuse: the configuration has {count(len(error.problems), 'mistake')}")
        for problem in error.problems:
            note(f"  {problem}")
        return
    note(f"agentfuse: {redact(error.message)}")
    if error.hint:
        note(f"  fix: {redact(error.hint)}")


class PlainReporter:
    """A mount's account without a terminal: lines, and of progress one every two seconds."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._last_progress = time.monotonic()

    def say(self, text: str) -> None:
        """The line, as it is."""
        self._tell(text)

    def progress(self, moment: Progress) -> None:
        """The moment as a line on stderr, if the last one is old enough."""
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_EVERY_S:
            self._last_progress = now
            note(describe(moment))


class LogReporter:
    """A mount's account without anybody watching."""

    def __init__(self) -> None:
        self._log = logging.getLogger("agentfuse")

    def say(self, text: str) -> None:
        """The line in the log."""
        self._log.info("%s", plain(text))

    def progress(self, moment: Progress) -> None:
        """Nothing: a log keeps facts."""


def terminal_reporter(tell: Callable[[str], None] = say) -> Reporter:
    """Bars if a person watches stderr, lines otherwise. ``tell`` prints what is said."""
    if sys.stderr.isatty():
        from agentfuse.cli.bars import BarReporter  # noqa: PLC0415  rich, only where it shows

        return BarReporter(tell)
    return PlainReporter(tell)


def describe(moment: Progress) -> str:
    """A moment of a transfer in words."""
    files = f"{moment.done_files} of {moment.total_files}" if moment.total_files else f"{moment.done_files}"
    size = format_size(moment.done_bytes)
    if moment.total_bytes:
        size += f" of {format_size(moment.total_bytes)}"
    return f"{_PHASES[moment.phase]}: {files} files, {size}"


def _write(stream: TextIO, text: str, *, escape: bool = True) -> None:
    try:
        stream.write(("\n".join(map(plain, text.split("\n"))) if escape else text) + "\n")
        stream.flush()
    except (OSError, ValueError):
        # Nobody reads any more (a closed pipe, a terminal that hung up: EIO), or the disk behind it is
        # full: no reason for a mount or a flush to end.
        return
