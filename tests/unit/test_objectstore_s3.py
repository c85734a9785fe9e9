"""The S3 store against answers that real servers give rarely: lost, broken off, refused, absurd."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import pytest
from canned import Answer, Asked, Canned, canned, refusal
from s3_servers import ENVIRON, free_port

from agentfuse.errors import IntegrityError, ObjectNotFoundError, StoreError, UsageError
from agentfuse.objectstore import open_store
from agentfuse.objectstore.s3 import PART_BYTES, S3Store
from agentfuse.objectstore.s3_sdk import Patience, shared_client
from agentfuse.objectstore.s3_url import parse_s3_url

DATE = {"Last-Modified": "Sun, 22 Nov 2026 05:00:00 GMT"}
OBJECT = {**DATE, "ETag": '"one"'}


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shared_client.cache_clear()
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    yield
    shared_client.cache_clear()


@pytest.fixture
def server() -> Iterator[Canned]:
    with canned() as server:
        yield server


def opened(endpoint: str, query: str = "", **patience: Any) -> S3Store:
    quick = {"connect_s": 1, "read_s": 0.3, "deadline_s": 20, "attempts": 2} | patience
    return S3Store(
        parse_s3_url(f"s3://bucket/prefix?endpoint_url={endpoint}&region=r1{query}"), Patience(**quick)
    )


# -- URLs


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a b/%23?region=eu-1", "s3://bucket/a%20b/%23?region=eu-1"),
        (
            "s3://b.c-d?addressing=virtual&endpoint_url=https://h:9000/",
            "s3://b.c-d?endpoint_url=https://h:9000&addressing=virtual",
        ),
        (
            "s3://bucket?endpoint_url=http%3A%2F%2Fh%2Fs3",
            "s3://bucket?endpoint_url=http://h/s3&addressing=path",
        ),
        ("s3://bucket?checksums=when_required", "s3://bucket?checksums=when_required"),
        ("s3://bucket?checksums=when_supported", "s3://bucket"),
    ],
)
def test_a_url_has_one_canonical_form(url: str, canonical: str) -> None:
    assert parse_s3_url(url).url == canonical
    assert parse_s3_url(canonical).url == canonical


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("s3:", "no bucket's name"),
        ("s3://", "no bucket's name"),
        ("s3:///prefix", "no bucket's name"),
        ("s3://ab", "no bucket's name"),
        ("s3://bucket:9000/x", "no bucket's name"),
        ("s3://bucket/a//b", "empty"),
        ("s3://bucket/../x", "component"),
        ("s3://bucket/x#y", "'#' part"),
        ("s3://bucket?endpoint=http://h", "unknown 'endpoint'.*did you mean endpoint_url"),
        ("s3://bucket?regoin=x", "did you mean region"),
        ("s3://bucket?colour=x", "there are: endpoint_url, region"),
        ("s3://bucket?region=a&region=b", "twice"),
        ("s3://bucket?region=", "no region's name"),
        ("s3://bucket?endpoint_url=h:9000", "is no address"),
        ("s3://bucket?endpoint_url=ftp://h", "is no address"),
        ("s3://bucket?endpoint_url=http://h:x", "malformed"),
        ("s3://bucket?addressing=auto", "there are: path, virtual"),
        ("s3://bucket?checksums=never", "there are: when_supported, when_required"),
    ],
)
def test_a_wrong_url_is_refused_by_name(url: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hush@bucket/x",
        "s3://hush@bucket",
        "s3://bucket?endpoint_url=http://u:hush@h",
        "s3://bucket?secret_key=hush",
        "s3://bucket?aws_access_key_id=hush",
        "s3://bucket?session_token=hush",
        "s3://bucket?X-Amz-Signature=hush",
        "s3://bucket?password=hush",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="holds credentials") as caught:
        open_store(url)
    assert "hush" not in str(caught.value)
    assert caught.value.__context__ is None


def test_the_sdk_is_loaded_only_for_an_s3_store(tmp_path: Any) -> None:
    program = (
        "import sys, agentfuse.cli, agentfuse.daemon\n"
        "from agentfuse.objectstore import open_store, probe\n"
        "loaded = lambda: [n for n in ('boto3', 'botocore', 'urllib3') if n in sys.modules]\n"
        f"probe(open_store('file://{tmp_path}/store')); print(loaded())\n"
        "open_store('s3://bucket?region=r1&endpoint_url=http://127.0.0.1:1'); print(loaded())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['boto3', 'botocore', 'urllib3']"]


# -- what is sent


def test_requests_carry_the_hash_and_the_condition(server: Canned) -> None:
    server.answers = [Answer()]
    assert opened(server.endpoint).put_if_absent("a/ß", b"content")
    (asked,) = server.asked
    digest = hashlib.sha256(b"content")
    assert (asked.method, asked.path, asked.body) == ("PUT", "/bucket/prefix/a/%C3%9F", b"content")
    assert asked.headers["if-none-match"] == "*"
    assert asked.headers["x-amz-content-sha256"] == digest.hexdigest()
    assert asked.headers["x-amz-checksum-sha256"] == b64encode(digest.digest()).decode()
    assert "/r1/s3/" in asked.headers["authorization"]


def test_checksums_stay_at_home_when_asked_to(server: Canned) -> None:
    server.answers = [Answer()]
    opened(server.endpoint, "&checksums=when_required").put("a", b"content")
    (asked,) = server.asked
    assert asked.headers["x-amz-content-sha256"] == hashlib.sha256(b"content").hexdigest()
    assert not [name for name in asked.headers if "checksum" in name or "trailer" in name]
    assert asked.body == b"content"


# -- put_if_absent when answers get lost


class OneKey:
    """A store of one object; of the first ``lost`` writes the answer is a 500."""

    def __init__(self, lost: int, held: bytes | None = None) -> None:
        self.held, self.lost = held, lost

    def __call__(self, asked: Asked) -> Answer:
        if asked.method == "GET":
            return Answer(200, self.held or b"", OBJECT)
        won = self.held is None
        self.held = asked.body if self.held is None else self.held
        if self.lost:
            self.lost -= 1
            return refusal(500, "InternalError")
        return Answer() if won else refusal(412, "PreconditionFailed")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_write_whose_answer_was_lost_has_won(server: Canned, lost: int) -> None:
    server.answers = [OneKey(lost)]
    assert opened(server.endpoint).put_if_absent("a", b"mine")


@pytest.mark.parametrize("lost", [0, 1])
def test_anothers_write_is_never_taken_for_ones_own(server: Canned, lost: int) -> None:
    server.answers = [OneKey(lost, held=b"theirs")]
    assert not opened(server.endpoint).put_if_absent("a", b"mine")
    assert [asked.method for asked in server.asked] == ["PUT"] * (1 + lost) + ["GET"] * (lost > 0)


def test_when_every_answer_is_lost_it_is_unknown_who_won(server: Canned) -> None:
    server.answers = [OneKey(99)]
    with pytest.raises(StoreError, match=r"overloaded or failing .500 InternalError"):
        opened(server.endpoint).put_if_absent("a", b"mine")
    assert len(server.asked) == 2


def test_a_conflict_of_conditions_is_tried_again(server: Canned) -> None:
    server.answers = [refusal(409, "ConditionalRequestConflict")] * 3 + [Answer()]
    assert opened(server.endpoint).put_if_absent("a", b"mine")
    assert len(server.asked) == 4


# -- reading when connections break


def test_a_broken_download_goes_on_where_it_broke(server: Canned) -> None:
    body = os.urandom(3_000_000)
    server.answers = [
        Answer(200, body[:2_000_000], OBJECT, missing=1_000_000),
        Answer(206, body[2_000_000:2_500_000], OBJECT, missing=500_000),
        Answer(206, body[2_500_000:], OBJECT),
    ]
    assert b"".join(opened(server.endpoint).stream("a")) == body
    assert [asked.headers.get("range") for asked in server.asked] == [
        None,
        "bytes=2000000-",
        "bytes=2500000-",
    ]


def test_a_broken_range_asks_for_the_rest_of_the_range(server: Canned) -> None:
    server.answers = [Answer(206, b"2345", OBJECT, missing=3), Answer(206, b"2345678", OBJECT)]
    assert opened(server.endpoint).get("a", offset=2, length=7) == b"2345678"
    assert [asked.headers["range"] for asked in server.asked] == ["bytes=2-8"] * 2


def test_two_versions_of_an_object_are_never_joined(server: Canned) -> None:
    other = {**OBJECT, "ETag": '"two"'}
    server.answers = [Answer(200, b"x" * 2_000_000, OBJECT, missing=1), Answer(206, b"y", other)]
    with pytest.raises(StoreError, match="replaced while it was read"):
        list(opened(server.endpoint).stream("a"))


def test_a_download_that_breaks_again_and_again_fails(server: Canned) -> None:
    server.answers = [Answer(200, b"", OBJECT, missing=5)]
    with pytest.raises(StoreError, match="connection broke"):
        opened(server.endpoint).get("a")
    assert len(server.asked) == 2


def test_bytes_that_are_not_what_the_store_says_are_no_content(server: Canned) -> None:
    said = b64encode(hashlib.sha256(b"right").digest()).decode()
    server.answers = [Answer(200, b"wrong", {**OBJECT, "x-amz-checksum-sha256": said})]
    with pytest.raises(IntegrityError, match="damaged"):
        opened(server.endpoint).get("a")


# -- parts when answers get lost


def multipart(complete: list[Answer], head: Answer) -> list[Any]:
    started = b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>"
    etag = hashlib.md5(bytes(PART_BYTES)).hexdigest()

    def answer(asked: Asked) -> Answer:
        if asked.method == "POST":
            return Answer(200, started) if "uploads" in asked.path else complete.pop(0)
        if asked.method == "HEAD":
            return head
        return Answer(200, b"", {"ETag": f'"{etag}"'})

    return [answer]


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_upload_whose_completion_got_lost_is_looked_at(server: Canned, is_ours: bool) -> None:
    one = hashlib.md5(bytes(PART_BYTES)).digest()
    etag = f'"{hashlib.md5(one * 2).hexdigest()}-2"' if is_ours else '"other-2"'
    head = Answer(200, b"", {**DATE, "ETag": etag, "Content-Length": str(2 * PART_BYTES)})
    server.answers = multipart([refusal(500, "InternalError"), refusal(404, "NoSuchUpload")], head)
    store, source = opened(server.endpoint), io.BytesIO(bytes(2 * PART_BYTES))
    if is_ours:
        store.put("a", source, size_bytes=2 * PART_BYTES)
    else:
        with pytest.raises(StoreError, match="NoSuchUpload"):
            store.put("a", source, size_bytes=2 * PART_BYTES)


def test_an_error_in_a_200_is_an_error(server: Canned) -> None:
    server.answers = multipart([Answer(200, refusal(200, "InternalError").body)] * 2, Answer())
    with pytest.raises(StoreError, match="InternalError"):
        opened(server.endpoint).put("a", io.BytesIO(bytes(2 * PART_BYTES)), size_bytes=2 * PART_BYTES)
    assert [asked.method for asked in server.asked if "uploadId=u1" in asked.path].count("DELETE") == 1


# -- what is wrong, and what fixes it


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (refusal(403, "AccessDenied"), "access denied.*s3:ListBucket"),
        (refusal(404, "NoSuchBucket"), "no such bucket.*create it"),
        (refusal(403, "InvalidAccessKeyId"), "access key.*AWS_ACCESS_KEY_ID"),
        (refusal(403, "SignatureDoesNotMatch"), "signature.*AWS_SECRET_ACCESS_KEY"),
        (refusal(400, "ExpiredToken"), "expired.*renew"),
        (refusal(403, "RequestTimeTooSkewed"), "clock.*timedatectl"),
        (
            refusal(400, "AuthorizationHeaderMalformed", more="<Region>eu-west-9</Region>"),
            "another region.*region=eu-west-9",
        ),
        (refusal(301, "PermanentRedirect"), "another region.*region="),
        (refusal(503, "SlowDown"), "overloaded"),
        (refusal(501, "NotImplemented"), "cannot do.*when_required"),
        (refusal(403, "QuotaExceeded"), "no room"),
        (refusal(418, "Teapot", "short and stout"), "refused .418 Teapot, short and stout"),
        (Answer(404, b"<html>nginx</html>"), "GetObject s3://bucket/prefix/a"),
        (Answer(404), "GetObject s3://bucket/prefix/a"),
        (Answer(200, b"<html>"), "not S3's.*endpoint_url"),
    ],
)
def test_a_refusal_names_the_fix_and_is_no_absence(server: Canned, answer: Answer, complaint: str) -> None:
    server.answers = [answer]
    with pytest.raises(StoreError, match=complaint) as caught:
        opened(server.endpoint, attempts=1).get("a")
    assert not isinstance(caught.value, ObjectNotFoundError)
    assert "agentfuse-secret" not in str(caught.value)


def test_a_list_that_is_not_s3s_is_an_error(server: Canned) -> None:
    server.answers = [Answer(200, b"<html></html>", {"Content-Type": "text/html"})]
    with pytest.raises(StoreError, match=r"not S3's.*endpoint_url"):
        list(opened(server.endpoint, attempts=1).list(""))


@pytest.mark.parametrize(
    ("endpoint", "complaint"),
    [
        ("http://127.0.0.1:{free}", "connection refused.*endpoint_url"),
        ("http://nowhere.invalid", "no address.*endpoint_url"),
        ("http://127.0.0.1:{silent}", "timed out"),
        ("https://127.0.0.1:{plain}", "no TLS connection.*AWS_CA_BUNDLE"),
    ],
)
def test_an_unreachable_store_is_named(server: Canned, endpoint: str, complaint: str) -> None:
    server.answers = [Answer()]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {
            "free": free_port(),
            "silent": silent.getsockname()[1],
            "plain": server.endpoint.rpartition(":")[2],
        }
        store = opened(endpoint.format(**ports), attempts=2)
        for ask in (lambda: store.get("a"), lambda: store.stat("a"), lambda: list(store.list(""))):
            with pytest.raises(StoreError, match=complaint) as caught:
                ask()
            assert not isinstance(caught.value, ObjectNotFoundError)


def test_no_credentials_and_a_wrong_profile_are_named(
    server: Canned, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [Answer()]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"no credentials found.*AWS_ACCESS_KEY_ID"):
        opened(server.endpoint).put("a", b"1")
    shared_client.cache_clear()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"nobody.*AWS_PROFILE"):
        opened(server.endpoint)


def test_retries_end_at_the_deadline(server: Canned) -> None:
    server.answers = [refusal(503, "SlowDown")]
    with pytest.raises(StoreError, match="overloaded"):
        opened(server.endpoint, attempts=50, deadline_s=3.0).put("a", b"1")
    assert 2 <= len(server.asked) < 50


@pytest.mark.parametrize("answer", [Answer(404), Answer(404, b"<html>"), refusal(404, "NoSuchBucket")])
def test_only_an_answer_that_names_the_key_is_absence(server: Canned, answer: Answer) -> None:
    store = opened(server.endpoint, attempts=1)
    for ask in (store.stat, store.get, lambda key: store.get(key, length=0)):
        server.answers = [refusal(404, "NoSuchKey")]
        with pytest.raises(ObjectNotFoundError):
            ask("a")
        server.answers = [answer]
        with pytest.raises(StoreError) as caught:
            ask("a")
        assert not isinstance(caught.value, ObjectNotFoundError)


def test_the_size_of_an_object_costs_one_request_and_one_byte(server: Canned) -> None:
    server.answers = [Answer(206, b"x", {**OBJECT, "Content-Range": "bytes 0-0/12345"})]
    assert opened(server.endpoint).stat("a").size_bytes == 12345
    assert [(asked.method, asked.headers["range"]) for asked in server.asked] == [("GET", "bytes=0-0")]
