"""Shinzo's archives: made, extracted, and refused where they are traps."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from agents_files import Agent, is_refused
from gateways import Gateway

from agentfuse.errors import QuotaExceededError
from agentfuse.gateway.shinzo import unpacking
from agentfuse.gateway.shinzo.unpacking import unpack
from agentfuse.gateway.spool import Spool

MIB = 1024 * 1024
TREE = {"d/a.txt": b"a" * 5000, "d/deep/b": bytes(range(256)) * 5000, "c": b""}


@pytest.fixture
def agent(gateway: Gateway) -> Iterator[Agent]:
    with gateway.client() as client:
        yield Agent(client)


def bring(agent: Agent, path: str, content: bytes, **fields: Any) -> None:
    encoded = base64.b64encode(content).decode()
    answer = agent.create(path, encoded, encoding="base64", overwrite=True, **fields)
    assert answer.status_code == 201, answer.text


def raw(agent: Agent, path: str) -> bytes:
    return agent.read(path, download="true").content


def pack(agent: Agent, where: str, output: str, **fields: Any) -> httpx.Response:
    body = {"paths": ["shared/t/d", "shared/t/c"], "outputPath": output} | fields
    return agent.ask("POST", where, body)


def extract(agent: Agent, output: str = "shared/out", **fields: Any) -> httpx.Response:
    return agent.ask("POST", "extract", {"archivePath": "shared/x", "outputPath": output} | fields)


def tar_of(*members: tuple[str | tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content) if info.isreg() else info.size
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "", **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.bz2", "x.tgz", "x"])
@pytest.mark.parametrize("new", [False, True])
def test_what_was_packed_comes_back(agent: Agent, name: str, new: bool) -> None:
    if new:
        where, fields = "archives", {"paths": ["/shared/t"], "output_path": f"/shared/{name}"}
        fields |= {"compression_level": 1, "outputPath": None}
    else:
        where, fields = "archive", {"compressionLevel": 0}
    for path, content in TREE.items():
        bring(agent, f"shared/t/{path}", content, permissions="700")
    agent.ask("POST", "directories/shared/t/d/empty")
    answer = pack(agent, where, f"shared/{name}", **fields)
    kind = {"x.tgz": "tar.gz", "x": "tar.gz"}.get(name, name[2:])
    assert answer.status_code == 201, answer.text
    size = agent.ask("GET", f"metadata/shared/{name}").json()["size"]
    assert answer.json() == {"path": f"/shared/{name}", "size": size, "format": kind, "skipped": 0}
    content = io.BytesIO(raw(agent, f"shared/{name}"))
    if kind == "zip":
        with zipfile.ZipFile(content) as archive:
            assert archive.testzip() is None
    else:
        with tarfile.open(fileobj=content) as tar:
            tar.getmembers()
    body = {"archivePath": f"shared/{name}", "outputPath": "shared/out/deep"}
    if new:
        body = {"archive_path": f"/shared/{name}", "destination": "/shared/out/deep"}
    answer = agent.ask("POST", "archives/extract" if new else "extract", body)
    assert (answer.status_code, answer.json()) == (
        200,
        {"destination": "/shared/out/deep", "files_extracted": 3, "skipped": 0},
    )
    top = "shared/out/deep/t" if new else "shared/out/deep"
    assert agent.names(top, recursive="true") == ["c", "d", "d/a.txt", "d/deep", "d/deep/b", "d/empty"]
    for path, expected in TREE.items():
        assert raw(agent, f"{top}/{path}") == expected
        assert agent.ask("GET", f"metadata/{top}/{path}").json()["permissions"] == "700"


def test_requests_for_archives_that_make_no_sense_are_refused(agent: Agent) -> None:
    bring(agent, "shared/t/c", b"1")
    bring(agent, "shared/t/d/f", b"1")
    for fields, status in (
        ({"paths": []}, 400), ({"paths": "x"}, 400), ({"paths": [5]}, 400), ({"paths": ["shared/none"]}, 404),
        ({"format": "rar"}, 400), ({"compressionLevel": 10}, 400), ({"compressionLevel": "x"}, 400),
        ({"outputPath": None}, 400), ({"outputPath": "shared/t"}, 400), ({"outputPath": "shared/t/c"}, 409),
        ({"outputPath": "shared/t/c/x"}, 400), ({"paths": ["../x"]}, 400),
        ({"outputPath": "workspace/x"}, 409),
    ):  # fmt: skip
        assert is_refused(pack(agent, "archive", "shared/x.zip", **fields), status)
    assert agent.names("shared") == ["t"]
    assert pack(agent, "archive", "shared/t/c", overwrite=True).status_code == 201
    bring(agent, "shared/x", zip_of(("f", b"1")))
    bring(agent, "shared/none.zip", b"text")
    for fields, status in (
        ({"archivePath": "shared/no"}, 404), ({"archivePath": None}, 400), ({"outputPath": None}, 400),
        ({"outputPath": "shared/x"}, 400), ({"outputPath": "../x"}, 400), ({"archivePath": "shared"}, 400),
        ({"archivePath": "shared/none.zip"}, 400), ({"outputPath": "shared/x/y"}, 400),
        ({"outputPath": "uploads"}, 409), ({"outputPath": ""}, 403),
    ):  # fmt: skip
        assert is_refused(extract(agent, **fields), status)
    assert agent.names("shared") == ["none.zip", "t", "x"]


def test_a_collision_is_refused_and_nothing_is_written(agent: Agent) -> None:
    bring(agent, "shared/out/b/f", b"old")
    bring(agent, "shared/x", tar_of(("a", b"1"), ("b/f", b"new"), ("c", b"3")))
    assert is_refused(extract(agent), 409, "ALREADY_EXISTS")
    assert agent.names("shared/out", recursive="true") == ["b", "b/f"]
    assert agent.content("shared/out/b/f") == "old"
    assert extract(agent, overwrite=True).json()["files_extracted"] == 3
    assert agent.content("shared/out/b/f") == "new"
    for members in ([("b", b"file where a directory is")], [("a/x", b"directory where a file is")]):
        bring(agent, "shared/x", zip_of(*members))
        for overwrite in (False, True):
            assert extract(agent, overwrite=overwrite).status_code in (400, 409)
    assert agent.names("shared/out", recursive="true") == ["a", "b", "b/f", "c"]


def test_links_within_an_archive_are_left_out_or_copied(agent: Agent) -> None:
    members = (("d/f", b"1"), (special("d/s", tarfile.SYMTYPE, "../d/f"), b""),
               (special("h", tarfile.LNKTYPE, "d/f"), b""))  # fmt: skip
    bring(agent, "shared/x", tar_of(*members))
    assert extract(agent).json() == {"destination": "/shared/out", "files_extracted": 2, "skipped": 1}
    assert agent.names("shared/out", recursive="true") == ["d", "d/f", "h"]
    assert agent.content("shared/out/h") == "1"


def test_names_that_are_not_utf8_survive(agent: Agent) -> None:
    agent.create("shared/t/%FF", "1")
    assert is_refused(
        agent.ask("POST", "archive", {"paths": ["shared/t"], "outputPath": "shared/x.zip"}), 400
    )
    agent.ask("POST", "archive", {"paths": ["shared/t"], "outputPath": "shared/x"})
    assert extract(agent).json()["files_extracted"] == 1
    assert agent.content("shared/out/t/%FF") == "1"
    plain = zip_of(("caf__", b"2"))
    for undeclared, name in ((b"caf\xc3\xa9", "café"), (b"caf\x82\x81", "caféü")):
        bring(agent, "shared/x", plain.replace(b"caf__", undeclared))
        assert extract(agent, "shared/zip").status_code == 200
        assert agent.content(f"shared/zip/{name}") == "2"


def zip_link(target: str) -> bytes:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zip_of((info, target.encode()))


def encrypted() -> bytes:
    data = bytearray(zip_of(("f", b"secret")))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def sparse_giant() -> bytes:
    info = special("giant", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"%011o\0" % (8 * 1024**3 - 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def pax_giant() -> bytes:
    info = special("x", tarfile.XHDTYPE, size=40 * MIB)
    return gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(41 * MIB))


def overlapping(count: int) -> bytes:
    """A zip whose entries are all the same bytes."""
    data = zip_of(("f", bytes(5 * MIB)), compression=zipfile.ZIP_DEFLATED)
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = data[start:end]
    entries = b"".join(entry[:-1] + bytes([33 + number]) for number in range(count))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(entries), start, 0)
    return data[:start] + entries + tail


TRAPS: dict[str, tuple[Callable[[], bytes], int]] = {
    "tar slip": (lambda: tar_of(("ok", b"1"), ("../evil", b"x")), 400),
    "tar slip within": (lambda: tar_of(("a/../../evil", b"x")), 400),
    "tar absolute": (lambda: tar_of(("/etc/evil", b"x")), 400),
    "zip slip": (lambda: zip_of(("../evil", b"x")), 400),
    "zip slip with backslashes": (lambda: zip_of(("..\\evil", b"x")), 400),
    "zip absolute": (lambda: zip_of(("/evil", b"x")), 400),
    "zip drive": (lambda: zip_of(("C:\\evil", b"x")), 400),
    "symlink out": (lambda: tar_of((special("l", tarfile.SYMTYPE, "../../x"), b"")), 400),
    "symlink absolute": (lambda: tar_of((special("l", tarfile.SYMTYPE, "/etc/passwd"), b"")), 400),
    "symlink then through it": (
        lambda: tar_of((special("l", tarfile.SYMTYPE, "d"), b""), ("l/x", b"1")),
        400,
    ),
    "hard link out": (lambda: tar_of((special("h", tarfile.LNKTYPE, "../x"), b"")), 400),
    "hard link to nothing": (lambda: tar_of((special("h", tarfile.LNKTYPE, "none"), b"")), 400),
    "zip symlink out": (lambda: zip_link("../../x"), 400),
    "device": (lambda: tar_of((special("null", tarfile.CHRTYPE), b"")), 400),
    "pipe": (lambda: tar_of((special("pipe", tarfile.FIFOTYPE), b"")), 400),
    "twice": (lambda: tar_of(("a", b"1"), ("a", b"2")), 400),
    "twice, written otherwise": (lambda: tar_of(("a", b"1"), ("./a", b"2")), 400),
    "file and directory": (lambda: tar_of(("a/b", b"1"), ("a", b"2")), 400),
    "long name": (lambda: tar_of(("n" * 300, b"1")), 400),
    "encrypted": (encrypted, 400),
    "sparse giant": (sparse_giant, 400),
    "giant header": (pax_giant, 400),
    "gzip bomb": (lambda: tar_of(("b", bytes(120 * MIB)), mode="w:gz"), 507),
    "bzip2 bomb": (lambda: bz2.compress(tar_of(("b", bytes(60 * MIB)))), 507),
    "zip bomb": (lambda: zip_of(("b", bytes(60 * MIB)), compression=zipfile.ZIP_DEFLATED), 507),
    "overlapping zip": (lambda: overlapping(60), 400),
    "bomb of zeros": (lambda: gzip.compress(bytes(10 * MIB)), 200),
    "truncated tar": (lambda: tar_of(("a", b"1"), ("b", b"2" * 5000))[:3000], 400),
    "truncated gzip": (lambda: tar_of(("a", bytes(5000)), mode="w:gz")[:-20], 400),
    "truncated zip": (lambda: zip_of(("a", b"1" * 5000))[:-10], 400),
    "garbage after the first": (lambda: tar_of(("a", b"1"))[:1024] + b"x" * 2048, 400),
    "damaged content": (lambda: zip_of(("a", b"content")).replace(b"content", b"CONTENT"), 400),
    "empty": (lambda: b"", 400),
    "text": (lambda: b"just text\n" * 100, 400),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused_and_nothing_is_written(agent: Agent, trap: str) -> None:
    make, status = TRAPS[trap]
    bring(agent, "shared/x", make())
    answer = extract(agent, overwrite=True)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert is_refused(answer, status)
        assert agent.names("shared", recursive="true", includeHidden="true") == ["x"]


def test_an_archive_of_too_many_files_or_bytes_is_given_up(tmp_path: Path) -> None:
    members = [(f"{number}", b"12") for number in range(20)]
    for content in (tar_of(*members), tar_of(*members, mode="w:gz"), zip_of(*members)):
        for max_bytes, max_files, fits in ((40, 20, True), (39, 20, False), (40, 19, False)):
            with Spool(tmp_path) as spool:
                archive = spool.begin()
                archive.write(content)
                if fits:
                    assert len(unpack(archive, spool, max_bytes=40, max_files=20).files) == 20
                else:
                    with pytest.raises(QuotaExceededError):
                        unpack(archive, spool, max_bytes=max_bytes, max_files=max_files)


def test_names_take_no_more_memory_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "_MAX_DIRECTORY_BYTES", 1000)
    for length, fits in ((100, True), (101, False)):
        with Spool(tmp_path) as spool:
            archive = spool.begin()
            archive.write(tar_of(*((f"{number}".ljust(length, "n"), b"") for number in range(10))))
            if fits:
                assert len(unpack(archive, spool, max_bytes=0, max_files=100).files) == 10
            else:
                with pytest.raises(QuotaExceededError, match="names"):
                    unpack(archive, spool, max_bytes=0, max_files=100)
