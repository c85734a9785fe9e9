"""Tenant Files by its contract, through a real server."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from gateways import OTHER, READER, SMALL, SMALL_BYTES, Gateway, download, listing, upload

MIB = 1024 * 1024


def names(client: httpx.Client, path: str = "") -> list[str]:
    return [node["name"] for node in listing(client, path)]


def post(client: httpx.Client, operation: str, **body: Any) -> httpx.Response:
    return client.post(f"/api/v1/files/{operation}", json=body)


def delete(client: httpx.Client, path: str) -> httpx.Response:
    return client.delete("/api/v1/files", params={"path": path})


def is_refused(answer: httpx.Response, status: int) -> bool:
    """An error in this API's words."""
    assert set(answer.json()) == {"error"}
    assert isinstance(answer.json()["error"], str)
    return answer.status_code == status


# -- listing and downloading


def test_an_upload_is_listed_with_its_facts_and_comes_back(client: httpx.Client) -> None:
    answer = upload(client, {"report.pdf": b"%PDF-1.4"}, "docs/reports")
    assert (answer.status_code, answer.json()) == (
        200,
        {"uploaded": [{"path": "docs/reports/report.pdf", "size": 8}]},
    )
    assert listing(client) == [{"name": "docs", "path": "docs", "is_dir": True}]
    (file,) = listing(client, "/docs//reports/.")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", file.pop("updated_at"))
    assert file == {"name": "report.pdf", "path": "docs/reports/report.pdf", "size": 8, "is_dir": False}
    answer = download(client, "docs/reports/report.pdf")
    assert (answer.status_code, answer.content) == (200, b"%PDF-1.4")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == "8"
    assert "content-encoding" not in answer.headers


def test_what_is_no_directory_lists_as_empty(client: httpx.Client) -> None:
    upload(client, {"file": b"1"})
    assert listing(client, "missing") == []
    assert listing(client, "file") == []


def test_a_listing_is_sorted_and_not_recursive(client: httpx.Client) -> None:
    upload(client, dict.fromkeys(("b", "ä", "a", "a.b", ".hidden"), b""))
    upload(client, {"x": b""}, "a-b/c")
    assert names(client) == [".hidden", "a", "a-b", "a.b", "b", "ä"]
    assert names(client, "a-b") == ["c"]


def test_a_download_of_nothing_or_of_a_directory_is_refused(client: httpx.Client) -> None:
    post(client, "mkdir", path="directory")
    assert is_refused(client.get("/api/v1/files/download"), 400)
    assert is_refused(download(client, ""), 400)
    assert is_refused(download(client, "missing"), 404)
    assert is_refused(download(client, "directory"), 404)
    assert is_refused(download(client, ""), 400)


def test_a_range_and_a_known_version_are_understood(client: httpx.Client) -> None:
    content = bytes(range(256)) * 8192  # an object of its own
    upload(client, {"big": content, "small": b"0123456789"})
    for name, whole in (("big", content), ("small", b"0123456789")):
        params = {"path": name}

        def get(params: dict[str, str] = params, **headers: str) -> httpx.Response:
            named = {key.replace("_", "-"): value for key, value in headers.items()}
            return client.get("/api/v1/files/download", params=params, headers=named)

        etag = get().headers["etag"]
        size = len(whole)
        for asked, start, end in (("2-5", 2, 6), ("5-", 5, size), ("-3", size - 3, size), ("0-0", 0, 1)):
            answer = get(range=f"bytes={asked}")
            assert (answer.status_code, answer.content) == (206, whole[start:end])
            assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert get(range=f"bytes={size}-").status_code == 416
        assert get(range="bytes=0-1,4-5").content == whole
        assert get(if_none_match=etag).status_code == 304
        assert get(range="bytes=0-1", if_range='"another"').content == whole
        assert get(range="bytes=0-1", if_range=etag).content == whole[:2]
        head = client.head("/api/v1/files/download", params=params)
        assert (head.headers["content-length"], head.content) == (str(size), b"")


# -- uploading


def test_an_upload_without_files_is_refused(client: httpx.Client) -> None:
    for answer in (
        client.post("/api/v1/files/upload"),
        client.post("/api/v1/files/upload", json={}),
        client.post("/api/v1/files/upload", data={"path": "x"}),
        client.post("/api/v1/files/upload", files={"other": ("name", b"1")}),
        client.post("/api/v1/files/upload", files={"files": ("", b"")}),
    ):
        assert is_refused(answer, 400)
    assert names(client) == []


def test_the_prefix_may_come_after_the_files(client: httpx.Client) -> None:
    parts = [("files", ("a", b"1")), ("path", (None, b"late"))]
    answer = client.post("/api/v1/files/upload", files=parts)
    assert answer.json() == {"uploaded": [{"path": "late/a", "size": 1}]}


def test_an_upload_overwrites_a_file_and_not_a_directory(client: httpx.Client) -> None:
    upload(client, {"a": b"old"})
    post(client, "mkdir", path="d/e")
    assert upload(client, {"a": b"new!"}).status_code == 200
    assert download(client, "a").content == b"new!"
    assert is_refused(upload(client, {"b": b"1", "d": b"1"}), 400)
    assert is_refused(upload(client, {"x": b"1"}, "a"), 400)
    assert is_refused(upload(client, {"x": b"1"}, "a/b"), 400)
    assert names(client) == ["a", "d"]


def test_a_file_name_is_its_last_part(client: httpx.Client) -> None:
    answer = upload(client, {"../dir/x.txt": b"1", "/etc/passwd": b"2", "ü ñ.txt": b"3"})
    assert [each["path"] for each in answer.json()["uploaded"]] == ["x.txt", "passwd", "ü ñ.txt"]
    for name in ("..", ".", "dir/", "a\\b", "x" * 256):
        assert is_refused(upload(client, {name: b"1"}), 400), name


def test_a_name_that_is_not_utf8_survives(client: httpx.Client) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="\xff\xfe"\r\n\r\n1\r\n--b--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = client.post("/api/v1/files/upload", content=body, headers=kind)
    assert answer.json()["uploaded"] == [{"path": "\udcff\udcfe", "size": 1}]
    assert client.get("/api/v1/files/download?path=%FF%FE").content == b"1"
    assert post(client, "mkdir", path="d").status_code == 200
    renamed = client.post("/api/v1/files/move", content=rb'{"src_path": "\udcff\udcfe", "dst_path": "d/f"}')
    assert renamed.json() == {"success": True}
    assert names(client, "d") == ["f"]


def test_a_file_may_have_fifty_mebibytes_and_no_byte_more(client: httpx.Client) -> None:
    content = bytes(50 * MIB)
    assert upload(client, {"fits": content}).json()["uploaded"][0]["size"] == 52_428_800
    assert download(client, "fits").content == content
    assert is_refused(upload(client, {"before": b"1", "long": content + b"1", "after": b"1"}), 413)
    assert names(client) == ["fits"]


def test_what_is_wrong_with_a_name_comes_before_what_is_wrong_with_a_size(client: httpx.Client) -> None:
    assert is_refused(upload(client, {"long": bytes(50 * MIB + 1)}, "../x"), 400)
    post(client, "mkdir", path="d")
    assert is_refused(upload(client, {"d": bytes(50 * MIB + 1)}), 400)


def test_the_quota_is_exact_and_counts_what_is_replaced(gateway: Gateway) -> None:
    with gateway.client(SMALL) as small:
        assert upload(small, {"a": bytes(SMALL_BYTES - 10)}).status_code == 200
        assert is_refused(upload(small, {"b": bytes(11)}), 507)
        assert is_refused(upload(small, {"b": bytes(5), "c": bytes(6)}), 507)
        assert upload(small, {"b": bytes(10)}).status_code == 200
        assert upload(small, {"a": bytes(SMALL_BYTES - 10)}).status_code == 200
        assert is_refused(upload(small, {"a": bytes(SMALL_BYTES - 9)}), 507)
        assert delete(small, "a").status_code == 204
        assert upload(small, {"c": bytes(SMALL_BYTES - 10)}).status_code == 200
        assert names(small) == ["b", "c"]
        for name in ("b", "c"):
            delete(small, name)


# -- deleting, moving, making directories


def test_deleting(client: httpx.Client) -> None:
    upload(client, {"f": b"1"}, "d")
    post(client, "mkdir", path="empty")
    assert is_refused(client.delete("/api/v1/files"), 400)
    assert is_refused(delete(client, "/"), 400)
    assert is_refused(delete(client, "d"), 400)
    for path in ("missing", "missing/too", "d/f/below a file", "empty", "d/f", "d"):
        answer = delete(client, path)
        assert (answer.status_code, answer.content) == (204, b""), path
    assert names(client) == []


def test_moving(client: httpx.Client) -> None:
    upload(client, {"f": b"1", "g": b"2"}, "d")
    assert post(client, "move", src_path="d/f", dst_path="/new//place/f").json() == {"success": True}
    assert download(client, "new/place/f").content == b"1"
    assert post(client, "move", src_path="new", dst_path="e").json() == {"success": True}
    assert download(client, "e/place/f").content == b"1"
    assert post(client, "move", src_path="d", dst_path="d").json() == {"success": True}
    for source, target in (("missing", "x"), ("d/g", "e"), ("d", "d/x"), ("d", "d/g/x"), ("d/g", "d/g/x")):
        assert is_refused(post(client, "move", src_path=source, dst_path=target), 400), (source, target)
    assert names(client) == ["d", "e"]


def test_making_directories(client: httpx.Client) -> None:
    assert post(client, "mkdir", path="a/b/c").json() == {"success": True}
    assert post(client, "mkdir", path="/a//b/").json() == {"success": True}
    upload(client, {"f": b"1"})
    assert is_refused(post(client, "mkdir", path="f"), 400)
    assert is_refused(post(client, "mkdir", path="f/x"), 400)
    assert names(client, "a") == ["b"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b"{}", b'{"path": ""}', b'{"path": 1}', b'{"path": null}']
)
@pytest.mark.parametrize("operation", ["move", "mkdir"])
def test_a_body_that_says_nothing_is_refused(client: httpx.Client, operation: str, body: bytes) -> None:
    assert is_refused(client.post(f"/api/v1/files/{operation}", content=body), 400)


@pytest.mark.parametrize("path", ["..", "../x", "a/../b", "a\\b", "a\0b", "/../", "x" * 256, "a/" * 2100])
def test_a_path_that_leads_out_or_nowhere_is_refused(client: httpx.Client, path: str) -> None:
    assert is_refused(client.get("/api/v1/files", params={"path": path}), 400)
    assert is_refused(download(client, path), 400)
    assert is_refused(upload(client, {"f": b"1"}, path), 400)
    assert is_refused(delete(client, path), 400)
    assert is_refused(post(client, "mkdir", path=path), 400)
    assert is_refused(post(client, "move", src_path=path, dst_path="x"), 400)
    assert is_refused(post(client, "move", src_path="x", dst_path=path), 400)


# -- who may


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer wrong", "key-of-acme-0001", "Basic a2V5LW9mLWFjbWUtMDAwMTo="]
)
def test_who_is_not_known_learns_nothing(gateway: Gateway, value: str) -> None:
    with gateway.client("", headers={"Authorization": value} if value else {}) as nobody:
        for answer in (
            nobody.get("/api/v1/files"),
            nobody.get("/api/v1/files/download"),
            nobody.post("/api/v1/files/upload", content=b"x" * 100_000),
            nobody.delete("/api/v1/files"),
            nobody.post("/api/v1/files/move", content=b"{"),
            nobody.post("/api/v1/files/mkdir"),
        ):
            assert is_refused(answer, 401)


def test_tenants_do_not_meet(gateway: Gateway, client: httpx.Client) -> None:
    upload(client, {"secret": b"1"})
    with gateway.client(OTHER) as other:
        assert listing(other) == []
        assert is_refused(download(other, "secret"), 404)
        assert delete(other, "secret").status_code == 204
    assert names(client) == ["secret"]


def test_a_key_for_reading_changes_nothing(gateway: Gateway, client: httpx.Client) -> None:
    upload(client, {"f": b"1"})
    with gateway.client(READER) as reader:
        assert names(reader) == ["f"]
        assert download(reader, "f").content == b"1"
        assert is_refused(delete(reader, "f"), 403)
        assert is_refused(upload(reader, {"f": b"2"}), 403)
    assert download(client, "f").content == b"1"


def test_paths_and_methods_that_do_not_exist_are_told_in_the_same_words(client: httpx.Client) -> None:
    assert is_refused(client.get("/api/v1/files/nothing"), 404)
    wrong = client.put("/api/v1/files")
    assert is_refused(wrong, 405)
    assert wrong.headers["allow"] == "DELETE, GET"
