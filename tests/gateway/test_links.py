"""Links that need no key."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import httpx
import msgspec
import pytest
from agents_files import Agent
from gateways import ORGANIZATION, OTHER_ORGANIZATION, SECRET, Gateway, upload

from agentfuse import admission
from agentfuse.errors import ConfigError
from agentfuse.gateway.blobs import LINK_S, Blob, Links, Place, secret_of
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.storedtree import StoredFile
from agentfuse.objectstore import open_store
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import tenant_owner

OWNER = tenant_owner("acme")


def stored(gateway: Gateway, path: bytes) -> StoredFile:
    """A file of the tenant's as another gateway finds it."""
    store = open_store(gateway.store)
    history = History(store, OWNER, "files")
    (entry,) = (e for e in history.read(history.newest()).entries if e.path == path)
    return StoredFile(store, OWNER, entry, limiter=None)  # type: ignore[arg-type]  # it is not read here


CONTENTS = {"empty": b"", "packed": b"0123456789", "alone": bytes(range(256)) * 8192}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_link_of_any_gateway_with_the_secret_serves_the_content(
    gateway: Gateway, client: httpx.Client, content: bytes
) -> None:
    upload(client, {"other": b"before", "ä.csv": content})
    link = Links(SECRET.encode()).make(stored(gateway, "ä.csv".encode()), "text/csv")
    with gateway.client("") as nobody:
        answer = nobody.get(link)
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["content-length"] == str(len(content))
        assert answer.headers["content-type"] == "text/csv"
        assert "content-encoding" not in answer.headers
        assert nobody.head(link).headers["content-length"] == str(len(content))
        if content:
            part = nobody.get(link, headers={"Range": "bytes=1-2"})
            assert (part.status_code, part.content) == (206, content[1:3])


def test_a_link_that_was_touched_is_refused(gateway: Gateway, client: httpx.Client) -> None:
    upload(client, {"a": b"1", "b": b"2"})
    a, b = (Links(SECRET.encode()).make(stored(gateway, name), "text/plain") for name in (b"a", b"b"))
    (path, query), (other, _) = a.split("?"), b.split("?")
    later = query.replace("exp=", "exp=9")
    forged = Links(b"another secret of thirty-two bytes").make(stored(gateway, b"a"), "text/plain")
    with gateway.client("") as nobody:
        for link in (
            path,
            f"{path}?{query[:-1]}",
            f"{path}?{later}",
            f"{path}?exp=&sig=",
            f"{path}?exp=x&sig=ü",
            f"{path}?{query.replace('sig=', 'sig=0')}",
            f"{other}?{query}",
            f"{path}A?{query}",
            f"/blobs/..%2f..?{query}",
            forged,
        ):
            assert nobody.get(link).status_code in (403, 404), link
            assert nobody.get(link).content != b"1"
        assert nobody.get(a).content == b"1"


def test_a_link_is_good_for_a_quarter_of_an_hour() -> None:
    now = 1000.0
    links = Links(b"s" * 32, lambda: now)
    entry = Entry(path=b"d/f", type="file", mode=0o644, mtime_ns=5, size=1, sha256="a" * 64, object="b" * 64)
    file = StoredFile(None, OWNER, entry, limiter=None)  # type: ignore[arg-type]  # it is not read here
    path, _, query = links.make(file, "text/plain").partition("?")
    expires, signature = (pair.partition("=")[2] for pair in query.split("&"))
    blob_id = path.rpartition("/")[2]
    now += LINK_S - 1
    blob = links.read(blob_id, expires, signature)
    assert isinstance(blob, Blob)
    assert (blob.owner, blob.name, blob.object, blob.media_type) == (OWNER, b"f", "b" * 64, "text/plain")
    now += 1
    with pytest.raises(DeniedError):
        links.read(blob_id, expires, signature)


def test_a_host_makes_its_secret_once_and_for_itself(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secret = secret_of(admission.Gateway(), tmp_path)
    finally:
        os.umask(before)
    assert len(secret) >= 32
    assert secret_of(admission.Gateway(), tmp_path) == secret
    (file,) = (tmp_path / "gateway").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_hosts_of_a_cluster_sign_alike_and_with_another_secret_than_the_clusters(tmp_path: Path) -> None:
    path = tmp_path / "cluster.secret"
    path.write_text(SECRET)
    settings = admission.Gateway(advertise="http://10.0.0.5:8080", cluster_secret_file=path)
    made = [secret_of(settings, tmp_path / host) for host in ("one", "two")]
    assert made[0] == made[1] != SECRET.encode()


@pytest.mark.parametrize("content", [None, b"short\n"])
def test_a_secret_that_is_missing_or_short_is_a_mistake(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="blob_secret_file"):
        secret_of(admission.Gateway(blob_secret_file=path), tmp_path)


@pytest.mark.mount
def test_a_link_to_a_file_of_an_execution_serves_what_is_there_when_it_is_fetched(
    gateway: Gateway, executed: tuple[Agent, Path], live: Agent
) -> None:
    _, home = executed
    links = Links(SECRET.encode())
    place = Place(ORGANIZATION, home.name, "workspace", "d/ä.csv".encode(), "text/csv")
    link = links.to(place)
    (home / "workspace/d").mkdir()
    path = home / "workspace/d/ä.csv"
    with gateway.client("") as nobody:
        assert nobody.get(link).status_code == 404
        for content in (b"first", b"", bytes(range(256)) * 8192):
            path.write_bytes(content)
            answer = nobody.get(link, headers={"Accept-Encoding": "gzip"})
            assert (answer.status_code, answer.content) == (200, content)
            assert answer.headers["content-length"] == str(len(content))
            assert answer.headers["content-type"] == "text/csv"
            assert "content-encoding" not in answer.headers
            assert nobody.head(link).headers["content-length"] == str(len(content))
        part = nobody.get(link, headers={"Range": "bytes=1000000-1000009"})
        assert (part.status_code, part.content) == (206, content[1000000:1000010])
        path.unlink()
        path.symlink_to("/etc/passwd")
        assert nobody.get(link).status_code == 404
        for wrong in (
            msgspec.structs.replace(place, organization=OTHER_ORGANIZATION),
            msgspec.structs.replace(place, execution="3f0f9c1e-6f57-4a3e-8d5c-0000000000ff"),
            msgspec.structs.replace(place, region="nowhere"),
            msgspec.structs.replace(place, path=b"d"),
        ):
            assert nobody.get(links.to(wrong)).status_code == 404
