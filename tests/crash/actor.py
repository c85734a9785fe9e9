"""One execution through all its lives, in a process of its own, and the journal that it keeps of them.

The journal lies outside of every mount; a record is written with one call, so that what was written is
whole. It is all that the judge knows of what was done and acknowledged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import invariants
from crash.hosts import AGENT, Daemon, Place, call_in_child
from crash.plan import Actor, Life
from crash.steps import Hands, Step, Tree, explains, read_tree, sizes_in
from crash.stored import Snapshots
from crash.workload import Workload

from agentfuse.errors import AgentfuseError

_T = TypeVar("_T")

START_ATTEMPTS = 5
GONE_S = 2.0
EIO_ATTEMPTS, EIO_PAUSE_S = 100, 0.02
_MAY_FAIL_WITH = (-signal.SIGKILL, 69, 75)  # killed, the store failed, not durable yet


# -- the records of a journal


@dataclass(frozen=True)
class Began:
    """A mount is ready. ``is_fresh``: it was restored since the life before; ``tree``: what is in it;
    ``newest``: the newest snapshot before that was restored.
    """

    life: int
    is_fresh: bool
    newest: int
    tree: Tree


@dataclass(frozen=True)
class Does:
    step: Step


@dataclass(frozen=True)
class Done:
    """The step before has succeeded."""


@dataclass(frozen=True)
class Calls:
    """A sync is asked for now."""

    number: int


@dataclass(frozen=True)
class Acknowledged:
    """It succeeded; ``newest`` is the newest snapshot after it. ``number`` 0: an unmount."""

    number: int
    newest: int


@dataclass(frozen=True)
class Wrong:
    """Something that is not as it must be."""

    what: str


@dataclass(frozen=True)
class Ended:
    """The daemon of a life has ended; ``step``: the kill point that was armed, if that is what ended it."""

    code: int
    step: str


Record = Began | Does | Done | Calls | Acknowledged | Wrong | Ended


class Journal:
    """Records, appended by several processes and read when they have ended."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, record: Record) -> None:
        data = pickle.dumps(record)
        assert os.write(self._fd, data) == len(data)


def read_journal(path: Path) -> Iterator[Record]:
    with contextlib.suppress(EOFError, FileNotFoundError), open(path, "rb") as file:
        while True:
            yield pickle.load(file)


class DaemonIsGone(Exception):  # noqa: N818  it is what was planned
    """The mount does not answer any more."""


class Performance:
    """An actor's lives, one after the other."""

    def __init__(self, place: Place, number: int, actor: Actor) -> None:
        self._place = place
        self._number = number
        self._actor = actor
        self._journal = Journal(place.journal(actor.execution))
        self._tokens = 0
        self._calls = 0
        self._waiting: list[int] = []
        self._rng = random.Random(f"{place.plan.seed} {number}")
        self._tree: Tree | None = None
        self._step: Step | None = None
        self._is_fresh = True
        self._newest = 0

    def play(self) -> None:
        for number, life in enumerate(self._actor.lives):
            time.sleep(life.after_ms / 1000)
            self._live(number, life)

    def _live(self, number: int, life: Life) -> None:
        if not self._is_fresh or number == 0:
            self._newest = newest_snapshot(self._place.store)
        daemon = self._started(life)
        if daemon is None:
            return
        hands = Hands(daemon.path / "shared", self._actor.journal_mode)
        try:
            self._begin(number, daemon)
            self._work(life, daemon, hands)
        except DaemonIsGone:
            pass
        except (OSError, AgentfuseError, sqlite3.Error) as error:
            if not daemon.has_ended(within_s=GONE_S):
                self._wrong(f"{self._step}: {type(error).__name__}: {error}")
        finally:
            hands.let_go()
        self._end(life, daemon)

    def _started(self, life: Life) -> Daemon | None:
        for attempt in range(START_ATTEMPTS):
            daemon = Daemon(self._place, self._actor.host, self._actor.execution)
            kill = life.kill if attempt == 0 else None
            if kill and kill.after_ms is not None:
                signal.signal(signal.SIGALRM, lambda *_, daemon=daemon: daemon.kill())
                signal.setitimer(signal.ITIMER_REAL, kill.after_ms / 1000)
            faults = () if attempt == START_ATTEMPTS - 1 else life.faults
            is_ready = daemon.start(kill, faults, life.seed + attempt)
            self._is_fresh |= daemon.has_restored
            if is_ready:
                return daemon
            self._note_end(life, daemon)
            if daemon.code not in _MAY_FAIL_WITH:
                self._wrong(f"a start ended with code {daemon.code}")
        self._wrong("no start succeeded, not even the last, which was without faults")
        return None

    def _begin(self, number: int, daemon: Daemon) -> None:
        assert daemon.status is not None
        home = self._place.home(self._actor.host, self._actor.execution)
        for line in invariants.wrong_books(daemon.status["regions"], home / "tree"):
            self._wrong(line)
        tree = self._look(daemon)
        if self._tree is not None and not self._is_fresh:
            why = explains(tree, self._tree, self._tree.after(self._step))
            if why:
                self._wrong(f"resumed after {self._step}: {why}")
        self._journal.write(Began(number, self._is_fresh, self._newest, tree))
        self._tree, self._step, self._is_fresh = tree, None, False

    def _look(self, daemon: Daemon) -> Tree:
        """What is in the mount. What was just restored is not always read: so contents are yet to come."""
        root = daemon.path / "shared"
        if daemon.restored_from is None or self._rng.random() < 0.5:
            return patiently(lambda: read_tree(root))
        _, tree = Snapshots(self._place.store).read(daemon.restored_from)
        tree.read_databases()
        found = sizes_in(root)
        if found != tree.sizes():
            self._wrong(f"restored from {daemon.restored_from}: sizes {found}, but stored {tree.sizes()}")
        return tree

    def _work(self, life: Life, daemon: Daemon, hands: Hands) -> None:
        assert self._tree is not None
        rng = random.Random(life.seed)
        workload = Workload(rng, self._tree, self._actor.execution, self._number, self._tokens)
        try:
            self._take(workload.beginning(), hands)
            for action in range(life.actions):
                if life.kill and life.kill.action == action:
                    daemon.kill()
                if action in life.syncs:
                    self._sync(daemon, background=life.background)
                self._take(workload.action(), hands)
                time.sleep(rng.random() * life.pause_ms / 1000)
            if life.end == "umount":
                self._take(workload.ending(), hands)
        finally:
            self._tokens = workload.tokens_used

    def _take(self, steps: Iterator[Step], hands: Hands) -> None:
        assert self._tree is not None
        for step in steps:
            self._step = step
            self._journal.write(Does(step))
            patiently(lambda: hands.perform(step))  # noqa: B023  called at once
            self._journal.write(Done())
            self._tree.apply(step)
            self._step = None

    def _sync(self, daemon: Daemon, *, background: bool) -> None:
        self._calls += 1
        number = self._calls
        self._journal.write(Calls(number))

        def sync() -> None:
            with contextlib.suppress(AgentfuseError):
                daemon.sync()
                self._journal.write(Acknowledged(number, newest_snapshot(self._place.store)))

        self._waiting.append(call_in_child(sync, self._place.log(self._actor.execution)))
        if not background:
            self._join()

    def _join(self) -> None:
        """Wait for the syncs that are under way: they hold what is open here."""
        for pid in self._waiting:
            os.waitpid(pid, 0)
        self._waiting = []

    def _end(self, life: Life, daemon: Daemon) -> None:
        self._join()
        code = daemon.umount() if life.end == "umount" else daemon.terminate()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if code == 0:
            self._journal.write(Acknowledged(0, newest_snapshot(self._place.store)))
        elif code not in _MAY_FAIL_WITH:
            self._wrong(f"a life ended with code {code}")
        self._note_end(life, daemon)

    def _note_end(self, life: Life, daemon: Daemon) -> None:
        was_killed = daemon.code == -signal.SIGKILL and life.kill is not None
        self._journal.write(Ended(daemon.wait(), life.kill.step if was_killed and life.kill else ""))

    def _wrong(self, what: str) -> None:
        self._journal.write(Wrong(f"{self._actor.execution}: {what}"))


def patiently(work: Callable[[], _T]) -> _T:
    """Do something that may need a content that has not come yet, and cannot as long as the store fails."""
    for _ in range(EIO_ATTEMPTS):
        try:
            return work()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        time.sleep(EIO_PAUSE_S)
    return work()


def newest_snapshot(store: Path) -> int:
    """The number of the newest snapshot, read without agentfuse's help; 0 when there is none."""
    snapshots = store / "agents" / AGENT / "shared" / "snapshots"
    names = os.listdir(snapshots) if snapshots.is_dir() else []
    return max((int(name.partition(".")[0]) for name in names if name[0] != "."), default=0)
