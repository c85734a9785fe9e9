"""The inboxes of one mount together: their directories are checked and locked before, and all run at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import trio

from agentfuse.bindings import Inbox as Binding
from agentfuse.errors import ConfigError
from agentfuse.events.dropped import open_inbox
from agentfuse.events.inbox import Inbox

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """An inbox's directory, held for this process alone."""

    binding: Binding
    path: Path
    fd: int


def open_inboxes(
    bindings: Sequence[Binding], ours: Mapping[str, Path], *, agent: str, execution: str
) -> list[Opened]:
    """Open and lock the directories, of one mount. ``ours``: what must be neither in them nor around them.

    Raises ConfigError with all mistakes, or ``BusyError`` when another mount has one of them.
    """
    opened: list[Opened] = []
    problems: list[str] = []
    for number, binding in enumerate(bindings):
        path = Path(os.path.realpath(binding.of(agent=agent, execution=execution)))
        try:
            _require_apart(path, ours)
            opened.append(Opened(binding, path, open_inbox(path)))
        except ValueError as error:
            problems.append(f"inbox[{number}].directory: {path}: {error}")
    if problems:
        raise ConfigError(problems)
    return opened


def _require_apart(path: Path, ours: Mapping[str, Path]) -> None:
    for what, other in ours.items():
        real = Path(os.path.realpath(other))
        if path.is_relative_to(real) or real.is_relative_to(path):
            raise ValueError(f"the {what} {other} and this are one in the other; choose another directory")


class Inboxes:
    """All inboxes of one mount."""

    def __init__(self, inboxes: Sequence[Inbox]) -> None:
        self._inboxes = inboxes

    def settle(self) -> None:
        """See ``Inbox.settle``. Raises ``EnvironmentProblem``."""
        for inbox in self._inboxes:
            inbox.settle()

    async def run(self) -> None:
        """Take what comes, until cancelled."""
        async with trio.open_nursery() as nursery:
            for inbox in self._inboxes:
                nursery.start_soon(self._guarded, inbox)

    def as_list(self) -> list[dict[str, object]]:
        """Each one's state; see ``Inbox.as_dict``."""
        return [inbox.as_dict() for inbox in self._inboxes]

    @staticmethod
    async def _guarded(inbox: Inbox) -> None:
        try:
            await inbox.run()
        except Exception:
            log.exception("an inbox ends; its files stay there for the next mount")
