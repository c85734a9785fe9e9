"""Who this host is: a UUID in the state directory, and an epoch that only grows.

The state directory holds the mounts' homes, so what names it names their owner. An epoch is one life of a
gateway as an owner: from when it got its lease until it ended or lost it. Records of executions carry the
epoch that they were begun or adopted in (``Execution.epoch``), which is what fences them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentfuse.errors import EnvironmentProblem
from agentfuse.home.tree import locked_file, write_durably


class Identity:
    """This host. ``id`` never changes, ``epoch`` with :meth:`begin_epoch` only."""

    def __init__(self, directory: Path) -> None:
        self._epoch_file = directory / "host.epoch"
        self.id = _id_in(directory / "host.id")
        self.epoch = _number_in(self._epoch_file)

    def begin_epoch(self, beyond: int = 0) -> int:
        """A number above all that this host has had, and above ``beyond``; durable when this returns."""
        self.epoch = max(self.epoch, beyond) + 1
        write_durably(self._epoch_file, b"%d\n" % self.epoch)
        return self.epoch


@contextmanager
def claimed(state: Path) -> Iterator[Identity]:
    """The identity of a state directory, for one gateway at a time. Raises ``BusyError``.

    Two with the same homes could only get into each other's way; who wants two on a machine gives each a
    state directory, and they are two hosts.
    """
    directory = state / "gateway"
    busy = f"another gateway serves with {state}; stop it, or give this one another directory with --state"
    with locked_file(directory / "lock", busy, makes_directory=True):
        yield Identity(directory)


def _id_in(path: Path) -> str:
    text = _text_in(path)
    if text is None:
        text = str(uuid.uuid4())
        write_durably(path, f"{text}\n".encode())
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise EnvironmentProblem(
            f"{path}: this is no UUID",
            hint="write back the id that this host's executions name; without the file it is another host",
        ) from None


def _number_in(path: Path) -> int:
    text = _text_in(path) or "0"
    if not text.isdecimal():
        raise EnvironmentProblem(f"{path}: this is no number", hint="write the highest epoch that was in use")
    return int(text)


def _text_in(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: {error.strerror}", hint="the state directory must be readable"
        ) from error
