"""Shinzo's search: by name and content, with ripgrep and without, bounded whatever is asked for."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gateways
import pytest
from agents_files import Agent, is_refused
from gateways import Gateway

FILES = {
    "shared/config/db.json": '{"database": "x"}\n{"Database": 2}\n',
    "shared/config/.hidden.json": "database",
    "shared/src/main.py": "import database\r\n# TODO(x): [a-z]+\nend",
    "shared/src/Database.md": "nothing\n",
    "shared/notes.txt": "ünïcode\nlast line without an end",
    "shared/empty": "",
}


@pytest.fixture(scope="module")
def without_ripgrep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    base = tmp_path_factory.mktemp("without-ripgrep")
    path = base / "bin"
    path.mkdir()
    for directory in os.environ["PATH"].split(":"):
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            if program.name != "rg" and not (path / program.name).exists():
                (path / program.name).symlink_to(program)
    with gateways.gateway(
        base, f"file://{base}/store", gateway='search_time = "2s"', PATH=str(path)
    ) as running:
        yield running


@pytest.fixture(params=["idle", "live", "without ripgrep"])
def agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    where = "without_ripgrep" if request.param == "without ripgrep" else "gateway"
    gateway: Gateway = request.getfixturevalue(where)
    with gateway.client() as client:
        agent = request.getfixturevalue("live") if request.param == "live" else Agent(client)
        for path, content in FILES.items():
            assert agent.create(path, content).status_code == 201
        yield agent


def search(agent: Agent, where: str = "search", **fields: Any) -> dict[str, Any]:
    answer = agent.ask("POST", where, fields)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert set(found) == {"results", "total", "truncated"}
    return dict(found)


def paths(found: dict[str, Any]) -> list[str]:
    assert found["total"] == len(found["results"])
    return [str(result["path"]) for result in found["results"]]


def test_names_and_contents_are_found(agent: Agent) -> None:
    found = search(agent, query="database")
    assert found == {
        "results": [
            {"path": "/shared/config/.hidden.json", "type": "file", "size": 8, "matches": ["database"]},
            {
                "path": "/shared/config/db.json",
                "type": "file",
                "size": 34,
                "matches": ['{"database": "x"}', '{"Database": 2}'],
            },
            {"path": "/shared/src/Database.md", "type": "file", "size": 8},
            {"path": "/shared/src/main.py", "type": "file", "size": 38, "matches": ["import database"]},
        ],
        "total": 4,
        "truncated": False,
    }
    assert found == search(agent, "operations/search", query="database", type="both")
    assert paths(search(agent, query="database", type="filename")) == ["/shared/src/Database.md"]
    found = search(agent, query="Database", type="content", caseSensitive=True)
    assert [result["matches"] for result in found["results"]] == [['{"Database": 2}']]
    assert paths(search(agent, query="database", filePattern="*.JSON")) == [
        *("/shared/config/.hidden.json", "/shared/config/db.json")
    ]
    assert paths(search(agent, query="database", filePattern="*.JSON", caseSensitive=True)) == []
    assert paths(search(agent, query="database", path="/shared/src")) == [
        *("/shared/src/Database.md", "/shared/src/main.py")
    ]
    assert paths(search(agent, query="database", path="shared/src/main.py")) == ["/shared/src/main.py"]
    assert paths(search(agent, query="Ü", type="content")) == ["/shared/notes.txt"]


def test_names_are_globs_or_parts(agent: Agent) -> None:
    assert paths(search(agent, query="*.json", type="filename")) == [
        *("/shared/config/.hidden.json", "/shared/config/db.json")
    ]
    assert paths(search(agent, query="[Dd]*", type="filename", caseSensitive=True, path="shared")) == [
        *("/shared/config/db.json", "/shared/src/Database.md")
    ]
    assert paths(search(agent, query="src", type="filename")) == ["/shared/src"]
    assert search(agent, query="src", type="filename")["results"][0]["type"] == "directory"
    assert paths(search(agent, query="src/m", type="filename")) == ["/shared/src/main.py"]
    assert paths(search(agent, query="c*/*.json", type="filename", path="shared")) == [
        *("/shared/config/.hidden.json", "/shared/config/db.json")
    ]
    assert paths(search(agent, query="a.b", type="filename")) == []


def test_a_request_in_the_references_words_is_understood(agent: Agent) -> None:
    assert paths(search(agent, pattern="*.md", path="/shared", max_results=5)) == ["/shared/src/Database.md"]
    found = search(agent, pattern="TODO", content_search=True, case_sensitive=True)
    assert found["results"][0]["matches"] == ["# TODO(x): [a-z]+"]
    assert paths(search(agent, pattern="todo", content_search=True, case_sensitive=True)) == []


def test_contents_are_searched_by_expression_or_else_as_text(agent: Agent) -> None:
    for query in ("^# TODO", r"todo\(\w\)", "[a-z]+]", "end$", r"\(x\):", "x)", "TODO("):
        assert "/shared/src/main.py" in paths(search(agent, query=query, type="content")), query
    assert paths(search(agent, query="TODO(x", type="content")) == ["/shared/src/main.py"]
    assert paths(search(agent, query="*", type="content")) == []  # no expression, and nowhere as text
    assert paths(search(agent, query="database\nx", type="content")) == []
    assert paths(search(agent, query="last line.*end$", type="content")) == ["/shared/notes.txt"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 400),
        ({"query": ""}, 400),
        ({"query": 5}, 400),
        ({"query": "x" * 1001}, 400),
        ({"query": "a\0b"}, 400),
        ({"query": "x", "type": "both of them"}, 400),
        ({"query": "x", "maxResults": -1}, 400),
        ({"query": "x", "maxResults": 0}, 400),
        ({"query": "x", "maxResults": "5"}, 400),
        ({"query": "x", "caseSensitive": "no"}, 400),
        ({"query": "x", "path": "../x"}, 400),
        ({"query": "x", "path": "shared/none"}, 404),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(agent: Agent, fields: Any, status: int) -> None:
    assert is_refused(agent.ask("POST", "search", fields), status)


def test_results_are_limited_and_say_so(agent: Agent) -> None:
    found = search(agent, query="database", maxResults=2)
    assert (len(found["results"]), found["truncated"]) == (2, True)
    found = search(agent, query="*.*", type="filename", maxResults=2)
    assert (len(found["results"]), found["total"], found["truncated"]) == (2, 5, True)
    assert search(agent, query="database", maxResults=4)["total"] == 4


def test_what_is_binary_or_too_long_is_skipped(agent: Agent) -> None:
    def bring(path: str, content: bytes) -> None:
        encoded = base64.b64encode(content).decode()
        assert agent.create(path, encoded, encoding="base64").status_code == 201

    bring("shared/binary", b"needle\n" * 10_000 + b"\0")
    bring("shared/long", b"needle\n".ljust(10 * 1024 * 1024 + 1, b"x"))
    bring("shared/just", b"needle\n".ljust(10 * 1024 * 1024, b"x"))
    bring("shared/latin1", b"caf\xe9 needle\n")
    found = search(agent, query="needle", type="content")
    assert paths(found) == ["/shared/just", "/shared/latin1"]
    assert found["results"][1]["matches"] == ["caf\ufffd needle"]
    found = search(agent, query="^.", type="content", path="shared/just")  # one line of 10 MiB
    assert [len(line) < 2000 for line in found["results"][0]["matches"]] == [True, True]


def test_an_expression_without_end_does_not_hang_the_gateway(agent: Agent) -> None:
    agent.create("shared/bomb", ("a" * 200 + "\n") * 2000)
    agent.create("shared/a-match", "aaa!\n")
    found = search(agent, query="^(a|a)*(a|aa)*(a+)+!$", type="content")
    assert "/shared/a-match" in paths(found)
    found = search(agent, query="(a{1000}){1000}|aaa!", type="content")  # too large, or too slow: it ends
    assert len(found["results"]) <= 1
