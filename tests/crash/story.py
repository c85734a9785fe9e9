"""What one execution did, as its journal tells it: its sessions, and every moment of its own directory."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property

from crash.actor import Acknowledged, Began, Calls, Does, Done, Ended, Record, Wrong, read_journal
from crash.hosts import Place
from crash.plan import Actor
from crash.steps import Picture, Step, Tree, is_mixture
from crash.workload import mine

_PAGE = 4096


@dataclass
class Session:
    """From a restore to the end of the home: one or more lives upon one tree on disk.

    ``first`` is what was restored. ``ends`` is what was left: two trees, because the last step may or may
    not have happened.
    """

    newest: int
    first: Tree
    ends: tuple[Tree, Tree]
    introduced: set[str] = field(default_factory=set)
    linked: set[str] = field(default_factory=set)
    """Tokens in files that had several names at some time."""

    @cached_property
    def left(self) -> set[str]:
        """The tokens that were surely there at the end."""
        return self.ends[0].tokens() & self.ends[1].tokens()

    @cached_property
    def taken_away(self) -> set[str]:
        """The tokens that it had before its eyes and may have removed."""
        return (self.first.tokens() | self.introduced) - self.left

    @cached_property
    def thinned(self) -> set[str]:
        """The tokens that it left in one file of several names: not under all of them any more."""
        return (self.first.linked_tokens() | self.linked) - self.ends[1].linked_tokens()


@dataclass(frozen=True)
class Ack:
    """A sync that was acknowledged. ``call`` and ``answer`` are moments; ``tokens`` were there at both."""

    call: int
    answer: int
    newest: int
    tokens: set[str]


@dataclass(frozen=True)
class Half:
    """A write of several requests, so that a part of it can be seen: the file's names and contents."""

    names: frozenset[str]
    old: bytes
    new: bytes


class Story:
    """``moments`` holds what the execution's own directory was after each step; after a step that was
    broken off, what it would have been. ``certain`` is the last that surely was. ``rows``: what a database
    at a path was to have in the end.
    """

    def __init__(self, place: Place, actor: Actor) -> None:
        self.execution = actor.execution
        self.own = mine(actor.execution)
        self.sessions: list[Session] = []
        self.moments: list[Picture] = [{}]
        self.certain = 0
        self.acks: list[Ack] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.wrong: list[str] = []
        self.killed_at: list[str] = []
        self._halves: dict[int, Half] = {}
        self._calls: dict[int, tuple[int, set[str]]] = {}
        self._step: Step | None = None
        for record in read_journal(place.journal(actor.execution)):
            self._read(record)
        self._stop()

    def find(self, tree: Tree, first: int, last: int | None = None) -> int | None:
        """The first of some moments at which the own directory was as it is in a tree; None: at none."""
        picture = tree.picture(self.own)
        numbers = range(
            max(0, first), len(self.moments) if last is None else min(last + 1, len(self.moments))
        )
        return next(
            (n for n in numbers if self.moments[n] == picture or self._is_half(n, tree, picture)), None
        )

    def _is_half(self, number: int, tree: Tree, picture: Picture) -> bool:
        half, moment = self._halves.get(number), self.moments[number]
        if half is None or picture.keys() != moment.keys():
            return False
        differ = {path for path in picture if picture[path] != moment[path]}
        return differ <= half.names and all(
            is_mixture(bytes(tree.names[path].content), half.old, half.new) for path in differ
        )

    def _read(self, record: Record) -> None:
        match record:
            case Began():
                self._begin(record)
            case Does():
                self._step = record.step
            case Done():
                self._apply()
            case Calls():
                self._calls[record.number] = (len(self.moments) - 1, self._now.tokens())
            case Acknowledged() if self.sessions:
                now = self._now.tokens()
                call, tokens = self._calls.get(record.number, (len(self.moments) - 1, now))
                self.acks.append(Ack(call, len(self.moments), record.newest, tokens & now))
            case Wrong():
                self.wrong.append(record.what)
            case Ended():
                self.killed_at += [record.step] if record.step else []

    @property
    def _now(self) -> Tree:
        return self.sessions[-1].ends[1]

    def _begin(self, began: Began) -> None:
        self._stop()
        now = copy.deepcopy(began.tree)
        if began.is_fresh or not self.sessions:
            if self.find(began.tree, self.certain) is None:
                self.wrong.append(f"{self.execution}: {self.own} was not restored as it was left")
            self.sessions.append(Session(began.newest, began.tree, (now, now)))
        else:
            self.sessions[-1].ends = (now, now)
        self.moments.append(now.picture(self.own))

    def _stop(self) -> None:
        """A life is over. A step that was begun may have happened."""
        if not self.sessions:
            return
        self.certain = len(self.moments) - 1
        if self._step is not None:
            before = copy.deepcopy(self._now)
            self._apply()
            self.sessions[-1].ends = (before, self._now)
        self.rows += [(path, list(rows)) for path, rows in self._now.rows.items()]

    def _apply(self) -> None:
        step, tree, session = self._step, self._now, self.sessions[-1]
        assert step is not None
        self._step = None
        node = tree.handles.get(step.handle)
        old = bytes(node.content) if node is not None and step.op in ("write", "append") else None
        tree.apply(step)
        if step.token:
            session.introduced.add(step.token)
        if step.op == "link":
            session.linked |= tree.linked_tokens()
        if node is not None and old is not None and _takes_several(step, len(old)):
            names = frozenset(path for path, each in tree.names.items() if each is node)
            self._halves[len(self.moments)] = Half(names, old, bytes(node.content))
        self.moments.append(tree.picture(self.own))


def _takes_several(step: Step, size: int) -> bool:
    """Whether a write crosses a page, where the kernel may make two requests of it."""
    begin = size if step.op == "append" else step.offset
    return begin // _PAGE != (begin + len(step.data()) - 1) // _PAGE
