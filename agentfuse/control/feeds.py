"""What travels as NDJSON while it happens: lines of an unmount or a sync, for a client that may be slow."""

from __future__ import annotations

import collections
import json
from collections.abc import AsyncGenerator

import trio

HEARTBEAT_S = 1.0
_MAX_PENDING_LINES = 1000


class Feed:
    """Lines from an unmount or a sync to one client, never making it wait.

    Of progress only the newest is kept; of a client that does not read at all, the last thousand lines.
    """

    def __init__(self) -> None:
        self._lines: collections.deque[dict[str, object]] = collections.deque(maxlen=_MAX_PENDING_LINES)
        self._closed = False
        self._changed = trio.Event()

    def put(self, line: dict[str, object]) -> None:
        """Add a line."""
        if "progress" in line and self._lines and "progress" in self._lines[-1]:
            self._lines.pop()
        self._lines.append(line)
        self._changed.set()

    def close(self) -> None:
        """No line comes any more."""
        self._closed = True
        self._changed.set()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """NDJSON as it comes; an empty line whenever there was nothing for HEARTBEAT_S."""
        while True:
            if self._lines:
                yield b"".join(encode(line) + b"\n" for line in self._take())
            elif self._closed:
                return
            else:
                with trio.move_on_after(HEARTBEAT_S) as waiting:
                    await self._changed.wait()
                if waiting.cancelled_caught:
                    yield b"\n"
            if not self._lines and not self._closed:
                self._changed = trio.Event()

    def _take(self) -> list[dict[str, object]]:
        lines = list(self._lines)
        self._lines.clear()
        return lines


def error_line(message: str, hint: str, exit_code: int) -> dict[str, object]:
    """The last line of what failed."""
    return {"error": {"message": message, "hint": hint, "exit_code": exit_code}}


def encode(value: object) -> bytes:
    """JSON in ASCII only: a path that is not UTF-8 survives as lone surrogates, escaped."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")
