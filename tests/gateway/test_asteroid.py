"""What the Asteroid API refuses, and in which words: every route, every position of an id."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import executing
import httpx
import pytest
from executing import Host
from gateways import ACME, OTHER, OTHER_ORGANIZATION, READER

pytestmark = pytest.mark.mount

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
NOBODY = "3f0f9c1e-6f57-4a3e-8d5c-00000000dead"
FORM = {"files": ("a", b"1")}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with executing.host(tmp_path_factory.mktemp("refusals"), gateway_settings="max_executions = 2") as host:
        yield host


@pytest.fixture(scope="module")
def running(host: Host) -> str:
    return host.run("here", tempFiles=host.stage(("a.txt", b"content")))


@pytest.fixture(scope="module")
def ended(host: Host) -> str:
    execution = host.run("there")
    host.end(execution)
    return execution


# Method, path below an execution, what is sent, and whether its errors are texts.
OF_EXECUTIONS: list[tuple[str, str, dict[str, Any], bool]] = [
    ("GET", "", {}, False),
    ("DELETE", "", {}, False),
    ("GET", "/sync?timeoutSeconds=1", {}, False),
    ("POST", "/cancel", {}, False),
    ("POST", "/pause", {}, False),
    ("POST", "/resume", {}, False),
    ("POST", "/status", {"json": {"status": "paused"}}, False),
    ("POST", "/user-messages", {"json": {"message": "hi"}}, False),
    ("GET", "/activities", {}, False),
    ("POST", "/rerun", {"json": {}}, False),
    ("GET", "/files", {}, True),
    ("GET", "/agent-files", {}, True),
    ("GET", "/context-files", {}, True),
    ("POST", "/context-files", {"files": FORM}, True),
    ("GET", f"/files/{NOBODY}/download", {}, True),
    ("GET", f"/agent-files/{NOBODY}/download", {}, True),
    ("GET", f"/context-files/{NOBODY}/download", {}, True),
    ("GET", f"/debug-files/{NOBODY}/download", {}, True),
]
NAMES = [f"{method} {path}" for method, path, *_ in OF_EXECUTIONS]


@pytest.mark.parametrize("route", OF_EXECUTIONS, ids=NAMES)
def test_an_execution_that_is_not_ones_own_is_not_found(
    host: Host, running: str, route: tuple[str, str, dict[str, Any], bool]
) -> None:
    method, path, sent, is_text = route
    with host.gateway.client(OTHER) as stranger:
        for client, execution in (
            (stranger, running),
            (host.client, NOBODY),
            (host.client, "no-uuid"),
            (host.client, "%2e%2e"),
            (host.client, running + "0"),
        ):
            answer = client.request(method, f"/agents/v2/executions/{execution}{path}", **sent)
            said = (answer.status_code, answer.headers["content-type"], answer.text)
            if is_text:
                assert said == (404, TEXT, "Execution not found."), execution
            else:
                assert said == (404, JSON, '{"code":404,"message":"Execution not found."}'), execution
    assert host.get(running)["status"] == "running"


def every_route(host: Host, execution: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """All of the API's, as its OpenAPI document has them."""
    document = host.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        if path.startswith(("/agents/v2", "/users/v2")):
            for method in methods:
                yield method.upper(), path.replace("{executionId}", execution), {}


def test_without_a_key_every_route_answers_401_and_reads_nothing(host: Host, running: str) -> None:
    routes = list(every_route(host, running))
    assert len(routes) > 30
    for key in ("", "wrong"):
        with host.gateway.client(key) as client:
            for method, path, _ in routes:
                answer = client.request(method, path, content=b"not even JSON")
                said = (answer.status_code, answer.headers["content-type"], answer.text)
                assert said == (401, JSON, '{"code":401,"message":"Unauthorized"}'), (method, path)


def test_a_key_for_something_else_is_refused_everywhere(host: Host, running: str) -> None:
    with host.gateway.client(READER) as client:
        for method, path, _ in every_route(host, running):
            answer = client.request(method, path)
            assert answer.status_code == 403, (method, path)
            if "files" not in path:
                assert answer.json()["code"] == 403, (method, path)


BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"content": b"{"}, "not valid JSON"),
    ({"json": []}, "must be a JSON object"),
    ({"json": {"inputs": "text"}}, "inputs must be an object"),
    ({"json": {"inputs": [1]}}, "inputs must be an object"),
    ({"json": {"dynamicData": 5}}, "dynamicData must be an object"),
    ({"json": {"metadata": True}}, "metadata must be an object"),
    ({"json": {"executionOptions": "x"}}, "executionOptions must be an object"),
    ({"json": {"executionOptions": {"softTimeoutMins": 0}}}, "softTimeoutMins must be a whole number"),
    ({"json": {"executionOptions": {"softTimeoutMins": True}}}, "softTimeoutMins must be a whole number"),
    ({"json": {"executionOptions": {"variantKey": 1}}}, "variantKey must be a string"),
    ({"json": {"profileId": 5}}, "profileId must be a string"),
    ({"json": {"profileId": "a", "profileGroupId": "b"}}, "exclude each other"),
    ({"json": {"version": 1, "head": True}}, "exclude each other"),
    ({"json": {"version": "1"}}, "version must be a whole number"),
    ({"json": {"head": "yes"}}, "head must be true or false"),
    ({"json": {"onCapacityLimit": "wait"}}, "onCapacityLimit must be one of queue, reject"),
    ({"json": {"tempFiles": {}}}, "tempFiles must be a list"),
    ({"json": {"tempFiles": ["a"]}}, "tempFiles must be what staging answered"),
    ({"json": {"tempFiles": [{"name": "a"}]}}, "has no id"),
    ({"json": {"tempFiles": [{"id": "../../x", "name": "a"}]}}, "does not exist"),
    ({"json": {"tempFiles": [{"id": NOBODY, "name": "a"}]}}, "does not exist"),
    ({"json": {"tempFiles": [{"id": NOBODY}, {"id": NOBODY.upper()}]}}, "is there twice"),
    ({"json": {"files": "a"}}, "files must be a list"),
    ({"json": {"files": [1]}}, "files must be paths"),
    ({"json": {"files": ["a/../../b"]}}, "must not contain '..'"),
    ({"content": b'{"inputs": {"a": "\\ud800"}}'}, "inputs cannot be kept"),
]


@pytest.mark.parametrize(("sent", "said"), BAD_BODIES, ids=[said for _, said in BAD_BODIES])
def test_an_execution_that_cannot_be_ordered_so_does_not_begin(
    host: Host, sent: dict[str, Any], said: str
) -> None:
    before = host.client.get("/agents/v2/executions").json()["total"]
    for path in ("agents/here/execute", "workflows/here/execute", "agents/here/execute/sync"):
        answer = host.client.post(f"/agents/v2/{path}", **sent)
        assert (answer.status_code, answer.json()["code"]) == (400, 400)
        assert said in answer.json()["message"]
    assert host.client.get("/agents/v2/executions").json()["total"] == before


@pytest.mark.parametrize("seconds", [0, 26, -1, "5", 2.5, True])
def test_nobody_waits_for_longer_than_25_s(host: Host, running: str, seconds: object) -> None:
    answer = host.client.post("/agents/v2/agents/here/execute/sync", json={"timeoutSeconds": seconds})
    assert (answer.status_code, answer.json()["code"]) == (400, 400)
    text = seconds if isinstance(seconds, str) else json.dumps(seconds)
    answer = host.client.get(f"/agents/v2/executions/{running}/sync?timeoutSeconds={text}x")
    assert (answer.status_code, answer.json()["code"]) == (400, 400)


@pytest.mark.parametrize("agent", [".hidden", "%00", "a%0Ab", "x" * 201])
def test_an_agent_that_can_be_none_is_refused(host: Host, agent: str) -> None:
    answer = host.client.post(f"/agents/v2/agents/{agent}/execute", json={})
    assert (answer.status_code, answer.json()["code"]) == (400, 400)


def test_an_agent_of_another_organization_is_not_found(host: Host, running: str) -> None:
    with host.gateway.client(OTHER) as stranger:
        answer = stranger.post("/agents/v2/agents/here/execute", json={})
        assert (answer.status_code, answer.json()["code"]) == (404, 404)
        for method, path in (
            ("GET", ""),
            ("POST", ""),
            ("DELETE", "/delete-all"),
            ("GET", f"/{NOBODY}/download"),
        ):
            answer = stranger.request(method, f"/agents/v2/agents/here/shared-files{path}")
            assert (answer.status_code, answer.headers["content-type"]) == (404, TEXT)
        answer = stranger.get("/agents/v2/executions")
        assert answer.json() == {"items": [], "page": 1, "pageSize": 10, "total": 0}
    answer = host.client.get("/agents/v2/executions", params={"organizationId": OTHER_ORGANIZATION})
    assert (answer.status_code, answer.json()["code"]) == (403, 403)
    answer = host.client.get("/agents/v2/executions", params={"organizationId": "acme"})
    assert (answer.status_code, answer.json()["code"]) == (400, 400)


@pytest.mark.parametrize(
    ("path", "sent", "said"),
    [
        ("status", {}, "status is missing"),
        ("status", {"status": "queued"}, "status must be one of"),
        ("status", {"status": 5}, "status must be a string"),
        ("status", {"status": "completed", "result": "x"}, "result must be an object"),
        ("status", {"status": "completed", "reason": 1}, "reason must be a string"),
        ("user-messages", {}, "message is missing"),
        ("user-messages", {"message": ""}, "message is missing"),
        ("user-messages", {"message": ["x"]}, "message must be a string"),
        ("user-messages", {"message": "\ud800"}, "message cannot be kept"),
        ("rerun", {"inputs": "x"}, "inputs must be an object"),
        ("rerun", {"profileId": {}}, "profileId must be a string"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(
    host: Host, running: str, path: str, sent: dict[str, Any], said: str
) -> None:
    body = json.dumps(sent).encode()
    answer = host.client.post(f"/agents/v2/executions/{running}/{path}", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, 400)
    assert said in answer.json()["message"]


@pytest.mark.parametrize(
    "query", ["order=up", "limit=0", "limit=-1", "limit=x", "limit=99999999999999999999"]
)
def test_activities_are_asked_for_in_one_order_or_the_other(host: Host, running: str, query: str) -> None:
    answer = host.client.get(f"/agents/v2/executions/{running}/activities?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, 400)


def test_what_has_ended_takes_nothing_more(host: Host, ended: str) -> None:
    url = f"/agents/v2/executions/{ended}"
    for method, path, sent in (
        ("POST", "/pause", {}),
        ("POST", "/resume", {}),
        ("POST", "/cancel", {}),
        ("POST", "/status", {"json": {"status": "failed"}}),
        ("POST", "/user-messages", {"json": {"message": "hi"}}),
    ):
        answer = host.client.request(method, url + path, **sent)
        assert (answer.status_code, answer.json()["code"]) == (409, 409), path
    answer = host.client.post(f"{url}/context-files", files=FORM)
    assert (answer.status_code, answer.headers["content-type"]) == (400, TEXT)
    assert answer.text == "the execution has ended"


def test_an_upload_that_is_none_is_refused_and_leaves_nothing(host: Host, running: str) -> None:
    url = f"/agents/v2/executions/{running}/context-files"
    before = host.files(running)
    for sent in (
        {},
        {"content": b""},
        {"json": {"files": []}},
        {"data": {"files": "text"}},
        {"files": {"file": ("a", b"1")}},
        {"files": [("files", ("a", b"1")), ("files", ("..", b"2"))]},
        {"files": [("files", ("a", b"1")), ("files", ("x" * 256, b"2"))]},
        {"content": b"--b\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
    ):
        answer = host.client.post(url, **sent)  # type: ignore[arg-type]
        assert (answer.status_code, answer.headers["content-type"]) == (400, TEXT), sent
    connection = http.client.HTTPConnection(host.gateway.url.removeprefix("http://"), timeout=60)
    with closing(connection):
        connection.putrequest("POST", url)
        for header, value in (
            ("X-Api-Key", ACME),
            ("Content-Type", "multipart/form-data; boundary=b"),
            ("Content-Length", str(2**40)),
        ):
            connection.putheader(header, value)
        connection.endheaders(b"--b\r\n")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("content-type")) == (413, TEXT)
        assert answer.read() == b"the body is longer than 268,435,456 bytes"
    assert host.files(running) == before


def test_names_of_uploads_never_leave_the_directory(host: Host, running: str) -> None:
    url = f"/agents/v2/executions/{running}/context-files"
    names = ["../../shared/x.txt", "/etc/passwd", "back\\slash.txt", "-rf", "a b.txt", "ü.txt"]
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="{}"\r\n\r\n1\r\n'
    body = "".join(part.format(name) for name in names) + "--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = host.client.post(url, content=body.encode(), headers=headers)
    assert answer.status_code == 200
    found = {path.name for path in (host.home(running) / "uploads").iterdir()}
    assert {"x.txt", "passwd", "back\\slash.txt", "-rf", "a b.txt", "ü.txt"} <= found
    assert not (host.home(running) / "shared/x.txt").exists()


def test_a_link_to_a_file_that_went_away_is_not_found(host: Host, running: str) -> None:
    (host.home(running) / "downloads/brief").write_bytes(b"1")
    listed = host.client.get(f"/agents/v2/executions/{running}/context-files").json()
    (file,) = (each for each in listed if each["fileName"] == "brief")
    (host.home(running) / "downloads/brief").unlink()
    assert httpx.get(file["signedUrl"], trust_env=False).status_code == 404
    gone = host.client.get(file["downloadUrl"])
    assert (gone.status_code, gone.text) == (404, "File not found.")
    (host.home(running) / "downloads/brief").symlink_to("/etc/passwd")
    for url in (file["signedUrl"], file["downloadUrl"]):
        assert host.client.get(url).status_code == 404
    touched = file["signedUrl"].replace("sig=", "sig=0")
    assert httpx.get(touched, trust_env=False).status_code == 403


def test_a_method_that_a_path_does_not_have_names_those_that_it_has(host: Host, running: str) -> None:
    answer = host.client.put(f"/agents/v2/executions/{running}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")
    assert answer.json()["code"] == 405


def test_urls_begin_as_the_client_calls_the_gateway(host: Host, running: str) -> None:
    url = f"/agents/v2/executions/{running}/files"
    for sent, shown in (("files.example:8443", "files.example:8443"), ("a b", None), ("h/../x", None)):
        answer = host.client.get(url, headers={"Host": sent})
        if answer.status_code == 400:  # the server's own refusal of what is no host
            assert shown is None
            continue
        (file,) = (each for each in answer.json()["directories"]["uploads"] if each["fileName"] == "a.txt")
        start = f"http://{shown}/agents/v2/" if shown else f"{host.gateway.url}/agents/v2/"
        assert file["downloadUrl"].startswith(start)


def test_ids_are_stable_and_nobody_elses(host: Host, running: str) -> None:
    url = f"/agents/v2/executions/{running}/files"
    first, second = (host.client.get(url).json()["directories"]["uploads"] for _ in range(2))
    ids = [file["id"] for file in first]
    assert ids == [file["id"] for file in second]
    assert all(uuid.UUID(each) for each in ids)
    other = host.run("here", tempFiles=host.stage(("a.txt", b"content")))
    (file,) = host.client.get(f"/agents/v2/executions/{other}/files").json()["directories"]["uploads"]
    assert file["id"] not in ids
    crossed = host.client.get(f"/agents/v2/executions/{running}/files/{file['id']}/download")
    assert (crossed.status_code, crossed.text) == (404, "File not found.")
    host.end(other, "cancelled")


def test_debug_is_listed_and_only_that_can_be_downloaded_as_such(host: Host) -> None:
    execution = host.run("debugged")
    (host.home(execution) / "debug/trace.log").write_bytes(b"trace")
    for _ in range(2):
        url = f"/agents/v2/executions/{execution}"
        directories = host.client.get(f"{url}/files").json()["directories"]
        (file,) = directories["debug"]
        assert (file["directory"], file["filePath"]) == ("debug", "debug/trace.log")
        assert f"/debug-files/{file['id']}/download" in file["downloadUrl"]
        answer = host.client.get(file["downloadUrl"], follow_redirects=True)
        assert answer.content == b"trace"
        assert host.client.get(f"{url}/context-files").json() == []
        assert host.client.get(f"{url}/context-files/{file['id']}/download").status_code == 404
        if host.get(execution)["status"] == "running":
            host.end(execution)


def test_what_waits_for_room_has_no_files_and_takes_none(host: Host, running: str) -> None:
    other = host.run("other")
    full = host.try_to_execute("late")
    assert (full.status_code, full.json()["code"]) == (429, 429)
    staged = host.stage(("a.txt", b"content"))
    begun = host.try_to_execute("late", onCapacityLimit="queue", tempFiles=staged)
    assert (begun.status_code, begun.json()["status"]) == (202, "queued")
    queued = begun.json()["executionId"]
    url = f"/agents/v2/executions/{queued}"
    assert host.files(queued) == {}
    assert host.client.get(f"{url}/context-files").json() == []
    assert host.client.get("/agents/v2/executions?phase=pending").json()["items"][0]["id"] == queued
    activities = host.client.get(f"{url}/activities").json()
    assert [each["payload"] for each in activities] == [
        {"activityType": "status_changed", "status": "queued"}
    ]
    answer = host.client.post(f"{url}/context-files", files=FORM)
    assert (answer.status_code, answer.headers["content-type"]) == (409, TEXT)
    host.end(other, "cancelled")
    host.until(queued, "running")
    assert list(host.files(queued)) == ["uploads/a.txt"]
    host.end(queued, "cancelled")


def test_nothing_was_unexpected(host: Host) -> None:
    assert not host.gateway.complaints(), "".join(host.gateway.log)
