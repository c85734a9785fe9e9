"""Requests that no honest client sends. After each the gateway lives, and nothing was stored."""

from __future__ import annotations

import socket
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import h2.connection
import h2.events
import httpx
import pytest
from gateways import ACME, ORGANIZATION, Gateway, listing, upload

FILE = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%d"\r\n\r\n1\r\n'
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
UPLOADS = ("/api/v1/files/upload", f"/agents/v2/temp-files/{ORGANIZATION}")


@pytest.fixture(autouse=True)
def _nothing_is_stored(client: httpx.Client) -> Iterator[None]:
    yield
    assert listing(client) == []
    assert client.get("/readyz").json() == {"ready": True}


def post(client: httpx.Client, path: str, content: bytes | Iterator[bytes], **headers: str) -> int:
    answer = client.post(path, content=content, headers={**FORM, **headers})
    return answer.status_code


@pytest.mark.parametrize("path", UPLOADS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b--\r\n",
        b"no boundary at all",
        FILE % 1,  # its end is missing
        FILE % 1 + b"--b\r\n",
        FILE % 1 + b'--b\r\nContent-Disposition: form-data; name="files"; filename="2"\r\n\r\n',
        b"--b\r\n\r\nno headers\r\n--b--\r\n",
        b"--b\r\nX: " + b"x" * 100_000 + b"\r\n\r\n1\r\n--b--\r\n",
        b"--b\r\n" + b"X: y\r\n" * 10_000 + b"\r\n1\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\n' + b"x" * 100_000 + b"\r\n--b--\r\n",
    ],
)
def test_what_is_no_whole_form_is_refused(client: httpx.Client, path: str, body: bytes) -> None:
    assert post(client, path, body) == 400


@pytest.mark.parametrize("path", UPLOADS)
@pytest.mark.parametrize(
    "kind",
    [
        "",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=b",
        "multipart/form-data; boundary=" + "b" * 300,
    ],
)
def test_a_form_without_a_boundary_is_refused(client: httpx.Client, path: str, kind: str) -> None:
    body = FILE % 1 + b"--b--\r\n"
    headers = {"Content-Type": kind} if kind else {}
    assert client.post(path, content=body, headers=headers).status_code == 400


@pytest.mark.parametrize("path", UPLOADS)
def test_ten_thousand_parts_are_refused(client: httpx.Client, path: str) -> None:
    body = b"".join(FILE % number for number in range(10_000)) + b"--b--\r\n"
    assert post(client, path, body) == 400


@pytest.mark.parametrize("path", UPLOADS)
def test_a_form_without_end_is_ended(client: httpx.Client, path: str) -> None:
    """The gateway stops reading at its limit of a quarter of a GiB; nobody waits for the rest."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield FILE % 1
        piece = bytes(1024 * 1024)
        while True:
            sent += len(piece)
            yield piece

    with suppress(httpx.WriteError):  # it answered, and closed while we sent
        assert post(client, path, endless()) == 413
    assert sent < 600 * 1024 * 1024


@pytest.mark.parametrize("path", UPLOADS)
def test_a_length_that_is_too_long_is_refused_before_anything_comes(client: httpx.Client, path: str) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), 20) as raw:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99999999999\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize("path", UPLOADS)
@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
def test_who_goes_away_in_the_middle_stores_nothing(client: httpx.Client, path: str, length: bytes) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), 20) as raw:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\n"
        body = FILE % 1 + b"--b--\r\n"
        chunk = b"%x\r\n%b\r\n" % (len(FILE), FILE % 1) if b"chunked" in length else body
        raw.sendall(head.encode() + length + b"\r\n\r\n" + chunk)
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(20)
        assert not raw.recv(100).startswith(b"HTTP/1.1 2")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_no_http_is_not_served(client: httpx.Client, head: bytes) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), 20) as raw:
        answer = b""
        with suppress(OSError):  # it may be reset before all of it is sent
            raw.sendall(head)
            raw.shutdown(socket.SHUT_WR)
            while piece := raw.recv(4096):
                answer += piece
    assert not answer.startswith(b"HTTP/1.1 2")


@pytest.mark.parametrize(
    "path", ["..%2f", "%2e%2e/", "..%5c", "%252e%252e%2f../", "%c0%ae%c0%ae/../", "....//../"]
)
def test_no_spelling_of_dots_leads_out(gateway: Gateway, client: httpx.Client, path: str) -> None:
    upload(client, {"inside": b"1"})
    for prefix in ("", "a/", "/"):
        url = f"/api/v1/files/download?path={prefix}{path}{path}other/files/snapshots/{1:020}.json.gz"
        assert client.get(url).status_code in (400, 404), url
    client.delete("/api/v1/files", params={"path": "inside"})


@pytest.mark.parametrize("name", ["\r\nX-Injected: 1", '"; filename="x', "<script>", "\x1b[2J", "a\nb"])
def test_a_name_is_only_a_name_wherever_it_comes_out(client: httpx.Client, name: str) -> None:
    assert client.post("/api/v1/files/mkdir", json={"path": "d"}).status_code == 200
    upload(client, {"f": b"1"})
    moved = client.post("/api/v1/files/move", json={"src_path": "f", "dst_path": "d/" + name})
    assert moved.status_code == 200
    path = listing(client, "d")[0]["path"]
    assert path == "d/" + name
    answer = client.get("/api/v1/files/download", params={"path": path})
    assert answer.content == b"1"
    assert "x-injected" not in answer.headers
    assert urllib.parse.unquote(answer.headers["content-disposition"].partition("''")[2]) == name
    client.delete("/api/v1/files", params={"path": path})
    client.delete("/api/v1/files", params={"path": "d"})


def test_a_deep_or_monstrous_json_body_is_refused(client: httpx.Client) -> None:
    for body in (
        b"[" * 60_000,
        b'{"path":' * 5000,
        b'{"path": "' + b"x" * 100_000 + b'"}',
        b"\xff\xfe",
        b'{"path": "\\ud800"}',
    ):
        answer = client.post("/api/v1/files/mkdir", content=body)
        assert answer.status_code in (400, 413), body[:20]


def test_a_query_of_a_thousand_parameters_is_refused(client: httpx.Client) -> None:
    assert client.get("/api/v1/files?" + "path=a&" * 1000).status_code == 400


def test_nobody_gets_past_a_proxy_by_http_2(client: httpx.Client) -> None:
    """A proxy that lets a connection go over to HTTP/2 sees nothing of the requests that follow."""
    with httpx.Client(http1=False, http2=True, trust_env=False) as outright:
        assert outright.get(client.base_url.join("/api/v1/files")).status_code == 505
    connection = h2.connection.H2Connection()
    settings = connection.initiate_upgrade_connection() or b""
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), 20) as raw:
        raw.sendall(
            b"GET /api/v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + ACME.encode() + b"\r\n"
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: "
            + settings
            + b"\r\n\r\n"
        )
        data = b""
        while b"\r\n\r\n" not in data:
            data += raw.recv(1)
        assert data.startswith(b"HTTP/1.1 101")
        raw.sendall(connection.data_to_send())
        statuses: list[bytes] = []
        while not statuses and (data := raw.recv(65536)):
            answers = (e for e in connection.receive_data(data) if isinstance(e, h2.events.ResponseReceived))
            statuses += [dict(answer.headers)[b":status"] for answer in answers]
    assert statuses == [b"505"]


def test_many_without_a_key_who_send_slowly_keep_nobody_out(client: httpx.Client) -> None:
    """Each is answered at once, and some are waited for so that they see it; not more than a few."""
    head = (
        b"POST /api/v1/files/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    )
    with ExitStack() as stack:
        for _ in range(600):
            raw = socket.create_connection((client.base_url.host, client.base_url.port or 0), 20)
            stack.enter_context(raw).sendall(head + b"Content-Length: 1000000\r\n\r\n--b")
            assert raw.recv(12) == b"HTTP/1.1 401"
        assert client.get("/api/v1/files").status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/api/v1/files", "/nothing", "/api/v1/files/move"])
def test_a_body_that_nobody_reads_keeps_nothing_busy(client: httpx.Client, path: str) -> None:
    """The server would hand its pieces to who has ended already, and wait for him for ever."""
    head = (
        f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\nContent-Length: 20000000\r\n\r\n"
    )
    where = (client.base_url.host, client.base_url.port or 0)
    with socket.create_connection(where, 20) as raw, suppress(OSError):  # it closed while we sent
        raw.sendall(head.encode() + bytes(10_000_000))
        while raw.recv(65536):
            pass
    deadline = time.monotonic() + 20
    while "requests_in_progress 1.0" not in client.get("/metrics").text:
        assert time.monotonic() < deadline, "it is still busy with it"


def test_a_key_of_a_megabyte_is_no_key(gateway: Gateway) -> None:
    with gateway.client("x" * 10_000) as client:
        assert client.get("/api/v1/files").status_code == 401
