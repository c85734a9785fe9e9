"""Whether what is in the store is what the journals say must be: the invariants of a seed that was played.

1. What a sync, or an unmount that exited with 0, acknowledged is in the store.
2. What was done before a kill is there after recovery. (The actor looks when it resumes, the judge later.)
3. Every snapshot is complete, and none is missing or doubled.
4. What an execution changed, and nobody who knew of it took away, is in the newest snapshot: at its place,
   merged, or under ``.conflicts/``.
5. The books equal the tree after a restart. (The actor looks.)
6. Every database in every snapshot is sound, and its rows are the first ones of those that were committed.
7. Every snapshot of an execution shows its own directory as it was at one moment: no file is torn, a log is
   the beginning of what was written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import invariants
from crash.hosts import AGENT, Place
from crash.steps import Tree
from crash.stored import Snapshots
from crash.story import Session, Story


class Judge:
    """Looks at a seed that was played and swept: nothing of it runs any more, all of it is in the store."""

    def __init__(self, place: Place) -> None:
        self.stories = [Story(place, actor) for actor in place.plan.actors]
        self._sessions = [session for story in self.stories for session in story.sessions]
        self._snapshots = Snapshots(place.store)
        self._authors: dict[int, str] = {}
        self._trees: dict[int, Tree] = {0: Tree()}
        self._tokens: dict[int, set[str]] = {0: set()}

    def wrong(self) -> list[str]:
        """Everything that is not as it must be, a line each."""
        lines = [line for story in self.stories for line in story.wrong]
        lines += invariants.wrong_history(self._snapshots.store, AGENT)
        if lines:
            return lines  # what cannot be read need not be judged
        for number in self._snapshots.numbers():
            lines += self._read(number)
        for story in self.stories:
            lines += self._moments(story)
            lines += self._acknowledged(story)
            lines += self._restored(story)
        lines += self._survived()
        return lines

    @property
    def snapshots(self) -> int:
        """How many there are."""
        return len(self._trees) - 1

    @property
    def _newest(self) -> int:
        return max(self._trees)

    # -- snapshots

    def _read(self, number: int) -> Iterator[str]:
        snapshot, tree = self._snapshots.read(number)
        self._authors[number] = snapshot.execution
        self._trees[number] = tree
        try:
            tree.read_databases()
        except AssertionError as error:
            yield f"snapshot {number} of {snapshot.execution}: {error}"
        self._tokens[number] = tree.tokens()
        for path, rows in tree.rows.items():
            if not any(rows == were[: len(rows)] for were in self._rows_of(path)):
                yield f"snapshot {number}: {path} has rows {rows}, which it never had"

    def _rows_of(self, path: str) -> list[list[str]]:
        """What a database was to have, wherever a conflict has put it."""
        name = re.sub(r"~\d+$", "", path)
        return [rows for story in self.stories for at, rows in story.rows if name.endswith(at)]

    # -- the invariants

    def _moments(self, story: Story) -> Iterator[str]:
        at = 0
        for number in range(1, self._newest + 1):
            before, tree = self._trees[number - 1], self._trees[number]
            if tree.picture(story.own) == before.picture(story.own):
                continue
            if self._authors[number] != story.execution:
                yield f"snapshot {number} of {self._authors[number]} changes {story.own}"
                return
            found = story.find(tree, at)
            if found is None:
                was = " although it was before" if story.find(tree, 0) is not None else ""
                yield f"snapshot {number}: {story.own} never was like that after moment {at}{was}"
                return
            at = found
        if story.find(self._trees[self._newest], story.certain) is None:
            yield f"{story.own} is not in the newest snapshot as it was left (but as at moment {at})"

    def _acknowledged(self, story: Story) -> Iterator[str]:
        for ack in story.acks:
            if ack.newest not in self._trees:
                yield f"snapshot {ack.newest}, which was there at an answer to {story.execution}, is gone"
                continue
            tree = self._trees[ack.newest]
            if story.find(tree, ack.call, ack.answer) is None:
                yield (
                    f"{story.own}: acknowledged at moment {ack.call} to {ack.answer}, but snapshot "
                    f"{ack.newest} is of moment {story.find(tree, 0)}"
                )
            lost = ack.tokens - self._tokens[ack.newest]
            yield from self._unexcused(
                lost, None, f"acknowledged to {story.execution}, snapshot {ack.newest}"
            )

    def _restored(self, story: Story) -> Iterator[str]:
        for session in story.sessions:
            first = session.first
            is_there = any(
                tree.picture() == first.picture() and tree.rows == first.rows
                for number, tree in self._trees.items()
                if number >= session.newest
            )
            if not is_there:
                yield f"{story.execution} was restored to what no snapshot from {session.newest} on holds"

    def _survived(self) -> Iterator[str]:
        for story in self.stories:
            for session in story.sessions:
                lost = session.left - self._tokens[self._newest]
                yield from self._unexcused(lost, session, f"left by {story.execution}")

    def _unexcused(self, lost: set[str], session: Session | None, what: str) -> Iterator[str]:
        """Of the tokens that are missing, those that nobody else took away who knew them."""
        for other in self._sessions:
            if other is not session:
                lost = lost - other.taken_away
        # Two may have given the names of one file to something else, each another one.
        thinned = Counter(token for each in self._sessions for token in each.thinned)
        lost = {token for token in lost if thinned[token] < 2}
        if lost:
            where = {token: self._last_seen(token) for token in sorted(lost)}
            yield f"lost, {what}: {where}"

    def _last_seen(self, token: str) -> str:
        numbers = [number for number, tokens in self._tokens.items() if token in tokens]
        return f"last in snapshot {max(numbers)}" if numbers else "in no snapshot"
