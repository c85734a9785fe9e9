"""What is different between two texts, by line, for people: hunks with some lines around. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from agentfuse.sync.textmerge import matching_blocks, split_lines

Kind = Literal["same", "removed", "added"]

_AROUND = 3


@dataclass(frozen=True, slots=True)
class Line:
    """A line; its number, from 1, in the text before and in the one after, where it is there."""

    kind: Kind
    before: int | None
    after: int | None
    text: bytes


def hunks(before: bytes, after: bytes) -> Iterator[list[Line]]:
    """The places that differ, each with up to three lines of what is the same before and after it."""
    hunk: list[Line] = []
    same: list[Line] = []  # since the last difference
    for line in _lines(split_lines(before), split_lines(after)):
        if line.kind == "same":
            same.append(line)
            continue
        if hunk and len(same) > 2 * _AROUND:
            yield hunk + same[:_AROUND]
            hunk = []
        hunk += same if hunk else same[-_AROUND:]
        hunk.append(line)
        same = []
    if hunk:
        yield hunk + same[:_AROUND]


def _lines(before: list[bytes], after: list[bytes]) -> Iterator[Line]:
    a = b = 0
    for block in [*matching_blocks(before, after), (len(before), len(after), 0)]:
        start_a, start_b, length = block
        for index in range(a, start_a):
            yield Line("removed", index + 1, None, before[index])
        for index in range(b, start_b):
            yield Line("added", None, index + 1, after[index])
        for index in range(length):
            yield Line("same", start_a + index + 1, start_b + index + 1, before[start_a + index])
        a, b = start_a + length, start_b + length
