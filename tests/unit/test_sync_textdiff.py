"""Hunks say what turns one text into the other, and nothing that is far from a difference."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agentfuse.sync.textdiff import hunks
from agentfuse.sync.textmerge import split_lines

TEXTS = st.lists(st.sampled_from([b"a", b"b", b"c", b"", b"long line"]), max_size=30).map(b"\n".join)


@given(TEXTS, TEXTS)
@settings(max_examples=300, deadline=None)
def test_hunks_turn_one_text_into_the_other(before: bytes, after: bytes) -> None:
    lines, kept = split_lines(before), split_lines(after)
    offset = 0
    made = list(lines)
    for hunk in hunks(before, after):
        first = next(line for line in hunk)
        start = (first.before or 0) - 1 + offset if first.before else None
        if start is None:
            start = next((line.before - 1 + offset for line in hunk if line.before), (first.after or 1) - 1)
        old = [line.text for line in hunk if line.kind != "added"]
        new = [line.text for line in hunk if line.kind != "removed"]
        assert made[start : start + len(old)] == old
        made[start : start + len(old)] = new
        offset += len(new) - len(old)
    assert made == kept


def test_places_far_apart_are_hunks_of_their_own() -> None:
    before = b"\n".join(b"%d" % number for number in range(40))
    after = before.replace(b"\n5\n", b"\nfive\n").replace(b"\n30\n", b"\nthirty\n")
    found = list(hunks(before, after))
    assert [[(line.kind, line.before, line.after, line.text) for line in hunk] for hunk in found] == [
        [("same", n, n, b"%d" % (n - 1)) for n in (3, 4, 5)]
        + [("removed", 6, None, b"5"), ("added", None, 6, b"five")]
        + [("same", n, n, b"%d" % (n - 1)) for n in (7, 8, 9)],
        [("same", n, n, b"%d" % (n - 1)) for n in (28, 29, 30)]
        + [("removed", 31, None, b"30"), ("added", None, 31, b"thirty")]
        + [("same", n, n, b"%d" % (n - 1)) for n in (32, 33, 34)],
    ]
