"""Shinzo's files, directories and metadata by the contract, on an idle agent, through a real server."""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from agents_files import Agent, is_refused
from gateways import OTHER, READER, SHINZO_OTHER, Gateway

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture
def idle(gateway: Gateway) -> Iterator[Agent]:
    with gateway.client() as client:
        yield Agent(client)


@pytest.fixture(params=["idle", "live"])
def agent(request: pytest.FixtureRequest) -> Agent:
    agent = request.getfixturevalue(request.param)
    assert isinstance(agent, Agent)
    return agent


def test_a_file_is_created_read_updated_and_deleted(agent: Agent) -> None:
    answer = agent.create("shared/config/a.json", '{"ä": 1}')
    made = answer.json()
    assert (answer.status_code, made["path"], made["size"]) == (201, "/shared/config/a.json", 9)
    assert set(made) == {"path", "size", "created_at"}
    assert TIME.fullmatch(made["created_at"])
    assert agent.read("shared/config/a.json").json() == {
        "path": "/shared/config/a.json",
        "content": '{"ä": 1}',
        "encoding": "utf-8",
        "size": 9,
        "mime_type": "application/json",
    }
    answer = agent.ask("PUT", "files/shared/config/a.json", {"content": "eA==", "encoding": "base64"})
    assert (answer.status_code, answer.json()["size"]) == (200, 1)
    assert set(answer.json()) == {"path", "size", "updated_at"}
    assert agent.content("/shared//config/./a.json") == "x"
    answer = agent.ask("DELETE", "files/shared/config/a.json")
    assert (answer.status_code, set(answer.json())) == (200, {"message", "path", "deleted_at"})
    assert is_refused(agent.read("shared/config/a.json"), 404, "NOT_FOUND")
    assert agent.names("shared") == ["config"]


def test_creating_what_is_there_needs_overwrite_and_never_replaces_a_directory(agent: Agent) -> None:
    assert agent.create("shared/d/f", "1").status_code == 201
    assert is_refused(agent.create("shared/d/f", "2"), 409, "ALREADY_EXISTS")
    assert agent.content("shared/d/f") == "1"
    assert agent.create("shared/d/f", "2", overwrite=True).status_code == 201
    assert agent.content("shared/d/f") == "2"
    for overwrite in (False, True):
        assert is_refused(agent.create("shared/d", "", overwrite=overwrite), 409)
        assert is_refused(agent.create("shared", "", overwrite=overwrite), 409)
        assert is_refused(agent.create("shared/d/f/x", "", overwrite=overwrite), 400)
    assert is_refused(agent.ask("PUT", "files/shared/none", {"content": ""}), 404)
    assert is_refused(agent.ask("PUT", "files/shared/d", {"content": ""}), 400)
    assert is_refused(agent.ask("DELETE", "files/shared/d"), 400)
    assert is_refused(agent.ask("DELETE", "files/shared/none"), 404)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"content": 5},
        {"content": None},
        {"content": "x", "encoding": "latin-1"},
        {"content": "x", "encoding": "base64"},
        {"content": "eA==eA==", "encoding": "base64"},
        {"content": "x", "overwrite": "yes"},
        {"content": "x", "permissions": "888"},
        {"content": "x", "permissions": 644},
        {"content": "x", "permissions": "0644\n"},
        [],
        "x",
    ],
)
def test_a_body_that_makes_no_sense_is_refused(idle: Agent, body: Any) -> None:
    assert is_refused(idle.ask("POST", "files/shared/x", body), 400)
    assert is_refused(idle.read("shared/x"), 404)


def test_binary_is_read_as_base64_or_downloaded(agent: Agent) -> None:
    content = bytes(range(256)) * 9000  # more than a piece
    encoded = base64.b64encode(content).decode()
    assert agent.create("shared/b.bin", encoded, encoding="base64").status_code == 201
    refused = agent.read("shared/b.bin")
    assert is_refused(refused, 400)
    assert "base64" in refused.json()["error"]
    read = agent.read("shared/b.bin", encoding="base64").json()
    assert (read["content"], read["size"], read["encoding"]) == (encoded, len(content), "base64")
    answer = agent.read("shared/b.bin", download="true")
    assert answer.content == content
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(len(content))
    agent.create("shared/p.html", "<p>")
    assert agent.read("shared/p.html", download="true").headers["content-type"] == "text/html"
    assert is_refused(agent.read("shared/b.bin", encoding="rot13"), 400)
    assert is_refused(agent.read("shared/b.bin", download="maybe"), 400)
    assert is_refused(agent.read("shared"), 400)
    assert is_refused(agent.read(""), 400)


def test_text_of_any_length_comes_back_as_it_was(agent: Agent) -> None:
    content = 'ä😀\n"\\\x01' * 100_000
    assert agent.create("shared/t", content).json()["size"] == len(content.encode())
    assert agent.content("shared/t") == content


def test_a_patch_changes_bytes(agent: Agent) -> None:
    agent.create("shared/f", "0123456789")

    def patch(path: str, operation: str, content: str, **fields: Any) -> httpx.Response:
        answer = agent.patch(path, operation, content, **fields)
        assert answer.status_code == 200, answer.text
        return answer

    answer = patch("shared/f", "append", "AB")
    assert (answer.status_code, answer.json()["size"], set(answer.json())) == (
        200,
        12,
        {"path", "size", "updated_at"},
    )
    patch("shared/f", "prepend", "<")
    patch("shared/f", "insert", "--", position=1)
    patch("shared/f", "insert", ">", position=15)
    assert agent.content("shared/f") == "<--0123456789AB>"
    patch("shared/f", "replace", "xyz", position=3)
    patch("shared/f", "replace", "", position=6, length=2)
    patch("shared/f", "replace", "ä", position=12, length=10**12)
    patch("shared/f", "append", base64.b64encode(b"!").decode(), encoding="base64")
    assert agent.content("shared/f") == "<--xyz56789Aä!"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"operation": "insert", "content": ""}, 400),
        ({"operation": "insert", "content": "", "position": 4}, 400),
        ({"operation": "insert", "content": "", "position": -1}, 400),
        ({"operation": "insert", "content": "", "position": True}, 400),
        ({"operation": "replace", "content": ""}, 400),
        ({"operation": "replace", "content": "", "position": 3}, 400),
        ({"operation": "replace", "content": "", "position": 0, "length": -1}, 400),
        ({"operation": "replace", "content": "", "position": 0.5}, 400),
        ({"operation": "truncate", "content": ""}, 400),
        ({"operation": "append"}, 400),
        ({"content": "x"}, 400),
    ],
)
def test_a_patch_that_makes_no_sense_changes_nothing(
    idle: Agent, fields: dict[str, Any], status: int
) -> None:
    idle.create("shared/f", "123")
    assert is_refused(idle.ask("PATCH", "files/shared/f", fields), status)
    assert idle.content("shared/f") == "123"
    assert is_refused(idle.patch("shared/none", "append", "x"), 404)
    assert is_refused(idle.patch("shared", "append", "x"), 400)


@pytest.mark.parametrize(("of", "turns"), [("idle", 10), ("live", 4)])
def test_of_appends_at_the_same_time_none_is_lost(
    request: pytest.FixtureRequest, gateway: Gateway, of: str, turns: int
) -> None:
    agent = request.getfixturevalue(of)
    agent.create("shared/log", "")

    def appends(number: int) -> None:
        with gateway.client() as client:
            mine = Agent(client, agent.id)
            for turn in range(turns):
                assert mine.patch("shared/log", "append", f"{number}.{turn}\n").status_code == 200

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(appends, range(20)))
    lines = agent.content("shared/log").split()
    assert sorted(lines) == sorted(f"{number}.{turn}" for number in range(20) for turn in range(turns))
    for number in range(20):
        mine = [line for line in lines if line.startswith(f"{number}.")]
        assert mine == [f"{number}.{turn}" for turn in range(turns)]


# -- directories


def test_directories_are_made_listed_and_removed(agent: Agent) -> None:
    answer = agent.ask("POST", "directories/shared/a/b", {"recursive": True, "permissions": "750"})
    assert (answer.status_code, answer.json()["path"]) == (201, "/shared/a/b")
    assert set(answer.json()) == {"path", "created_at"}
    assert agent.ask("GET", "metadata/shared/a/b").json()["permissions"] == "750"
    assert is_refused(agent.ask("POST", "directories/shared/a/b", {"recursive": True}), 409)
    assert is_refused(agent.ask("POST", "directories/shared/x/y"), 400)
    agent.create("shared/a/f", "12")
    agent.create("shared/a/.h/g", "")
    assert is_refused(agent.ask("POST", "directories/shared/a/f/x", {"recursive": True}), 400)
    assert is_refused(agent.ask("POST", "directories/shared/a/f"), 409)
    answer = agent.ask("GET", "directories/shared/a").json()
    assert answer["path"] == "/shared/a"
    directory, file = answer["entries"]
    assert (directory["name"], directory["type"], directory["size"]) == ("b", "directory", 0)
    assert (file["name"], file["type"], file["size"]) == ("f", "file", 2)
    assert TIME.fullmatch(file["modified_at"])
    assert agent.names("shared/a", includeHidden="true") == [".h", "b", "f"]
    assert agent.names("shared", recursive="true") == ["a", "a/b", "a/f"]
    regions = set(agent.names())
    assert regions in ({"shared"}, {"debug", "downloads", "shared", "uploads", "workspace"})
    assert set(agent.names("", recursive="true", includeHidden="true")) - regions == {
        *("shared/a", "shared/a/.h", "shared/a/.h/g", "shared/a/b", "shared/a/f")
    }
    assert agent.ask("GET", "directories").json() == agent.ask("GET", "directories/").json()
    assert is_refused(agent.ask("GET", "directories/shared/none"), 404)
    assert is_refused(agent.ask("GET", "directories/shared/a/f"), 400)

    assert is_refused(agent.ask("DELETE", "directories/shared/a"), 400)
    assert is_refused(agent.ask("DELETE", "directories/shared/a/f"), 400)
    assert is_refused(agent.ask("DELETE", "directories/shared/none"), 404)
    assert agent.ask("DELETE", "directories/shared/a/b").json().keys() == {"message"}
    assert agent.ask("DELETE", "directories/shared/a", {"recursive": True}).status_code == 200
    agent.create("shared/c/f")
    assert agent.ask("DELETE", "directories/shared/c", recursive="true").status_code == 200
    for root in ("shared", "", "%2e"):
        assert is_refused(agent.ask("DELETE", f"directories/{root}", recursive="true"), 403, "FORBIDDEN")
    assert agent.names("shared") == []


# -- metadata


def test_metadata_stays_with_the_file(agent: Agent) -> None:
    agent.create("shared/s.sh", "echo", permissions="0755")
    facts = agent.ask("GET", "metadata/shared/s.sh").json()
    assert (facts["path"], facts["type"], facts["size"]) == ("/shared/s.sh", "file", 4)
    assert (facts["permissions"], facts["tags"]) == ("755", [])
    assert TIME.fullmatch(facts["created_at"])
    assert TIME.fullmatch(facts["modified_at"])
    body = {"permissions": "600", "tags": ["ä", "b", "b"], "owner": "me", "group": "us"}
    answer = agent.ask("PUT", "metadata/shared/s.sh", body)
    expected = {"permissions": "600", "tags": ["ä", "b"], "owner": "me", "group": "us"}
    assert (answer.status_code, answer.json()) == (200, facts | expected)
    assert agent.ask("PATCH", "metadata/shared/s.sh", {"tags": ["c"], "owner": None}).status_code == 200
    agent.ask("PUT", "files/shared/s.sh", {"content": "echo 2"})
    agent.patch("shared/s.sh", "append", "!")
    agent.ask("POST", "move", {"source": "shared/s.sh", "destination": "shared/d/t.sh"})
    agent.ask("POST", "copy", {"source": "shared/d", "destination": "shared/e"})
    for path in ("shared/d/t.sh", "shared/e/t.sh"):
        facts = agent.ask("GET", f"metadata/{path}").json()
        assert (facts["permissions"], facts["tags"], facts["group"]) == ("600", ["c"], "us")
        assert "owner" not in facts
    directory = agent.ask("PUT", "metadata/shared/d", {"permissions": "700", "tags": ["x"]}).json()
    assert (directory["type"], directory["permissions"], directory["tags"]) == ("directory", "700", ["x"])
    assert agent.ask("GET", "metadata/").json()["type"] == "directory"
    assert agent.ask("GET", "metadata/shared").json()["path"] == "/shared"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("shared/none", {"tags": []}, 404),
        ("shared/f", {"permissions": "1777"}, 400),
        ("shared/f", {"permissions": "64"}, 400),
        ("shared/f", {"tags": "x"}, 400),
        ("shared/f", {"tags": [1]}, 400),
        ("shared/f", {"owner": 1}, 400),
        ("shared/f", {"tags": ["x" * 3000]}, 400),
        ("shared", {"tags": ["x"]}, 403),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(
    idle: Agent, path: str, body: dict[str, Any], status: int
) -> None:
    idle.create("shared/f")
    for method in ("PUT", "PATCH"):
        assert is_refused(idle.ask(method, f"metadata/{path}", body), status)
    assert is_refused(idle.ask("GET", "metadata/shared/none"), 404)


# -- copies and moves


@pytest.mark.parametrize("where", ["", "operations/"])
def test_copies_and_moves(agent: Agent, where: str) -> None:
    agent.create("shared/d/f", "1")
    agent.create("shared/g", "2")

    def ask(verb: str, source: str, destination: str, **fields: Any) -> httpx.Response:
        return agent.ask("POST", f"{where}{verb}", {"source": source, "destination": destination} | fields)

    answer = ask("copy", "shared/d", "/shared/c/d")
    assert (answer.status_code, answer.json()) == (
        200,
        {"results": [{"source": "/shared/d", "destination": "/shared/c/d", "success": True}]},
    )
    assert ask("move", "shared/g", "shared/h").status_code == 200
    assert agent.names("shared", recursive="true") == ["c", "c/d", "c/d/f", "d", "d/f", "h"]
    for verb in ("copy", "move"):
        assert is_refused(ask(verb, "shared/none", "shared/x"), 404)
        assert is_refused(ask(verb, "shared/h", "shared/d/f"), 409)
        assert is_refused(ask(verb, "shared/h", "shared/d", overwrite=True), 409)
        assert is_refused(ask(verb, "shared/d", "shared/d/e"), 400)
        assert is_refused(ask(verb, "shared", "shared/x"), 400)
        assert is_refused(ask(verb, "shared/h", "../x"), 400)
        assert is_refused(agent.ask("POST", f"{where}{verb}", {"source": "shared/h"}), 400)
    assert ask("copy", "shared/h", "shared/d/f", overwrite=True).status_code == 200
    assert ask("move", "shared/h", "shared/c/d/f", overwrite=True).status_code == 200
    assert agent.content("shared/c/d/f") == agent.content("shared/d/f") == "2"
    assert agent.names("shared") == ["c", "d"]


def test_a_batch_says_of_each_what_became_of_it(agent: Agent) -> None:
    agent.create("shared/a", "1")
    operations = [
        {"source": "shared/a", "destination": "shared/b"},
        {"source": "shared/none", "destination": "shared/c"},
        {"source": "shared/b", "destination": "shared/a"},
        {"source": 5},
        {"source": "shared/b", "destination": "/shared/d"},
    ]
    answer = agent.ask("POST", "operations/copy", {"operations": operations})
    results = answer.json()["results"]
    assert answer.status_code == 200
    assert [result["success"] for result in results] == [True, False, False, False, True]
    assert all(("error" in result) != result["success"] for result in results)
    assert (results[4]["source"], results[4]["destination"]) == ("/shared/b", "/shared/d")
    assert agent.names("shared") == ["a", "b", "d"]
    for bad in ([], "x", [5]):
        assert is_refused(agent.ask("POST", "copy", {"operations": bad}), 400)


# -- agents, regions, keys


def test_an_agent_begins_with_its_first_file_and_is_nobody_elses(idle: Agent, gateway: Gateway) -> None:
    agent = idle
    everything = [
        ("GET", "files/shared/f"), ("PUT", "files/shared/f"), ("PATCH", "files/shared/f"),
        ("DELETE", "files/shared/f"), ("GET", "directories/shared"), ("DELETE", "directories/shared/d"),
        ("GET", "metadata/shared/f"), ("PUT", "metadata/shared/f"), ("PATCH", "metadata/shared/f"),
        ("POST", "copy"), ("POST", "operations/copy"), ("POST", "move"), ("POST", "operations/move"),
    ]  # fmt: skip
    body = {"content": "", "operation": "append", "source": "shared/f", "destination": "shared/g"}

    def ask(agent: Agent, method: str, where: str) -> httpx.Response:
        return agent.ask(method, where, None if method in ("GET", "DELETE") else body)

    assert is_refused(agent.create("workspace/f"), 409)
    assert is_refused(agent.ask("POST", "directories/"), 409)
    for method, where in everything:
        assert is_refused(ask(agent, method, where), 404, "NOT_FOUND")
    assert agent.create("shared/f").status_code == 201
    with gateway.client(SHINZO_OTHER) as client:
        for method, where in [*everything, ("POST", "files/shared/g"), ("POST", "directories/shared/g")]:
            assert is_refused(ask(Agent(client, agent.id), method, where), 404, "NOT_FOUND")
    for key, status in (("", 401), ("nobody's key", 401), (OTHER, 403), (READER, 403)):
        with gateway.client(key) as client:
            for method, where in everything:
                assert is_refused(ask(Agent(client, agent.id), method, where), status)
    with gateway.client("", headers={"x-shinzo-api-key": "key-of-acme-0001"}) as client:
        assert Agent(client, agent.id).names("shared") == ["f"]


def test_an_agent_is_created_with_its_files(idle: Agent, gateway: Gateway) -> None:
    agent = idle
    files = [
        {"path": "shared/a.txt", "content": "ä"},
        {"path": "/shared/d/b", "content": "AAE=", "encoding": "base64"},
    ]
    body = {"id": agent.id, "name": "any", "configuration": {}, "initial_files": files}
    answer = agent.client.post("/v1/agent/create", json=body)
    assert answer.status_code == 201
    assert answer.json()["id"] == answer.json()["agentId"] == agent.id
    assert answer.json()["initial_files"] == [
        {"path": "/shared/a.txt", "size": 2},
        {"path": "/shared/d/b", "size": 2},
    ]
    assert agent.content("shared/a.txt") == "ä"
    assert agent.read("shared/d/b", encoding="base64").json()["content"] == "AAE="
    assert is_refused(agent.client.post("/v1/agent", json={"id": agent.id}), 409)
    other = agent.client.post("/v1/agent", json={}).json()["id"]
    assert Agent(agent.client, other).names() == ["shared"]
    with gateway.client(SHINZO_OTHER) as client:
        assert is_refused(client.post("/v1/agent", json={"id": agent.id}), 404)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"id": 5}, 400),
        ({"id": "a/b"}, 400),
        ({"id": ""}, 400),
        ({"initial_files": {}}, 400),
        ({"initial_files": [5]}, 400),
        ({"initial_files": [{"path": "shared/x"}]}, 400),
        ({"initial_files": [{"path": "shared", "content": ""}]}, 400),
        ({"initial_files": [{"path": "shared/../x", "content": ""}]}, 400),
        ({"initial_files": [{"path": "shared/x", "content": "x", "encoding": "base64"}]}, 400),
        ({"initial_files": [{"path": "shared/x", "content": ""}, {"path": "/shared/x", "content": ""}]}, 400),
        ({"initial_files": [{"path": "workspace/x", "content": ""}]}, 409),
    ],
)
def test_an_agent_that_makes_no_sense_is_not_created(idle: Agent, body: Any, status: int) -> None:
    agent = idle
    answer = agent.client.post("/v1/agent/create", json={"id": agent.id} | body)
    assert is_refused(answer, status)
    assert is_refused(agent.ask("GET", "directories"), 404)


def test_regions_that_an_idle_agent_has_not_are_a_conflict(idle: Agent) -> None:
    agent = idle
    agent.create("shared/f")
    for path in ("workspace/x", "uploads", "downloads/a/b", "debug", "loose.txt", "home"):
        for method, where, body in (
            ("GET", "files", None),
            ("POST", "files", {"content": ""}),
            ("GET", "directories", None),
            ("POST", "directories", {}),
            ("GET", "metadata", None),
        ):
            answer = agent.ask(method, f"{where}/{path}", body)
            assert is_refused(answer, 409, "CONFLICT")
            assert "while an execution of the agent runs" in answer.json()["error"]
    for verb in ("copy", "move"):
        for fields in (("shared/f", "workspace/x"), ("workspace/x", "shared/g")):
            body = dict(zip(("source", "destination"), fields, strict=True))
            assert is_refused(agent.ask("POST", verb, body), 409, "CONFLICT")


# -- paths


def sent(gateway: Gateway, request: bytes) -> bytes:
    """The status line of an answer to a request as it is; the client library would tidy it up."""
    address = httpx.URL(gateway.url)
    with socket.create_connection((address.host, address.port or 0), timeout=30) as connection:
        connection.sendall(request)
        return connection.makefile("rb").readline()


@pytest.mark.parametrize(
    "path",
    [
        "shared/../../etc/passwd", "shared/%2e%2e/x", "shared/..%2f..%2fetc%2fpasswd", "%2e%2e/x", "..",
        "shared/a%00b", "shared%2f..", "shared/" + "n" * 256, "shared/%2E%2e%2Fx", "/../shared/x",
    ],
)  # fmt: skip
def test_no_path_leaves_the_agents_files(idle: Agent, gateway: Gateway, path: str) -> None:
    idle.create("shared/x", "1")
    for kind in ("files", "directories", "metadata"):
        head = f"GET {idle.base}/{kind}/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        status = sent(gateway, f"{head}Authorization: Bearer key-of-acme-0001\r\n\r\n".encode())
        assert b" 400 " in status


def test_names_are_bytes(agent: Agent) -> None:
    for name in ("a%2Fb", "caf%C3%A9", "%FF", "line%0Abreak", "%20", "a%3Fb%23c", "%25", "%5C"):
        assert agent.create(f"shared/{name}", name).status_code == 201
        assert agent.content(f"shared/{name}") == name
    names = agent.names("shared", recursive="true")
    assert {"a", "a/b", "café", "line\nbreak", " ", "a?b#c", "%", "\\"} <= set(names)
    assert "\udcff" in names
    moved = {"source": "shared/\udcff", "destination": "shared/\udcfe"}
    body = str(moved).replace("'", '"').encode("ascii", "backslashreplace")
    answer = agent.client.post(f"{agent.base}/move", content=body)
    assert answer.status_code == 200
    assert agent.content("shared/%FE") == "%FF"


# -- quota


def test_what_does_not_fit_is_refused_and_nothing_changes(agent: Agent) -> None:
    mib = 1024 * 1024
    agent.create("shared/f", "1" * (49 * mib))
    for answer in (
        agent.create("shared/g", "1" * (2 * mib)),
        agent.ask("POST", "copy", {"source": "shared/f", "destination": "shared/g"}),
        agent.patch("shared/f", "append", "1" * (2 * mib)),
        agent.ask("PUT", "files/shared/f", {"content": "1" * (51 * mib)}),
        agent.client.post(
            "/v1/agent",
            json={"initial_files": [{"path": f"shared/{n}", "content": "1" * 2 * mib} for n in range(3)]},
        ),
    ):
        if answer.request.url.path == "/v1/agent":
            assert answer.status_code == 201
        else:
            assert is_refused(answer, 507, "QUOTA_EXCEEDED")
    assert agent.names("shared") == ["f"]
    assert agent.ask("GET", "metadata/shared/f").json()["size"] == 49 * mib
