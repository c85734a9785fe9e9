"""Finding lines in contents: by ripgrep, whose time grows with the content only, or else by Python's regular
expressions; in a process that is killed when the time is over.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import trio

from agentfuse.gateway.shinzo import searcher

_PIECE = 64 * 1024
_MAX_LINE_BYTES = 64 * 1024
_NO_PATTERN = 2  # the exit code, of both
_PREVIEW = "1000"
_RIPGREP = (
    *("--no-config", "--no-messages", "--color=never", "--no-heading", "--no-filename", "--no-line-number"),
    *("--byte-offset", "--text", "--encoding=none", "--no-mmap", "--threads=1", "--line-buffered"),
    *("--max-columns", _PREVIEW, "--max-columns-preview"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line that was found: where it begins, and its text, of which a long one's end is left out."""

    at: int
    text: str


class Matcher:
    """Looks for one pattern: a regular expression if it is one, else just text.

    ``ripgrep``: the program; None to do without.
    """

    def __init__(self, pattern: str, *, case_sensitive: bool, ripgrep: str | None) -> None:
        self._pattern = pattern
        self._case_sensitive = case_sensitive
        self._ripgrep = ripgrep
        self._is_literal = False

    async def lines(self, fd: int) -> AsyncGenerator[Line, None]:
        """The lines of a file that have it, from its beginning. Leave it within ``aclosing``: that ends the
        process."""
        while True:
            async with _running(self._command(), stdin=fd) as process:
                async with aclosing(_lines(process)) as lines:
                    async for line in lines:
                        yield line
                await process.wait()
            if process.returncode != _NO_PATTERN or self._is_literal:
                return
            self._is_literal = True

    def _command(self) -> Sequence[str]:
        if self._ripgrep:
            how = ["--case-sensitive" if self._case_sensitive else "--ignore-case"]
            how += ["--fixed-strings"] if self._is_literal else []
            return [self._ripgrep, *_RIPGREP, *how, "--regexp", self._pattern, "-"]
        pattern = re.escape(self._pattern) if self._is_literal else self._pattern
        return python("match", pattern, "" if self._case_sensitive else "i")


def find_ripgrep() -> str | None:
    """The program, None where it is not installed."""
    return shutil.which("rg")


def python(*arguments: str) -> list[str]:
    """The command that runs ``searcher``."""
    return [sys.executable, "-I", "-S", searcher.__file__, *arguments]


async def kill(process: trio.Process) -> None:
    """For ``trio.run_process``: no time to end by itself."""
    process.kill()


@asynccontextmanager
async def _running(command: Sequence[str], *, stdin: int) -> AsyncIterator[trio.Process]:
    """A process, killed when it is left."""
    own = os.open(f"/proc/self/fd/{stdin}", os.O_RDONLY | os.O_CLOEXEC)  # with a position of its own
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=own, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    finally:
        os.close(own)
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            if process.stdout:
                await process.stdout.aclose()


async def _lines(process: trio.Process) -> AsyncGenerator[Line, None]:
    assert process.stdout is not None
    left = b""
    while piece := await process.stdout.receive_some(_PIECE):
        *whole, left = (left + piece).split(b"\n")
        left = left[:_MAX_LINE_BYTES]
        for each in whole:
            at, _, text = each.partition(b":")
            yield Line(int(at), text.rstrip(b"\r").decode(errors="replace"))
