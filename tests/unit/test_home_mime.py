"""What kind of file it is, by its content and its name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentfuse.home.mime import HEAD_BYTES, UNKNOWN, type_of


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        (b"a.pdf", b"%PDF-1.7\n", "application/pdf"),
        (b"no-name", b"%PDF-1.7\n", "application/pdf"),
        (b"a.txt", b"\x89PNG\r\n\x1a\n" + bytes(20), "image/png"),
        (b"a.csv", b"a,b\n", "text/csv"),
        (b"A.JSON", b"{}", "application/json"),
        (b"a.md", "# ä".encode(), "text/markdown"),
        (b"a.pdf", b"<html>not found</html>", "text/plain"),
        (b"a.pdf", b"", "application/pdf"),
        (b"a.pdf", None, "application/pdf"),
        (b"README", b"hello\n", "text/plain"),
        (b"cut", b"x" * (HEAD_BYTES - 1) + "ä".encode()[:1], "text/plain"),
        (b"blob", bytes(range(256)), UNKNOWN),
        (b"\xff.csv", b"a", "text/csv"),
        (b"empty", b"", UNKNOWN),
    ],
)  # fmt: skip
def test_a_type_is_told_by_content_then_by_name(name: bytes, head: bytes | None, expected: str) -> None:
    assert type_of(name, head) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=40),
    st.sampled_from([b"", b"PK\x03\x04", b"\x1aE\xdf\xa3", b"\0\0\0\x18ftyp", b"RIFF"]),
    st.binary(max_size=300),
)
def test_no_content_and_no_name_breaks_it(name: bytes, begin: bytes, rest: bytes) -> None:
    assert "/" in type_of(name, begin + rest)
