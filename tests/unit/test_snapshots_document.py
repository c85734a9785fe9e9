"""The snapshot document: what goes in comes out, and what is wrong in it is refused with its place."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from listings import Forest, directory, fifo, file, forests, listing, packed, snapshot, symlink, unpacked

from agentfuse.errors import AgentfuseError, IntegrityError
from agentfuse.regions import Creator
from agentfuse.snapshots import document
from agentfuse.snapshots.document import decode, encode
from agentfuse.snapshots.entries import Entry

Lines = list[dict[str, Any]]

NASTY = listing(
    directory(b"d", mode=0o3775, mtime_ns=-1),
    file(b"d/\xff\xfe\n", b"content", mode=0, mtime_ns=-1_500_000_001, link=1),
    file(b"d/" + b"n" * 255, b"content", mode=0, mtime_ns=-1_500_000_001, link=1),
    file(b"empty", mtime_ns=32_503_680_000_000_000_001),
    file(b'quote " \\ \x01', b"x", xattrs=((b"user.a", b""), (b"user.\xff", b"\0\1"))),
    symlink(b"l", b"/etc/../\xff"),
    fifo("grün 🙂".encode()),
)


def test_everything_comes_back() -> None:
    before = snapshot(NASTY.values(), number=7, follows=4, resumes=3, reason="checkpoint", execution="Ü 1")
    assert decode(encode(before), "x") == before
    assert before.totals.files == 4
    assert before.totals.entries == 7
    assert before.totals.bytes == 7 + 1  # two names of one inode count once


def test_without_saying_what_it_follows_a_snapshot_follows_its_parent() -> None:
    header, lines = unpacked(encode(snapshot(NASTY.values(), number=7)))
    del header["follows"], header["resumes"]
    found = decode(packed(header, lines), "x")
    assert (found.parent, found.follows, found.resumes) == (6, 6, 0)


@given(forests)
def test_every_sound_listing_comes_back(forest: Forest) -> None:
    before = snapshot(forest.grow().values())
    assert decode(encode(before), "x") == before


def test_the_same_snapshot_gives_the_same_bytes() -> None:
    assert encode(snapshot(NASTY.values())) == encode(snapshot(NASTY.values()))


def test_ordinary_tools_read_and_verify_it(tmp_path: Path) -> None:
    path = tmp_path / "1.json.gz"
    path.write_bytes(encode(snapshot(NASTY.values())))

    def shell(command: str) -> str:
        return subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert json.loads(shell("zcat 1.json.gz | jq -c 'select(.totals).totals'")) == {
        "entries": 7,
        "files": 4,
        "bytes": 8,
    }
    assert shell("zcat 1.json.gz | jq -r 'select(.type == \"symlink\").path'") == "l\n"
    seal = shell("zcat 1.json.gz | jq -r 'select(.seal).seal'").strip()
    assert shell("zcat 1.json.gz | head -n -1 | sha256sum").split()[0] == seal


def test_entries_read_well() -> None:
    _, lines = unpacked(
        encode(
            snapshot(
                listing(
                    file(b"a/b", b"x", mode=0o4755, mtime_ns=1_700_000_000_000_000_001), directory(b"a")
                ).values()
            )
        )
    )
    sha256 = file(b"", b"x").sha256
    assert lines[2] == {
        "path": "a/b",
        "type": "file",
        "mode": "4755",
        "mtime": "1700000000.000000001",
        "size": 1,
        "sha256": sha256,
        "object": sha256,
        "offset": 0,
        "length": 1,
    }


def test_any_flipped_bit_is_found() -> None:
    whole = encode(snapshot(NASTY.values()))
    rng = random.Random(0)
    for position in rng.sample(range(len(whole) * 8), 200):
        if position // 8 in range(4, 10):
            continue  # the time, the flags and the system of the gzip header say nothing about the content
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(IntegrityError, match="snapshot the-key"):
            decode(bytes(damaged), "the-key")


def test_any_truncation_is_found() -> None:
    whole = encode(snapshot(NASTY.values()))
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        with pytest.raises(IntegrityError):
            decode(whole[:length], "x")


def test_what_follows_the_document_is_refused() -> None:
    with pytest.raises(IntegrityError, match="not its own"):
        decode(encode(snapshot(NASTY.values())) * 2, "x")


def test_a_changed_line_breaks_the_seal() -> None:
    body = gzip.decompress(encode(snapshot(NASTY.values())))
    with pytest.raises(IntegrityError, match="seal is not"):
        decode(gzip.compress(body.replace(b'"mode":"0755"', b'"mode":"0777"', 1)), "x")
    with pytest.raises(IntegrityError, match="without a seal"):
        decode(gzip.compress(body[: body.rindex(b'{"seal')]), "x")


def test_a_newer_format_is_refused_and_said_to_be_newer() -> None:
    header, lines = unpacked(encode(snapshot(NASTY.values())))
    newer = packed(header | {"format": 3, "compression": "zstd"}, lines)
    with pytest.raises(IntegrityError, match=r"format 3.*knows up to 2.*newer one"):
        decode(newer, "x")


def test_only_what_others_than_the_agent_made_takes_a_newer_format() -> None:
    header, lines = unpacked(encode(snapshot(NASTY.values())))
    assert header["format"] == 1
    assert not [line for line in lines if "created_by" in line]
    mixed = listing(
        msgspec.structs.replace(directory(b"d"), created_by=Creator.USER),
        file(b"d/f", b"x", created_by=Creator.ENVIRONMENT),
        file(b"mine", b"y"),
    )
    before = snapshot(mixed.values())
    header, lines = unpacked(encode(before))
    assert header["format"] == 2
    assert [line.get("created_by") for line in lines] == [None, "user", "environment", None]
    assert decode(encode(before), "x") == before


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"created_by": "nobody"}, "Invalid enum value"),
        ({"created_by": "user"}, "nobody but the agent makes a symlink"),
    ],
)
def test_a_creator_that_cannot_be_is_refused(change: dict[str, str], problem: str) -> None:
    header, lines = unpacked(encode(snapshot(NASTY.values())))
    changed = [line | change if line["type"] == "symlink" else line for line in lines]
    with pytest.raises(IntegrityError, match=problem):
        decode(packed(header | {"format": 2}, changed), "x")


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_DOCUMENT_BYTES", 1_000_000)
    bomb = gzip.compress(bytes(100_000_000), compresslevel=1)
    with pytest.raises(IntegrityError, match="when unpacked"):
        decode(bomb, "x")


def test_more_entries_than_anybody_can_hold_are_neither_read_nor_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = snapshot(NASTY.values())
    written = encode(whole)
    monkeypatch.setattr(document, "MAX_ENTRIES", len(whole.entries))
    assert decode(encode(whole), "x") == whole
    monkeypatch.setattr(document, "MAX_ENTRIES", len(whole.entries) - 1)
    with pytest.raises(IntegrityError, match=r"more than .* entries"):
        decode(written, "x")
    with pytest.raises(AgentfuseError, match="entries"):
        encode(whole)


def test_a_listing_that_is_too_long_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_DOCUMENT_BYTES", 1000)
    with pytest.raises(AgentfuseError, match="limit"):
        encode(snapshot(NASTY.values()))


def _with(line: dict[str, Any], **changes: Any) -> Callable[[dict[str, Any], Lines], None]:
    def change(header: dict[str, Any], lines: Lines) -> None:
        lines.append({"path": "z", "type": "fifo", "mode": "0644", "mtime": "0.000000000"} | line | changes)
        header["totals"]["entries"] += 1
        header["totals"]["files"] += lines[-1]["type"] == "file"
        header["totals"]["bytes"] += lines[-1].get("size", 0)

    return change


SHA = "ab" * 32
FILE = {"type": "file", "size": 5, "sha256": SHA, "object": SHA, "offset": 0, "length": 5}


def _totals(header: dict[str, Any], lines: Lines) -> None:
    header["totals"]["bytes"] += 1


def _no_root(header: dict[str, Any], lines: Lines) -> None:
    del lines[0]
    header["totals"]["entries"] -= 1


def _nothing(header: dict[str, Any], lines: Lines) -> None:
    lines.clear()


def _disorder(header: dict[str, Any], lines: Lines) -> None:
    lines[1], lines[-1] = lines[-1], lines[1]


def _linked_alike(header: dict[str, Any], lines: Lines) -> None:
    _with(FILE, path="y", link=9)(header, lines)
    _with(FILE, path="z", link=9, mode="0600")(header, lines)
    header["totals"]["bytes"] -= 5


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_with({}, path="../escape"), "'..' component"),
        (_with({}, path="d/../z"), "'..' component"),
        (_with({}, path="/etc/passwd"), "absolute"),
        (_with({}, path="d//z"), "empty, '.' or"),
        (_with({}, path="z/"), "empty, '.' or"),
        (_with({}, path="."), "empty, '.' or"),
        (_with({}, path="z\0"), "NUL"),
        (_with({}, path="z" * 256), "255 bytes"),
        (_with({}, path="z/below"), "parent is not a directory"),
        (_with({}, path="link/passwd"), "parent is not a directory"),
        (_with({}, path="a/below"), "parent is not a directory"),
        (_with({}, path="d"), "duplicate, or not in tree order"),
        (_with({}, path=""), "empty, '.' or"),
        (_with({}, path="b"), "duplicate, or not in tree order"),
        (_with({}, path="z", path_b64="eg=="), "given once"),
        (_with({}, path=None), "given once"),
        (_with({}, path=7), r"Expected `str \| null`"),
        (_with({}, type="device"), "Invalid enum value"),
        (_with({}, mode="10644"), "matching regex"),
        (_with({}, mode=420), "Expected `str`"),
        (_with({}, mtime="yesterday"), "matching regex"),
        (_with({}, mtime="1.5"), "matching regex"),
        (_with({}, owner="root"), "unknown field"),
        (_with({}, size=5), "has no content"),
        (_with({}, link=1), "has no content"),
        (_with({}, target="x"), "needs a target"),
        (_with({}, xattrs=[{"name": "user.a", "value_b64": ""}]), "no extended attributes"),
        (_with(FILE, size=-1, length=-1), ">= 0"),
        (_with(FILE, size=2**63, length=2**63), "int|<="),
        (_with(FILE, offset=-1), ">= 0"),
        (_with(FILE, length=4), "differ"),
        (_with(FILE, length=None), "differ"),
        (_with(FILE, object=None), "differ"),
        (_with(FILE, sha256="AB" * 32), "matching regex"),
        (_with(FILE, object="../../../../etc/passwd"), "matching regex"),
        (_with(FILE, object=SHA + "\n"), "matching regex"),
        (_with(FILE, sha256=None), "without size or hash"),
        (_with(FILE, size=0, length=None, object=None), "hash of nothing"),
        (_with(FILE, xattrs=[{"name": "security.capability", "value_b64": "AQ=="}]), "not one that is kept"),
        (_with(FILE, xattrs=[{"name": "user.agentfuse.here", "value_b64": ""}]), "not one that is kept"),
        (_with(FILE, xattrs=[{"name": "user.a", "value_b64": ""}] * 2), "twice"),
        (_with({"type": "symlink"}), "needs a target"),
        (_with({"type": "symlink"}, target=""), "needs a target"),
        (_with({"type": "symlink"}, target="a\0b"), "NUL"),
        (_with({"type": "symlink"}, target="x" * 4096), "too long"),
        (_linked_alike, "same inode"),
        (_totals, "totals"),
        (_no_root, "first entry must be the root"),
        (_nothing, "there is no root"),
        (_disorder, "tree order|parent"),
        (lambda header, lines: header.pop("agent"), "missing required field `agent`"),
        (lambda header, lines: header.update(format="1"), "Expected `int`"),
        (lambda header, lines: header.update(kind="other"), "Invalid enum value"),
        (lambda header, lines: header.update(number=-1), ">= 1"),
        (lambda header, lines: header.update(parent=8), "8 upon 8"),
        (lambda header, lines: header.update(follows=8), "upon 7 cannot follow 8"),
        (lambda header, lines: header.update(follows=-1), ">= 0"),
        (lambda header, lines: header.update(resumes=7, follows=6), "follow 6 and resume 7"),
        (lambda header, lines: header.update(extra=1), "unknown field"),
    ],
)  # fmt: skip
def test_what_is_unsound_is_refused_with_its_document_and_place(
    change: Callable[[dict[str, Any], Lines], Any], complaint: str
) -> None:
    sound = listing(file(b"a", b"x"), directory(b"d"), symlink(b"link", b"/etc"))
    header, lines = unpacked(encode(snapshot(sound.values(), number=8)))
    assert decode(packed(header, lines), "x").entries == list(sound.values())
    change(header, lines)
    with pytest.raises(IntegrityError, match=f"snapshot the-key.*({complaint})"):
        decode(packed(header, lines), "the-key")


def test_unsound_listings_are_not_written() -> None:
    unplaced = msgspec.structs.replace(file(b"a", b"x"), object="")
    for bad in (unplaced, file(b"a/b", b"x"), Entry(path=b"a", type="dir", mode=0o10000, mtime_ns=0)):
        with pytest.raises(IntegrityError, match=r"cannot be written.*'a"):
            encode(snapshot(listing(bad).values()))
