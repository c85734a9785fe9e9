"""Several gateways on one store, on real stores: what one has committed all have, and nobody takes twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from gateways import ACME, ORGANIZATION, SMALL, SMALL_BYTES, Gateway, download, gateway, listing, upload
from s3_servers import STORES

from agentfuse.errors import NotFoundError
from agentfuse.gateway.agents import Agents
from agentfuse.gateway.staging import Staging
from agentfuse.objectstore import open_store
from agentfuse.progress import Silent
from agentfuse.snapshots.layout import tenant_owner
from agentfuse.sync.fsck import Checker

EACH = 9000
FIT = SMALL_BYTES // EACH


@pytest.fixture(scope="module", params=["local", "radosgw"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Gateway]]:
    """Two gateways, as of two hosts, on one store."""
    base = tmp_path_factory.mktemp("gateways")
    url = f"file://{base}/store" if request.param == "local" else STORES[request.param](request)
    with ExitStack() as stack:
        yield [stack.enter_context(gateway(base / f"host{n}", url)) for n in (1, 2)]


def test_concurrent_uploads_to_two_gateways_never_exceed_the_quota_together(pair: list[Gateway]) -> None:
    def put(number: int) -> int:
        with pair[number % 2].client(SMALL) as client:
            return upload(client, {f"{number:02}": bytes([number]) * EACH}).status_code

    with ThreadPoolExecutor(12) as executor:
        statuses = list(executor.map(put, range(2 * FIT + 2)))
    assert Counter(statuses) == {200: FIT, 507: FIT + 2}
    for each in pair:
        with each.client(SMALL) as client:
            stored = listing(client)
            assert [int(node["name"]) for node in stored] == [
                n for n, status in enumerate(statuses) if status == 200
            ]
            assert sum(node["size"] for node in stored) <= SMALL_BYTES
            for node in stored:
                assert download(client, node["path"]).content == bytes([int(node["name"])]) * EACH


def test_what_one_gateway_has_answered_the_other_knows(pair: list[Gateway]) -> None:
    large = bytes(range(256)) * 8192  # an object of its own
    with pair[0].client(ACME) as one, pair[1].client(ACME) as other:
        for number, content in enumerate([b"small", large]):
            assert upload(one, {f"f{number}": content}, "both/d").status_code == 200
            assert download(other, f"both/d/f{number}").content == content
            moved = other.post(
                "/api/v1/files/move", json={"src_path": f"both/d/f{number}", "dst_path": f"both/g{number}"}
            )
            assert moved.status_code == 200
            assert download(one, f"both/d/f{number}").status_code == 404
            assert download(one, f"both/g{number}").content == content
        names = [node["name"] for node in listing(one, "both")]
        assert names == ["d", "g0", "g1"] == [node["name"] for node in listing(other, "both")]


def test_every_snapshot_is_whole(pair: list[Gateway]) -> None:
    report = Checker(open_store(pair[0].store), tenant_owner("acme"), Silent()).run(all_snapshots=True)
    assert report.snapshots > 3
    assert not report.lost


def test_moves_of_one_file_by_many_have_one_winner(pair: list[Gateway]) -> None:
    with pair[0].client(ACME) as client:
        upload(client, {"prize": b"1"}, "race")

    def take(number: int) -> int:
        with pair[number % 2].client(ACME) as client:
            body = {"src_path": "race/prize", "dst_path": f"race/taken by {number}"}
            return client.post("/api/v1/files/move", json=body).status_code

    with ThreadPoolExecutor(10) as executor:
        statuses = list(executor.map(take, range(10)))
    assert Counter(statuses) == {200: 1, 400: 9}
    with pair[1].client(ACME) as client:
        assert [node["name"] for node in listing(client, "race")] == [f"taken by {statuses.index(200)}"]


def test_a_staged_file_comes_back_whole_and_is_claimed_by_one_of_many(pair: list[Gateway]) -> None:
    contents = [b"", b"small", bytes(range(256)) * 40_000]
    with pair[0].client(ACME) as client:
        parts = [("files", ("same name", content)) for content in contents]
        staged = client.post("/agents/v2/temp-files", files=parts).json()["tempFiles"]
    staging = Staging(open_store(pair[1].store))
    for file, content in zip(staged, contents, strict=True):
        assert b"".join(staging.pieces(staging.find(ORGANIZATION, file["id"]))) == content

    def claim(number: int) -> bool:
        try:
            Staging(open_store(pair[0].store)).claim(ORGANIZATION, staged[1]["id"], f"e{number}")
        except NotFoundError:
            return False
        return True

    with ThreadPoolExecutor(10) as executor:
        assert list(executor.map(claim, range(10))).count(True) == 1
    assert staging.sweep(lambda *_: False) == 0
    for file in (staged[0], staged[2]):
        staging.remove(staging.claim(ORGANIZATION, file["id"], "e"))
        with pytest.raises(NotFoundError):
            staging.find(ORGANIZATION, file["id"])


def test_a_large_content_is_fetched_from_the_store_itself(pair: list[Gateway]) -> None:
    Agents(open_store(pair[0].store), has_others=True).claim(ORGANIZATION, "memory")
    large = bytes(range(256)) * 8192
    contents = {"größe '1'.png": large, "small.txt": b"small", "too.txt": b"too", "empty": b""}
    shared = "/agents/v2/agents/memory/shared-files"
    with pair[0].client(ACME) as one, pair[1].client(ACME) as other:
        sent = [("files", (name, content)) for name, content in contents.items()]
        assert one.post(shared, files=sent).status_code == 200
        listed = {file["fileName"]: file for file in other.get(shared).json()["files"]}
        assert set(listed) == set(contents)
        for name, content in contents.items():
            file = listed[name]
            assert file["fileSize"] == len(content)
            answer = other.get(file["downloadUrl"])
            assert answer.status_code == 303
            location = answer.headers["location"]
            is_of_store = content is large and pair[0].store.startswith("s3:")
            assert location.startswith(pair[1].url) is not is_of_store, name
            fetched = httpx.get(location, headers={"Accept": "text/plain"}, trust_env=False)
            assert (fetched.status_code, fetched.content) == (200, content)
            assert fetched.headers["content-length"] == str(len(content))
            assert fetched.headers["content-type"] == file["mimeType"]
            assert "content-encoding" not in fetched.headers
            part = httpx.get(location, headers={"Range": "bytes=1-3"}, trust_env=False)
            assert part.content == content[1:4] or not content
