"""What ``agentfuse doctor`` looks at: mistakes in a machine or a deployment, each with its fix.

A check is a function that yields findings, and raises what the part that it looks at raises: ``guarded``
makes that a finding, too. None waits for a filesystem that may be dead or hung.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from agentfuse.errors import AgentfuseError

Verdict = Literal["ok", "warn", "fail"]

MIN_DESCRIPTORS = 4096
"""Each file that programs in a home have open is one of the daemon's, too."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; ``fix`` is empty when there is nothing to fix."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


def guarded(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The check's findings; an error of ours is one, too."""
    try:
        yield from look()
    except AgentfuseError as error:
        yield Finding(check, "fail", error.message, error.hint)
    except OSError as error:
        yield Finding(check, "fail", f"{error.filename or ''} {error.strerror}".strip(), "see the message")
