"""The control API of a real mount, over its socket, and the Python clients of it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import msgspec
import pytest
from mounts import Home as Mounted
from openapi_spec_validator import validate

from agentfuse import client
from agentfuse.client import AsyncHome, Home
from agentfuse.control.client import ControlClient
from agentfuse.control.paths import encode
from agentfuse.control.registry import Registry
from agentfuse.control.route import Media
from agentfuse.control.routes import ROUTES
from agentfuse.errors import (
    BusyError,
    ChangedError,
    ExistsError,
    NotFoundError,
    QuotaExceededError,
    UsageError,
)

pytestmark = pytest.mark.mount

HOSTILE = [
    b'new\nline\tand "quotes" \'',
    b"not utf-8 \xff\xfe",
    b"%2e%2e?query#fragment&as=system",
    "žluťoučký 🐎".encode(),
    b"n" * 255,
]


@pytest.fixture(autouse=True)
def _empty_afterwards(home: Mounted, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    yield
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    there = Home(home.path)
    for region in ("uploads", "downloads", "shared"):
        for entry in there.list(region):
            there.delete(f"{region}/{entry.path}", recursive=True)
        assert home.usage(region) == (0, 0)
    assert os.listdir(home.tree / ".agentfuse" / "incoming") == []


@pytest.fixture
def there(home: Mounted) -> Home:
    """The mount, for Python programs."""
    return Home(home.path)


def socket_of(home: Mounted) -> Path:
    return Registry(home.runtime).find(home.path).socket


@pytest.fixture
def http(home: Mounted) -> Iterator[httpx.Client]:
    """The mount, for everybody else."""
    transport = httpx.HTTPTransport(uds=str(socket_of(home)), verify=False)
    with httpx.Client(transport=transport, base_url="http://agentfuse", timeout=30) as found:
        yield found


def url(route: str, region: str, path: bytes = b"") -> str:
    return f"/v1/{route}/{encode(region, path)}"


# Description -------------------------------------------------------------------------------------------


def test_the_description_is_valid_openapi_and_every_operation_in_it_answers(
    http: httpx.Client, there: Home
) -> None:
    document = http.get("/v1/openapi.json").json()
    validate(document)
    there.put(b"x", "uploads/a")
    there.put(b"x", "uploads/d/x")
    answers = {(route.method.lower(), route.path): route.answer for route in ROUTES}
    bodies = {
        "patch_regions_region": {"bytes_quota": 200 << 20},
        "post_move": {"from": "uploads/a", "to": "uploads/b"},
        "post_copy": {"from": "uploads/d/x", "to": "uploads/c"},
        "patch_stat_region_path": {"mode": "600"},
        "put_log_level": {"level": "info"},
        "post_drain": {"hold_s": 0},
        "post_parts_region": {"files": []},
    }
    answered = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            name = operation["operationId"]
            if name == "post_unmount":  # the other tests need the mount
                continue
            target = path.replace("{region}", "uploads").replace("{path}", "a")
            if name == "delete_files_region_path":
                target = target.removesuffix("a") + "b"
                there.put(b"x", "uploads/b")
            elif name == "get_files_region_path":
                target = target.removesuffix("a") + "d"
            elif name == "post_directories_region_path":
                target = target.removesuffix("a") + "new"
            body = bodies.get(name)
            with http.stream(method, target, json=body) as answer:
                said = answer.headers["content-type"].partition(";")[0]
                if said != "application/x-ndjson":  # which may go on for as long as the mount does
                    answer.read()
                told = answers[method, path]
                if not isinstance(told, Media):
                    assert msgspec.to_builtins(msgspec.convert(answer.json(), told)) == answer.json(), name
            declared = operation["responses"][str(answer.status_code)]["content"]
            assert said in declared or name.startswith("get_content"), name
            if name == "post_move":
                there.move("uploads/b", "uploads/a")
            answered.add(name)
    assert len(answered) == len(ROUTES) - 1


def test_the_status_has_the_fields_that_are_promised(there: Home) -> None:
    status = there.status()
    assert (status.state, status.pid > 0) == ("live", True)
    assert status.regions["uploads"].bytes_quota == 200 << 20


# Put and get ------------------------------------------------------------------------------------------


def test_what_is_put_is_in_the_home_for_everybody_and_comes_back(home: Mounted, there: Home) -> None:
    content = os.urandom(3_000_000)
    assert there.put(content, "uploads/deep/er/a.bin") == client.Put("uploads", "deep/er/a.bin", len(content))
    assert (home.path / "uploads/deep/er/a.bin").read_bytes() == content
    assert there.get("uploads/deep/er/a.bin") == content
    facts = there.stat("uploads/deep/er/a.bin")
    assert (facts.size, facts.type, facts.created_by) == (len(content), "file", "user")


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_survive_every_route(home: Mounted, there: Home, name: bytes) -> None:
    path = f"uploads/{os.fsdecode(name)}"
    assert there.put(b"content", path).path == os.fsdecode(name)
    assert os.listdir(os.fsencode(home.path / "uploads")) == [name]
    assert there.get(path) == b"content"
    assert [entry.path for entry in there.list("uploads")] == [os.fsdecode(name)]
    moved = there.move(path, f"downloads/{os.fsdecode(name)}")
    assert there.stat(f"downloads/{moved.path}").size == 7
    there.delete(f"downloads/{moved.path}")
    assert os.listdir(home.path / "downloads") == []


def test_a_name_of_256_bytes_is_refused_with_the_reason(there: Home) -> None:
    with pytest.raises(UsageError, match="longer than 255 bytes"):
        there.put(b"x", "uploads/" + "n" * 256)


@pytest.mark.parametrize(
    "path",
    ["..", "../x", "a/../../x", "a//b", "/etc/passwd", "a/", ".", "a/./b", "", "nul%00"],
)
def test_paths_that_lead_elsewhere_are_refused_on_every_route(
    home: Mounted, http: httpx.Client, path: str
) -> None:
    raw = path.replace(".", "%2e")
    for method, route in (("GET", "content"), ("PUT", "content"), ("DELETE", "files"), ("GET", "stat")):
        answer = http.request(method, f"/v1/{route}/uploads/{raw}", content=b"x" if method == "PUT" else None)
        assert (answer.status_code, answer.json()["code"]) == (400, "usage"), answer.text
        assert answer.json()["hint"]
    for body in (
        {"from": f"uploads/{path}", "to": "uploads/b"},
        {"from": "uploads/b", "to": f"shared/{path}"},
    ):
        answer = http.post("/v1/move", json=body)
        assert answer.status_code in {400, 404}, answer.text
    assert os.listdir(home.path / "uploads") == []


def test_a_slash_may_be_encoded_as_generated_clients_do(http: httpx.Client, there: Home) -> None:
    there.put(b"x", "uploads/a/b")
    assert http.get("/v1/content/uploads/a%2Fb").content == b"x"


def test_the_platforms_directory_is_no_region_and_cannot_be_written(there: Home, home: Mounted) -> None:
    for path in (".agentfuse/events.ndjson", ".agentfuse/new"):
        with pytest.raises(NotFoundError, match="no region"):
            there.put(b"forged", path)
        with pytest.raises((UsageError, NotFoundError)):
            there.put(b"forged", f"home/{path}")
    assert not (home.path / ".agentfuse" / "new").exists()


def test_the_status_that_the_agent_reads_is_as_fresh_for_who_is_outside(
    home: Mounted, there: Home, http: httpx.Client
) -> None:
    path = "home/.agentfuse/status.json"
    for size in (1234, 5):
        there.put(b"x" * size, "uploads/a")
        assert json.loads(there.get(path))["regions"]["uploads"]["bytes_used"] == size
    listed = next(each for each in there.list("home/.agentfuse") if each.path.endswith("status.json"))
    for facts in (there.stat(path), listed):
        assert (facts.size > 100, facts.mime) == (True, "application/json")
    part = http.get(f"/v1/content/{path}", headers={"Range": "bytes=0-0"})
    assert (part.status_code, part.content) == (206, b"{")


def test_a_symlink_of_the_agents_leads_no_privileged_write_or_read_out_of_the_home(
    home: Mounted, there: Home, scratch: Path
) -> None:
    (scratch / "secret").write_text("secret")
    (home.path / "uploads/x").symlink_to(scratch)
    (home.path / "uploads/file").symlink_to(scratch / "secret")
    with pytest.raises(UsageError):
        there.put(b"y", "uploads/x/y")
    with pytest.raises(NotFoundError):
        there.get("uploads/x/secret")
    with pytest.raises(UsageError, match="symlink"):
        there.get("uploads/file")
    with pytest.raises(NotFoundError):
        there.delete("uploads/x/secret")
    there.put(b"mine", "uploads/file")  # the name is replaced, not what it pointed to
    assert there.get("uploads/file") == b"mine"
    assert os.listdir(scratch) == ["secret"]
    assert (scratch / "secret").read_text() == "secret"


def test_a_put_above_the_quota_is_507_and_leaves_nothing(
    home: Mounted, there: Home, http: httpx.Client
) -> None:
    there.set_quota("uploads", bytes_quota=100_000)
    try:
        with pytest.raises(QuotaExceededError) as caught:
            there.put(b"x" * 100_001, "uploads/new/a")
        assert "agentfuse quota" in caught.value.hint

        def unknown_length() -> Iterator[bytes]:
            for _ in range(30):
                yield b"y" * 10_000

        answer = http.put("/v1/content/uploads/b", content=unknown_length())
        assert (answer.status_code, answer.json()["code"]) == (507, "quota_exceeded")
        assert http.put("/v1/content/uploads/c", content=b"z" * 100_000).status_code == 201
        assert http.put("/v1/content/uploads/d", content=b"z").status_code == 507
        assert {entry.path for entry in there.list("uploads", recursive=True)} <= {"c", "new"}
        assert home.usage("uploads")[0] == 100_000
    finally:
        there.set_quota("uploads", bytes_quota=200 << 20)


def test_collisions_replace_refuse_or_number(there: Home) -> None:
    for content in (b"1", b"2"):
        there.put(content, "uploads/a.tar.gz")
    assert there.get("uploads/a.tar.gz") == b"2"
    with pytest.raises(ExistsError):
        there.put(b"3", "uploads/a.tar.gz", on_collision="refuse")
    assert there.put(b"3", "uploads/a.tar.gz", on_collision="number").path != "a.tar.gz"
    assert there.get("uploads/a.tar.gz") == b"2"
    there.put(b"4", "uploads/b")
    with pytest.raises(ExistsError):
        there.move("uploads/b", "uploads/a.tar.gz")


def test_puts_of_one_name_at_the_same_time_leave_one_of_them_whole(home: Mounted, there: Home) -> None:
    contents = [bytes([65 + number]) * 400_000 for number in range(8)]
    problems: list[Exception] = []

    def put(content: bytes) -> None:
        try:
            Home(home.path).put(content, "uploads/same")
        except Exception as error:  # noqa: BLE001  # told below
            problems.append(error)

    threads = [threading.Thread(target=put, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert there.get("uploads/same") in contents
    assert [entry.path for entry in there.list("uploads")] == ["same"]


def test_a_client_that_leaves_within_its_put_leaves_nothing(home: Mounted, there: Home) -> None:
    with socket.socket(socket.AF_UNIX) as leaving:
        leaving.connect(str(socket_of(home)))
        head = b"PUT /v1/content/uploads/half HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        leaving.sendall(head + b"x" * 500_000)
    there.put(b"after", "uploads/after")
    with pytest.raises(NotFoundError):
        there.stat("uploads/half")


@pytest.mark.parametrize("size", [3, 5])
def test_a_body_of_another_length_than_announced_makes_no_file(home: Mounted, there: Home, size: int) -> None:
    with socket.socket(socket.AF_UNIX) as liar:
        liar.connect(str(socket_of(home)))
        liar.sendall(b"PUT /v1/content/uploads/lie HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        liar.sendall(b"x" * size)
        liar.shutdown(socket.SHUT_WR)
        answer = b""
        while data := liar.recv(65536):
            answer += data
    if size < 4:
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
        with pytest.raises(NotFoundError):
            there.stat("uploads/lie")
    else:  # what is behind the body belongs to no request of ours
        assert there.get("uploads/lie") == b"xxxx"


def test_who_waits_to_be_told_to_send_is_told_or_refused_before(home: Mounted) -> None:
    def ask(path: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(socket_of(home)))
            head = b"PUT /v1/content/" + path + b" HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            waiting.sendall(head + b"Content-Length: 4\r\n\r\n")
            return waiting.recv(65536)

    assert ask(b"uploads/a").startswith(b"HTTP/1.1 100 ")
    assert ask(b"nowhere/a").startswith(b"HTTP/1.1 404 ")


# Reading ----------------------------------------------------------------------------------------------


def settled_etag(http: httpx.Client, target: str) -> str:
    """The ETag once it stays: what was changed a moment ago has another one each time."""
    etag, before = "", None
    while etag != before:
        etag, before = http.get(target).headers["etag"], etag
    return etag


def test_ranges_and_etags_are_those_of_http(there: Home, http: httpx.Client) -> None:
    there.put(b"0123456789", "uploads/a.txt")
    target = "/v1/content/uploads/a.txt"
    whole = http.get(target)
    assert (whole.content, whole.headers["content-length"]) == (b"0123456789", "10")
    assert whole.headers["content-type"] == "text/plain"
    for asked, found, said in (
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=4-", b"456789", "bytes 4-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
    ):
        part = http.get(target, headers={"Range": asked})
        assert (part.status_code, part.content, part.headers["content-range"]) == (206, found, said)
    beyond = http.get(target, headers={"Range": "bytes=10-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */10")
    for ignored in ("bytes=5-2", "bytes=0-1,3-4", "lines=1-2", "bytes=-", f"bytes={'9' * 5000}-"):
        assert http.get(target, headers={"Range": ignored}).status_code == 200
    etag = settled_etag(http, target)
    assert http.get(target, headers={"If-None-Match": etag}).status_code == 304
    there.put(b"changed!!!", "uploads/a.txt")
    assert http.get(target, headers={"If-None-Match": etag}).content == b"changed!!!"
    old_part = http.get(target, headers={"Range": "bytes=0-1", "If-Range": etag})
    assert (old_part.status_code, old_part.content) == (200, b"changed!!!")


def test_an_empty_file_is_a_whole_answer(there: Home, http: httpx.Client) -> None:
    there.put(b"", "uploads/empty")
    answer = http.get("/v1/content/uploads/empty")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


def test_what_is_no_file_has_no_content(home: Mounted, there: Home) -> None:
    (home.path / "uploads/d").mkdir()
    os.mkfifo(home.path / "uploads/fifo")
    for path, what in (("d", "dir"), ("fifo", "fifo")):
        with pytest.raises(UsageError, match=what):
            there.get(f"uploads/{path}")
    with pytest.raises(NotFoundError, match="no 'uploads/nope'"):
        there.get("uploads/nope")
    with pytest.raises(NotFoundError) as caught:
        there.get("nowhere/a")
    assert "uploads" in caught.value.hint


def test_a_listing_comes_in_pages_each_name_once_and_in_order(
    home: Mounted, there: Home, http: httpx.Client
) -> None:
    for directory in ("b", "b/b", "a"):
        (home.path / "uploads" / directory).mkdir()
        for name in ("1", "2", "\udcff"):
            (home.path / "uploads" / directory / name).write_bytes(b"")
    everything = [entry.path for entry in there.list("uploads", recursive=True)]
    assert len(everything) == 12
    assert everything == sorted(everything, key=lambda path: os.fsencode(path).split(b"/"))
    for limit in (1, 2, 5, 12):
        found: list[str] = []
        cursor = None
        while True:
            query = {"recursive": "1", "limit": str(limit), **({"cursor": cursor} if cursor else {})}
            page = json.loads(http.get("/v1/files/uploads", params=query).content)
            found += [entry["path"] for entry in page["entries"]]
            assert len(page["entries"]) <= limit
            if (cursor := page["cursor"]) is None:
                break
        assert found == everything
    assert [entry.path for entry in there.list("uploads")] == ["a", "b"]
    assert [entry.path for entry in there.list("uploads/b/b")] == ["b/b/1", "b/b/2", "b/b/\udcff"]
    with pytest.raises(UsageError, match="not a directory"):
        list(there.list("uploads/a/1"))


def test_a_listing_goes_on_though_its_place_is_gone(home: Mounted, there: Home, http: httpx.Client) -> None:
    for name in ("a", "b", "c"):
        there.put(b"", f"uploads/{name}/x")
    query = {"recursive": "1", "limit": "4"}
    page = http.get("/v1/files/uploads", params=query).json()
    assert [entry["path"] for entry in page["entries"]] == ["a", "a/x", "b", "b/x"]
    there.delete("uploads/b", recursive=True)
    rest = http.get("/v1/files/uploads", params=query | {"cursor": page["cursor"]}).json()
    assert [entry["path"] for entry in rest["entries"]] == ["c", "c/x"]


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "cursor=%21", "recursive=maybe", "sort=size"])
def test_a_query_that_is_not_understood_is_refused(http: httpx.Client, query: str) -> None:
    answer = http.get(f"/v1/files/uploads?{query}")
    assert (answer.status_code, bool(answer.json()["hint"])) == (400, True)


def test_a_content_that_is_not_here_is_fetched_for_who_asks(
    new_home: Callable[..., Mounted], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(2_000_000)
    first = new_home().start()
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(first.runtime))
    there = Home(first.path)
    there.put(content, "shared/large")
    first.umount()
    first.start(fresh=True)
    assert hashlib.sha256(there.get("shared/large")).digest() == hashlib.sha256(content).digest()
    first.umount()


# Regions, the way into the store, the daemon ----------------------------------------------------------


def test_a_quota_is_changed_at_once_may_be_below_what_is_held_and_lasts(
    new_home: Callable[..., Mounted], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = new_home().start()
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    there = Home(home.path)
    there.put(b"x" * 1000, "uploads/a")
    use = there.set_quota("uploads", bytes_quota=500)
    assert (use.bytes_used, use.bytes_quota, use.files_quota) == (1000, 500, 50_000)
    with pytest.raises(OSError, match="Disk quota exceeded"), (home.path / "uploads/a").open("ab", 0) as file:
        file.write(b"y")
    there.set_quota("uploads", files_quota=1)
    home.kill()
    home.start()
    use = next(each for each in there.regions() if each.name == "uploads")
    assert (use.bytes_quota, use.files_quota) == (500, 1)
    with pytest.raises(QuotaExceededError):
        there.put(b"", "uploads/b")
    home.umount()


@pytest.mark.parametrize(
    ("region", "body", "status"),
    [
        ("nowhere", {"bytes_quota": 1}, 404),
        ("uploads", {}, 400),
        ("uploads", {"bytes_quota": -1}, 400),
        ("uploads", {"bytes_quota": 2**61}, 400),
        ("uploads", {"bytes": 1}, 400),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(
    http: httpx.Client, region: str, body: dict[str, int], status: int
) -> None:
    assert http.patch(f"/v1/regions/{region}", json=body).status_code == status


def test_a_checkpoint_begins_a_commit_and_waits_for_nothing(home: Mounted, there: Home) -> None:
    there.put(b"remember", "shared/a")
    assert set(there.checkpoint().regions) == {"shared"}
    there.sync()
    assert there.status().sync["shared"].dirty_files == 0


def test_while_a_mount_is_drained_nobody_changes_anything_and_then_all_goes_on(
    home: Mounted, there: Home
) -> None:
    there.put(b"before", "shared/a")
    lines = ControlClient(socket_of(home)).drain(hold_s=60)
    drained: dict[str, Any] = next(line["drained"] for line in lines if "drained" in line)
    assert drained["regions"]["shared"]["dirty_files"] == 0
    written = threading.Event()

    def write() -> None:
        (home.path / "shared/b").write_text("after")
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert there.get("shared/a") == b"before"
    assert not os.path.exists(home.tree / "shared/b")
    assert not written.is_set()
    lines.close()  # the client leaves
    assert written.wait(30)
    writer.join()
    assert there.get("shared/b") == b"after"


def test_a_drain_ends_by_itself(home: Mounted, there: Home) -> None:
    lines = list(ControlClient(socket_of(home)).drain(hold_s=0))
    assert "done" in lines[-1]
    there.put(b"x", "uploads/a")


def test_an_unmount_does_not_wait_for_a_drain(new_home: Callable[..., Mounted]) -> None:
    home = new_home().start()
    lines = ControlClient(socket_of(home)).drain(hold_s=600)
    assert any("drained" in line for line in [next(lines), next(lines)])
    home.umount()


def test_the_log_level_is_changed(home: Mounted, http: httpx.Client) -> None:
    assert http.put("/v1/log-level", json={"level": "debug"}).json() == {"level": "debug"}
    refused = http.put("/v1/log-level", json={"level": "loud"})
    assert (refused.status_code, "info" in refused.json()["message"]) == (400, False)
    http.put("/v1/log-level", json={"level": "info"})


def test_a_dump_shows_threads_and_tasks(http: httpx.Client) -> None:
    text = http.get("/v1/dump").text
    assert re.search(r"^thread MainThread", text, re.MULTILINE)
    assert "task " in text
    assert "pyfuse3" in text


# The clients ------------------------------------------------------------------------------------------


def test_files_of_every_kind_are_put(there: Home, scratch: Path) -> None:
    (scratch / "a.csv").write_text("a,b")
    assert there.put(scratch / "a.csv", "uploads/").path == "a.csv"
    assert there.put(str(scratch / "a.csv"), "uploads/b.csv").size == 3
    assert there.put(io.BytesIO(b"12345"), "uploads/c").size == 5
    reader, writer = os.pipe()
    os.write(writer, b"from a pipe")
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert there.put(pipe, "uploads/d").size == 11
    for source in (bytearray(b"123"), memoryview(b"123")):
        assert there.put(source, "uploads/e").size == 3
    with (scratch / "a.csv").open() as text, pytest.raises(UsageError, match="for text"):
        there.put(text, "uploads/f")  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match="cannot be read"):
        there.put(scratch / "nope", "uploads/")
    with pytest.raises(UsageError, match="is a directory"):
        there.put(b"bytes have no name", "uploads/")


def test_a_put_declares_its_creator_and_an_arrival_tells_it(there: Home) -> None:
    since = there.status().events.newest
    there.put(b"x", "uploads/by-system", creator="system")
    event = next(event for event in there.events(since=since, follow=True))
    assert (event.kind, event.path, event.created_by) == ("arrived", "by-system", "system")
    assert there.stat("uploads/by-system").created_by == "system"


def test_a_wrong_creator_is_told_which_there_are(there: Home) -> None:
    for act in (
        lambda: there.put(b"x", "uploads/a", creator="root"),
        lambda: there.move("uploads/a", "uploads/b", creator="root"),
    ):
        with pytest.raises(UsageError) as caught:
            act()
        assert "as is one of user, agent, environment, system" in caught.value.hint


def test_events_go_on_after_the_daemon_was_killed_each_once(
    new_home: Callable[..., Mounted], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = new_home().start()
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    there = Home(home.path)
    there.put(b"1", "uploads/1")
    events = there.events(follow=True)
    assert next(events).path == "1"
    home.kill()
    home.start()
    there.put(b"2", "uploads/2")
    assert next(events).path == "2"
    home.umount()
    assert list(events) == []
    with pytest.raises(NotFoundError):
        next(there.events())


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_awaited_events_end_with_the_mount(
    new_home: Callable[..., Mounted], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    home = new_home().start()
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))

    async def use() -> None:
        there = AsyncHome(home.path)
        await there.put(b"1", "uploads/1")
        events = there.events(follow=True, resume_s=math.inf)
        assert (await anext(events)).path == "1"
        await anyio.to_thread.run_sync(home.umount)
        assert [event async for event in events] == []

    anyio.run(use, backend=backend)


def test_events_end_with_the_mount_however_long_one_would_wait_for_a_killed_daemon(
    new_home: Callable[..., Mounted], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = new_home().start()
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    there = Home(home.path)
    there.put(b"1", "uploads/1")
    events = there.events(follow=True, resume_s=math.inf)
    next(events)
    home.umount()
    assert list(events) == []


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_asynchronous_client_does_the_same(home: Mounted, scratch: Path, backend: str) -> None:
    (scratch / "a").write_bytes(b"x" * 600_000)

    async def use() -> None:
        there = AsyncHome(home.path)
        assert (await there.status()).state == "live"
        since = (await there.status()).events.newest
        assert (await there.put(scratch / "a", "uploads/")).size == 600_000
        assert (await there.put(b"y", "uploads/b", creator="environment")).path == "b"

        async def pieces() -> Any:
            yield b"one"
            yield b"two"

        assert (await there.put(pieces(), "uploads/c")).size == 6
        assert await there.get("uploads/c") == b"onetwo"
        assert [entry.path async for entry in there.list("uploads")] == ["a", "b", "c"]
        seen = []
        async for event in there.events(since=since, follow=True):
            seen.append(event.path)
            if len(seen) == 3:
                break
        assert seen == ["a", "b", "c"]
        assert (await there.move("uploads/c", "shared/c")).region == "shared"
        assert (await there.stat("shared/c")).size == 6
        await there.delete("shared/c")
        with pytest.raises(NotFoundError):
            await there.get("shared/c")
        assert "shared" in (await there.sync())["regions"]
        assert {region.name for region in await there.regions()} >= {"uploads", "home"}

    anyio.run(use, backend=backend)


def test_a_source_that_becomes_shorter_makes_no_file(there: Home) -> None:
    class Shrinking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 10)) if self.tell() < 10 else b""

    with pytest.raises(BusyError, match="shorter"):
        there.put(Shrinking(b"x" * 100), "uploads/a")
    with pytest.raises(NotFoundError):
        there.stat("uploads/a")


def test_a_put_only_in_place_of_what_was_read(http: httpx.Client, there: Home) -> None:
    there.put(b"first", "uploads/a")

    def settled() -> str:
        """The ETag once it tells one change from the next."""
        while (etag := there.stat("uploads/a").etag) != there.stat("uploads/a").etag:
            pass
        return etag

    with there.open("uploads/a", offset=2, length=2, etag=settled()) as content:
        assert (content.size, content.offset, b"".join(content.pieces)) == (5, 2, b"rs")
    etag = settled()
    there.put(b"second", "uploads/a", if_match=etag, mode=0o600)
    assert there.stat("uploads/a").mode == "0600"
    with pytest.raises(ChangedError):
        there.put(b"lost", "uploads/a", if_match=etag)
    with pytest.raises(ChangedError):
        there.put(b"new", "uploads/missing", if_match=etag)
    with there.open("uploads/a", offset=2, length=2, etag=etag) as content:
        assert (content.offset, b"".join(content.pieces)) == (0, b"second")  # it is another one: all of it
    for header, status in (('"x"', 412), ("*", 400), ("x", 400), ('"a", "b"', 400)):
        answer = http.put(url("content", "uploads", b"a"), content=b"z", headers={"If-Match": header})
        assert answer.status_code == status, header
    assert there.get("uploads/a") == b"second"
    assert [entry.path for entry in there.list("uploads", brief=True)] == ["a"]
    with pytest.raises(UsageError):
        there.open("uploads/a", offset=6).__enter__()
    for name, body in (("mode", "9"), ("mode", "1777"), ("labels", "%"), ("is_frozen", "yes"), ("size", 1)):
        assert http.patch(url("stat", "uploads", b"a"), json={name: body}).status_code == 400, name
