"""Logs: where they go and what a line looks like. The only place that sets up logging.

A terminal gets lines for people, journald lines with a priority (sd-daemon(3)), everything else JSON; a
configured format is used everywhere. One line is one fact, with the mount that it is of; what looks like a
credential is taken out. Levels concern agentfuse's own loggers: libraries, whose debug logs hold headers and
bodies, tell of warnings only.
"""

from __future__ import annotations

import errno
import json
import logging
import logging.handlers
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from agentfuse.errors import UsageError
from agentfuse.redaction import redact

LogFormat = Literal["auto", "text", "journald", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)
LEVELS = ("debug", "info", "warning", "error")

_FILE_BYTES = 4 * 1024 * 1024
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_OURS = logging.getLogger("agentfuse")


@dataclass(frozen=True, slots=True)
class Whose:
    """The mount that the lines of this process are of; a process of no mount has none."""

    agent: str
    execution: str
    mount: str


def log_to_stream(stream: TextIO, form: LogFormat, whose: Whose | None, environ: Mapping[str, str]) -> None:
    """Log to a stream, stderr, from now on."""
    if form == "auto":
        form = "text" if stream.isatty() else "journald" if is_journal(stream, environ) else "json"
    _use(logging.StreamHandler(stream), form, whose, environ)


def log_to_file(path: Path, form: LogFormat, whose: Whose | None, environ: Mapping[str, str]) -> None:
    """Log to a file from now on; it is rotated, so that nobody can fill the disk with it."""
    _use(_LogFile(path), "json" if form == "auto" else form, whose, environ)


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether what is written to the stream goes to journald, as systemd tells whom it starts."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def set_level(name: str) -> None:
    """Log what is at least so important, from now on. Raises ``UsageError`` for what is no level."""
    if name not in LEVELS:
        raise UsageError(f"{name!r} is no level", hint=f"there are {', '.join(LEVELS)}")
    _OURS.setLevel(name.upper())


def level() -> str:
    """The level now."""
    return logging.getLevelName(_OURS.level).lower()


def one_line(text: str) -> str:
    """A text that stays on its line: what a file's name may hold cannot pass for a line of its own."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class TextFormatter(logging.Formatter):
    """``12:30:01 WARNING [agent/execution] sync.background: message``; a traceback follows below."""

    def __init__(self, whose: Whose | None) -> None:
        super().__init__()
        self._whose = _brackets(whose)

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback's."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        head = f"{clock} {record.levelname} {self._whose}{_said(record)}"
        return "\n".join([head, *_traceback(self, record)])


class JournalFormatter(logging.Formatter):
    """``<4>[agent/execution] sync.background: message``; each line of a traceback with its priority, too."""

    def __init__(self, whose: Whose | None) -> None:
        super().__init__()
        self._whose = _brackets(whose)

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback's; journald has the time."""
        priority = next((number for least, number in _PRIORITIES if record.levelno >= least), 7)
        lines = [f"{self._whose}{_said(record)}", *_traceback(self, record)]
        return "\n".join(f"<{priority}>{line}" for line in lines)


class JsonFormatter(logging.Formatter):
    """One object: ``time, level, logger, message, agent, execution, mount``, and a ``traceback`` if any."""

    def __init__(self, whose: Whose | None) -> None:
        super().__init__()
        self._whose = {} if whose is None else asdict(whose)

    def format(self, record: logging.LogRecord) -> str:
        """The line, in ASCII: names that are not UTF-8 are escaped lone surrogates."""
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{clock}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
            **self._whose,
        }
        if traceback := _traceback(self, record):
            line["traceback"] = "\n".join(traceback)
        return json.dumps(line)


def _brackets(whose: Whose | None) -> str:
    return "" if whose is None else f"[{whose.agent}/{whose.execution}] "


def _said(record: logging.LogRecord) -> str:
    name = record.name.removeprefix("agentfuse").removeprefix(".")
    message = one_line(redact(record.getMessage()))
    return f"{name}: {message}" if name else message


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    if not record.exc_info:
        return []
    return list(map(one_line, redact(formatter.formatException(record.exc_info)).split("\n")))


_FORMATTERS = {"text": TextFormatter, "journald": JournalFormatter, "json": JsonFormatter}


def _use(handler: logging.Handler, form: LogFormat, whose: Whose | None, environ: Mapping[str, str]) -> None:
    handler.addFilter(_is_wanted)
    handler.setFormatter(_FORMATTERS[form](whose))
    logging.basicConfig(handlers=[handler], force=True, level=logging.WARNING)
    if _OURS.level == logging.NOTSET:
        set_level("debug" if environ.get("AGENTFUSE_DEBUG") else "info")


def _is_wanted(record: logging.LogRecord) -> bool:
    """Not pyfuse3's "error" that the kernel no longer waits for an answer: interrupted, or unmounted."""
    text = record.getMessage() if record.name == "pyfuse3" else ""
    return not ("fuse_reply_" in text and text.endswith(os.strerror(errno.ENOENT)))


class _LogFile(logging.handlers.RotatingFileHandler):
    """Readable by its owner only."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=_FILE_BYTES, backupCount=1, errors="backslashreplace")

    def _open(self) -> Any:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

        return open(self.baseFilename, "a", encoding="utf-8", errors=self.errors, opener=private)
