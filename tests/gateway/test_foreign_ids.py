"""Ids of another organization in every position that the OpenAPI document has for one: nothing is found,
and nothing is changed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import executing
import httpx
import pytest
from gateways import OTHER, OTHER_ORGANIZATION

pytestmark = pytest.mark.mount

EVERYTHING = {
    "status": "paused",
    "message": "x",
    "isFrozen": True,
    "content": "x",
    "operation": "append",
    "source": "/shared/a.txt",
    "destination": "/shared/b.txt",
    "query": "a",
    "paths": ["/shared/a.txt"],
    "archivePath": "/shared/a.tar",
    "outputPath": "/shared/b.tar",
    "permissions": "600",
}
"""A body that every route understands."""


def requests_of(document: dict[str, Any], ids: dict[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and more of each operation that has one of these ids in its path or query."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parameters = {each["name"]: each["in"] for each in operation.get("parameters", ())}
            if not ids.keys() & parameters.keys() - {"path"}:
                continue
            query = {
                name: ids[name] for name, where in parameters.items() if where == "query" and name in ids
            }
            content = operation.get("requestBody", {}).get("content", {})
            more: dict[str, Any] = {"params": query}
            if "multipart/form-data" in content:
                more["files"] = {"files": ("x.txt", b"x")}
            elif content:
                more["json"] = EVERYTHING
            yield method, re.sub(r"\{(\w+)\}", lambda match: ids[match[1]], path), more


def everything_of(client: httpx.Client, execution: str) -> list[Any]:
    """What an organization sees of an execution and its agent."""
    asked = (f"/executions/{execution}", f"/executions/{execution}/files", "/agents/theirs/shared-files")
    return [client.get("/agents/v2" + path).json() for path in asked]


def test_ids_of_another_organization_are_unknown_in_every_position(tmp_path: Path) -> None:
    with executing.host(tmp_path) as host, host.gateway.client(OTHER) as other:
        ours, theirs = host.run("ours"), begin(other)
        home = host.home(theirs)
        for region in ("uploads", "workspace", "shared"):
            (home / region / "a.txt").write_text("theirs")
        (host.home(ours) / "uploads/a.txt").write_text("ours")
        files = {
            name: client.get(f"/agents/v2/executions/{execution}/files").json()["directories"]["uploads"][0][
                "id"
            ]
            for name, client, execution in (("ours", host.client, ours), ("theirs", other, theirs))
        }
        document = host.client.get("/openapi.json").json()
        before = everything_of(other, theirs)
        asked = set()
        for execution, agent, file, organization in itertools.product(
            (ours, theirs), ("ours", "theirs"), files.values(), (OTHER_ORGANIZATION,)
        ):
            if (execution, agent) == (ours, "ours") and file == files["ours"]:
                continue
            ids = {"executionId": execution, "agentId": agent, "fileId": file, "workflowId": agent}
            ids |= {"organizationId": organization, "path": "shared/a.txt", "blob_id": "none"}
            for method, path, more in requests_of(document, ids):
                foreign = (theirs, "/theirs", files["theirs"], OTHER_ORGANIZATION)
                if not any(each in path or each in str(more["params"]) for each in foreign):
                    continue
                answer = host.client.request(method, path, **more)
                assert answer.status_code in (400, 403, 404), (method, path, answer.status_code, answer.text)
                assert "theirs" not in answer.text.replace(path, "").replace("agent theirs", ""), answer.text
                asked.add((method, path))
        assert len(asked) > 50
        staged = other.post("/agents/v2/temp-files", files={"files": ("secret", b"theirs")}).json()[
            "tempFiles"
        ]
        assert host.try_to_execute("ours", tempFiles=staged).status_code == 400
        link = other.get(f"/agents/v2/executions/{theirs}/files/{files['theirs']}/download")
        assert link.status_code == 303
        assert everything_of(other, theirs) == before
        assert (home / "shared/a.txt").read_text() == "theirs"


def begin(client: httpx.Client) -> str:
    """An execution of the other organization, once it runs."""
    execution = client.post("/agents/v2/agents/theirs/execute", json={}).json()["executionId"]

    def runs() -> bool:
        return bool(client.get(f"/agents/v2/executions/{execution}").json()["status"] == "running")

    executing.until(runs)
    return str(execution)
