"""Staging, with the real SDK and with plain HTTP clients, against a real server."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asteroid_odyssey
import httpx
import pytest
from asteroid_odyssey.exceptions import ApiException
from gateways import ACME, ORGANIZATION, OTHER_ORGANIZATION, READER, Gateway

from agentfuse.errors import NotFoundError
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.records import Records
from agentfuse.gateway.staging import EXPIRES_S, SWEPT_S, Staging
from agentfuse.objectstore.local import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the SDK's, of its own operations


class Clock:
    """A time that passes when it is told to."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[asteroid_odyssey.FilesApi]:
    configuration = asteroid_odyssey.Configuration(host=gateway.url, api_key={"ApiKeyAuth": ACME})
    with asteroid_odyssey.ApiClient(configuration) as client:
        yield asteroid_odyssey.FilesApi(client)


@pytest.fixture
def staging(gateway: Gateway) -> Staging:
    return Staging(LocalStore(Path(gateway.store.removeprefix("file://"))))


def content(staging: Staging, file_id: str) -> bytes:
    return b"".join(staging.pieces(staging.find(ORGANIZATION, file_id)))


def test_the_sdk_stages_files_both_ways(
    sdk: asteroid_odyssey.FilesApi, staging: Staging, tmp_path: Path
) -> None:
    path = tmp_path / "on disk.csv"
    path.write_bytes(b"a,b\n1,2\n")
    named = [("dokument ü.pdf", b"%PDF-1.4"), ("empty.txt", b"")]
    staged = sdk.temp_files_stage(ORGANIZATION, [*named, str(path)]).temp_files
    assert [file.name for file in staged] == ["dokument ü.pdf", "empty.txt", "on disk.csv"]
    assert [content(staging, str(file.id)) for file in staged] == [b"%PDF-1.4", b"", b"a,b\n1,2\n"]
    kinds = [staging.find(ORGANIZATION, str(file.id)).media_type for file in staged]
    assert kinds == ["application/pdf", "text/plain", "text/csv"]
    (file,) = sdk.temp_files_upload([("a", b"1")]).temp_files
    assert content(staging, str(file.id)) == b"1"
    (file,) = sdk.temp_files_upload([("a", b"2")], organization_id=ORGANIZATION).temp_files
    assert content(staging, str(file.id)) == b"2"


def test_files_of_one_name_are_both_kept(sdk: asteroid_odyssey.FilesApi, staging: Staging) -> None:
    staged = sdk.temp_files_upload([b"one", b"two"]).temp_files
    assert [file.name for file in staged] == ["files", "files"]
    assert [content(staging, str(file.id)) for file in staged] == [b"one", b"two"]


def test_the_sdk_understands_what_is_refused(sdk: asteroid_odyssey.FilesApi) -> None:
    with pytest.raises(ApiException) as caught:
        sdk.temp_files_stage(OTHER_ORGANIZATION, [("a", b"1")])
    assert (caught.value.status, caught.value.body) == (403, "User is not a member of the organization.")
    with pytest.raises(ApiException) as caught:
        sdk.temp_files_stage(ORGANIZATION, [])
    assert (caught.value.status, caught.value.body) == (400, "Invalid file upload request.")
    sdk.api_client.configuration.api_key["ApiKeyAuth"] = "wrong"
    with pytest.raises(ApiException) as caught:
        sdk.temp_files_upload([("a", b"1")])
    assert caught.value.status == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Api-Key": ACME},
        {"X-Api-Key": f"Bearer {ACME}"},
        {"X-Asteroid-Agents-Api-Key": ACME},
        {"Authorization": f"Bearer {ACME}"},
    ],
)
def test_a_key_may_come_in_any_of_its_headers(gateway: Gateway, headers: dict[str, str]) -> None:
    url = f"{gateway.url}/agents/v2/temp-files/{ORGANIZATION.upper()}"
    answer = httpx.post(url, headers=headers, files={"files": ("a", b"1")}, trust_env=False)
    assert answer.status_code == 200
    (file,) = answer.json()["tempFiles"]
    assert set(file) == {"id", "name"}
    assert uuid.UUID(file["id"])


def test_refusals_are_the_contracts_texts(gateway: Gateway) -> None:
    def post(key: str, organization: str = ORGANIZATION, **sent: Any) -> tuple[int, str, str]:
        with gateway.client("", headers={"X-Api-Key": key}) as client:
            answer = client.post(f"/agents/v2/temp-files/{organization}", **sent)
            return answer.status_code, answer.headers["content-type"], answer.text

    file = {"files": ("a", b"1")}
    text = "text/plain; charset=utf-8"
    bad, foreign = (400, text, "Invalid file upload request."), 403
    assert post(ACME) == bad
    assert post(ACME, content=b"") == bad
    assert post(ACME, json={}) == bad
    assert post(ACME, data={"files": "text"}) == bad
    assert post(ACME, files={"file": ("a", b"1")}) == bad
    assert post(ACME, "no-uuid", files=file) == bad
    assert post(ACME, OTHER_ORGANIZATION, files=file)[::2] == (
        foreign,
        "User is not a member of the organization.",
    )
    assert post("wrong", files=file) == (401, "application/json", '{"code":401,"message":"Unauthorized"}')
    assert post(READER, files=file)[0] == foreign
    for name in ("..", ".", "x" * 256, "dir/"):
        assert post(ACME, files={"files": (name, b"1")}) == bad, name


# -- what becomes of staged files


class Spooled:
    """A content in memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.sha256 = ""

    def open(self) -> Any:
        import io  # noqa: PLC0415

        return io.BytesIO(self.content)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def staged_at(store: LocalStore, clock: Clock, organization: str = ORGANIZATION) -> str:
    (staged,) = Staging(store, clock).stage(organization, [("a", "text/plain", Spooled(b"1"))])
    return staged.id


def test_a_file_is_claimed_by_one_execution_only(store: LocalStore) -> None:
    clock = Clock(1000.0)
    file_id, staging = staged_at(store, clock), Staging(store, clock)
    staged = staging.claim(ORGANIZATION, file_id, "e1")
    assert staging.claim(ORGANIZATION, file_id, "e1") == staged
    for attempt in (
        lambda: staging.claim(ORGANIZATION, file_id, "e2"),
        lambda: staging.find(ORGANIZATION, file_id),
    ):
        with pytest.raises(NotFoundError):
            attempt()
    staging.release(staged)
    assert staging.claim(ORGANIZATION, file_id, "e2") == staged
    staging.remove(staged)
    with pytest.raises(NotFoundError):
        staging.claim(ORGANIZATION, file_id, "e2")
    assert list(store.list("")) == []


@pytest.mark.parametrize("file_id", ["", "nonsense", "../x", "00000000-0000-4000-8000-000000000000"])
def test_an_id_of_nothing_is_not_found(store: LocalStore, file_id: str) -> None:
    with pytest.raises(NotFoundError):
        Staging(store).claim(ORGANIZATION, file_id, "e")


def test_a_file_of_another_organization_is_not_found(store: LocalStore) -> None:
    clock = Clock(1000.0)
    file_id = staged_at(store, clock, OTHER_ORGANIZATION)
    with pytest.raises(NotFoundError):
        Staging(store, clock).claim(ORGANIZATION, file_id, "e")


def test_a_file_expires_after_an_hour_to_the_second(store: LocalStore) -> None:
    clock = Clock(1000.0)
    file_id, staging = staged_at(store, clock), Staging(store, clock)
    clock.now = 1000.0 + EXPIRES_S - 1
    assert staging.find(ORGANIZATION, file_id).name == "a"
    clock.now = 1000.0 + EXPIRES_S
    for attempt in (staging.find, lambda *of: staging.claim(*of, "e")):
        with pytest.raises(NotFoundError):
            attempt(ORGANIZATION, file_id)


def nobody(_organization: str, _execution: str) -> bool:
    return False


def test_the_sweeper_removes_what_is_old_and_spares_what_is_claimed(store: LocalStore) -> None:
    clock = Clock(10_000.0)
    root = Path(store.url.removeprefix("file://")) / "temp-files" / ORGANIZATION

    def age(path: Path, at: float) -> None:
        os.utime(path, (at, at))

    old, claimed, young, orphan = (staged_at(store, clock) for _ in range(4))
    staging = Staging(store, clock)
    staging.claim(ORGANIZATION, claimed, "e")
    (root / f"{orphan}.json").unlink()
    for path in root.iterdir():
        age(path, clock.now)
    clock.now += SWEPT_S
    for path in root.iterdir():
        if path.name.startswith(young) or path.suffix == ".claim":
            age(path, clock.now)
    assert staging.sweep(nobody) == 0  # to the second
    clock.now += 1
    assert staging.sweep(nobody) == 2
    assert {path.name.partition(".")[0] for path in root.iterdir()} == {claimed, young}
    assert not any(path.name.startswith(old) for path in root.iterdir())
    assert Staging(store, clock).sweep(nobody) == 0
    clock.now += SWEPT_S
    assert staging.sweep(nobody) == 2
    assert list(store.list("temp-files/")) == []


def test_the_sweeper_spares_what_an_execution_is_still_to_get(store: LocalStore) -> None:
    clock = Clock(time.time())
    records, staging = Records(store), Staging(store, clock)
    queued, attached, ended, never = (staged_at(store, clock) for _ in range(4))
    of = {each: str(uuid.uuid4()) for each in (queued, attached, ended, never)}
    for file_id, execution in of.items():
        staging.claim(ORGANIZATION, file_id, execution)
    for file_id, status in ((queued, Status.QUEUED), (attached, Status.RUNNING), (ended, Status.CANCELLED)):
        records.create(
            Execution(
                id=of[file_id],
                organization=ORGANIZATION,
                agent="ada",
                tenant="acme",
                user="key",
                host="host",
                created_at=clock.now,
                status=status,
                is_attached=file_id == attached,
            )
        )
    clock.now += SWEPT_S + 60
    assert staging.sweep(records.wants_files) == 3
    assert staging.claimed(ORGANIZATION, queued, of[queued]).size == 1
    records.change(ORGANIZATION, of[queued], lambda record: record.with_status(Status.CANCELLED))
    assert staging.sweep(records.wants_files) == 1
    assert list(store.list("temp-files/")) == []
