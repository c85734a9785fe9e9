"""What only S3 stores have to show, on real ones: races, parts, signatures, refusals, outages."""

from __future__ import annotations

import io
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from s3_servers import Server

from agentfuse.errors import ObjectNotFoundError, StoreError, UsageError
from agentfuse.objectstore import open_store, probe
from agentfuse.objectstore.s3 import PART_BYTES, S3Store
from agentfuse.objectstore.s3_sdk import Patience
from agentfuse.objectstore.s3_url import parse_s3_url

EVERY_CALL: dict[str, Callable[[S3Store], object]] = {
    "get": lambda store: store.get("a"),
    "range": lambda store: store.get("a", offset=1, length=2),
    "nothing": lambda store: store.get("a", length=0),
    "stream": lambda store: list(store.stream("a")),
    "stat": lambda store: store.stat("a"),
    "list": lambda store: list(store.list("")),
    "put": lambda store: store.put("a", b"1"),
    "parts": lambda store: store.put("a", io.BytesIO(bytes(PART_BYTES + 1)), size_bytes=PART_BYTES + 1),
    "put_if_absent": lambda store: store.put_if_absent("a", b"1"),
    "delete": lambda store: store.delete("a"),
    "abandoned": lambda store: store.remove_leftovers("", 0),
    "probe": probe,
}


def opened(url: str, **patience: Any) -> S3Store:
    return S3Store(parse_s3_url(url), Patience(**patience))


@pytest.fixture
def store(s3: str) -> S3Store:
    return opened(s3)


def uploads(store: S3Store) -> list[Any]:
    location = parse_s3_url(store.url)
    found = store._client.list_multipart_uploads(Bucket=location.bucket, Prefix=location.prefix)
    return found.get("Uploads", [])


@pytest.mark.parametrize("size", [100, 6_000_000])
def test_of_twenty_writers_one_wins(s3: str, size: int) -> None:
    bodies = [number.to_bytes() * size for number in range(20)]
    stores = [opened(s3) for _ in bodies]
    barrier = threading.Barrier(len(bodies))
    won: list[int] = []

    def race(number: int) -> None:
        barrier.wait()
        if stores[number].put_if_absent("race/it", bodies[number]):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert stores[0].get("race/it") == bodies[won[0]]


@pytest.mark.parametrize("size", [PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES + 77])
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_large_sources_travel_in_parts(s3: str, size: int, checksums: str) -> None:
    store = opened(f"{s3}&checksums={checksums}")
    body = random.Random(size).randbytes(size)
    store.put("large", io.BytesIO(body), size_bytes=size)
    assert b"".join(store.stream("large")) == body
    assert store.get("large", offset=PART_BYTES - 3, length=7) == body[PART_BYTES - 3 : PART_BYTES + 4]
    assert store.stat("large").size_bytes == size
    assert uploads(store) == []


@pytest.mark.parametrize("given", [PART_BYTES + 9, 3 * PART_BYTES, 3 * PART_BYTES + 2])
def test_a_large_source_of_another_size_writes_nothing(store: S3Store, given: int) -> None:
    store.put("a", b"old")
    with pytest.raises(StoreError, match="the source gave"):
        store.put("a", io.BytesIO(bytes(given)), size_bytes=3 * PART_BYTES + 1)
    assert store.get("a") == b"old"
    assert uploads(store) == []


def test_a_large_source_that_fails_writes_nothing(store: S3Store) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 2 * PART_BYTES:
                raise UsageError("the file changed")
            return super().read(size)

    with pytest.raises(UsageError, match="the file changed"):
        store.put("a", Broken(bytes(4 * PART_BYTES)), size_bytes=4 * PART_BYTES)
    assert list(store.list("")) == []
    assert uploads(store) == []


def test_uploads_of_the_dead_are_ended_after_the_grace(store: S3Store) -> None:
    begun = []
    for key in ("agents/a/dead", "agents/b/dead"):
        where = store._where(key)
        begun.append(store._client.create_multipart_upload(**where)["UploadId"])
        store._client.upload_part(**where, UploadId=begun[-1], PartNumber=1, Body=bytes(PART_BYTES))
    store.put("agents/a/dead", b"an object of the same key")
    assert store.remove_leftovers("", 3600) == 0
    assert store.remove_leftovers("agents/a/", -60, dry_run=True) == 1  # times have seconds
    assert {each["UploadId"] for each in uploads(store)} == set(begun)
    assert store.remove_leftovers("agents/a/", -60) == 1
    assert [each["UploadId"] for each in uploads(store)] == begun[1:]
    assert store.remove_leftovers("", -60) == 1
    assert uploads(store) == []
    assert store.get("agents/a/dead") == b"an object of the same key"


def test_a_wrong_clock_of_this_host_ends_no_upload(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = store._client.create_multipart_upload(**store._where("under way"))["UploadId"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7 * 24 * 3600)
    assert store.remove_leftovers("", 3600) == 0
    store._client.abort_multipart_upload(**store._where("under way"), UploadId=upload)


def test_an_upload_that_was_ended_under_way_fails_and_can_be_done_again(store: S3Store) -> None:
    body = random.Random(1).randbytes(2 * PART_BYTES)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() == PART_BYTES:
                assert store.remove_leftovers("", -60) == 1
            return super().read(size)

    with pytest.raises(StoreError):
        store.put("a", Slow(body), size_bytes=len(body))
    assert list(store.list("")) == []
    store.put("a", io.BytesIO(body), size_bytes=len(body))
    assert store.get("a") == body


def test_a_presigned_url_opens_one_object_to_anybody(store: S3Store) -> None:
    store.put("dir/größe 1", b"0123456789")
    url = store.presign("dir/größe 1", 60)
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"0123456789"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=2-4"})) as answer:
        assert (answer.status, answer.read()) == (206, b"234")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url.replace("X-Amz-Expires=60", "X-Amz-Expires=61"))
    for ttl_s in (0, -1, 8 * 24 * 3600):
        with pytest.raises(UsageError, match="presigned"):
            store.presign("a", ttl_s)


@pytest.mark.parametrize("call", ["put", "parts", "put_if_absent"])
def test_what_arrives_damaged_is_not_stored(s3: str, call: str) -> None:
    store = opened(s3)

    def damage(request: Any, **_: Any) -> None:
        body = request.body.read() if hasattr(request.body, "read") else request.body
        request.body = bytes([body[0] ^ 1]) + bytes(body[1:])

    events, handlers = store._client.meta.events, ("before-send.s3.PutObject", "before-send.s3.UploadPart")
    for each in handlers:
        events.register(each, damage)
    try:
        with pytest.raises(StoreError, match="damaged"):
            EVERY_CALL[call](store)
    finally:
        for each in handlers:
            events.unregister(each, damage)
    assert list(store.list("")) == []
    assert uploads(store) == []


@pytest.mark.parametrize("call", EVERY_CALL)
def test_without_its_bucket_nothing_is_absent(s3: str, call: str) -> None:
    store = opened(s3.replace("s3://", "s3://no-"))
    with pytest.raises(StoreError, match="no such bucket") as caught:
        EVERY_CALL[call](store)
    assert not isinstance(caught.value, ObjectNotFoundError)


@pytest.fixture
def other_credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Sets an environment variable and forgets the clients that were made without it."""
    from agentfuse.objectstore.s3_sdk import shared_client  # noqa: PLC0415

    def change(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        shared_client.cache_clear()

    yield change
    shared_client.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "signature is wrong.*AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "unknown", "does not know this access key.*AWS_ACCESS_KEY_ID"),
    ],
)
def test_bad_credentials_are_named(
    radosgw: Server, other_credentials: Callable[[str, str], None], name: str, value: str, complaint: str
) -> None:
    other_credentials(name, value)
    store = opened(radosgw.url("contract", "bad"))
    for call in EVERY_CALL.values():
        with pytest.raises(StoreError, match=complaint) as caught:
            call(store)
        assert not isinstance(caught.value, ObjectNotFoundError)


def test_a_wrong_clock_is_named(radosgw: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.auth  # noqa: PLC0415

    right = botocore.auth.get_current_datetime
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda *a, **k: right(*a, **k).replace(year=2020)
    )
    with pytest.raises(StoreError, match=r"clock.*timedatectl"):
        probe(opened(radosgw.url("contract", "late")))


@pytest.mark.parametrize(
    ("action", "call"),
    [
        ("s3:GetObject", "get"),
        ("s3:PutObject", "put"),
        ("s3:DeleteObject", "delete"),
        ("s3:ListBucket", "list"),
    ],
)
def test_a_missing_permission_is_named_by_the_probe(radosgw: Server, action: str, call: str) -> None:
    name = f"deny-{call}"
    radosgw.make_bucket(name)
    policy = (
        '{"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*", "Action": "%s",'
        ' "Resource": ["arn:aws:s3:::%s", "arn:aws:s3:::%s/*"]}]}'
    )
    store = opened(radosgw.url(name))
    store.put("a", b"123")
    radosgw.client.put_bucket_policy(Bucket=name, Policy=policy % (action, name, name))
    operation = {"get": "GetObject", "put": "PutObject", "delete": "DeleteObject", "list": "ListObjectsV2"}[
        call
    ]
    for ask in (EVERY_CALL[call], probe):
        with pytest.raises(StoreError, match=f"{operation}.*access denied.*{action}"):
            ask(store)


def test_the_probe_refuses_a_store_that_ignores_the_condition(juicefs_gateway: Server) -> None:
    store = open_store(juicefs_gateway.url("refused", "some/where"))
    with pytest.raises(StoreError, match="ignores put-if-absent"):
        probe(store)
    assert list(store.list("")) == []


def test_during_an_outage_nothing_is_absent_and_afterwards_all_is_there(radosgw: Server) -> None:
    store = opened(radosgw.url("contract", "outage"), attempts=1)
    store.put("a", b"before")
    radosgw.outage()
    try:
        for call in EVERY_CALL.values():
            with pytest.raises(StoreError, match=r"connection (refused|broke)") as caught:
                call(store)
            assert not isinstance(caught.value, ObjectNotFoundError)
    finally:
        radosgw.back()
    assert store.get("a") == b"before"
    probe(store)
