"""How long-running work tells whoever started it what it is doing. Knows no terminal and no socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a transfer. ``total_*`` is 0 while it is not known yet."""

    phase: Literal["restore", "scan", "flush", "verify"]
    done_files: int
    total_files: int
    done_bytes: int
    total_bytes: int


class Reporter(Protocol):
    """Where a mount's account of itself goes: a terminal, a log, a control connection.

    Called from any thread; must not block for long and must not raise.
    """

    def say(self, text: str) -> None:
        """One line of fact for a person."""

    def progress(self, moment: Progress) -> None:
        """A transfer moved; called at most some tens of times a second."""


class Silent:
    """The reporter of those who do not listen."""

    def say(self, text: str) -> None:
        """Drop the line."""

    def progress(self, moment: Progress) -> None:
        """Drop the moment."""
