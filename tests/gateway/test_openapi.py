"""Requests that schemathesis makes of /openapi.json, right ones and wrong ones: all its checks, no 5xx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import executing
import gateways
import pytest
from gateways import ACME, DEADLINE_S, Gateway, upload

CONFIG = """
[output]
sanitization.enabled = false

[output.truncation]
max-lines = 20

[checks.positive_data_acceptance]
# No schema says which paths are there, or taken.
expected-statuses = ["2xx", "3xx", 400, 401, 403, 404, 409, 413, 416, 507]

[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 416, 422, 431, "5xx"]

[[operations]]
# In a form everything is text; a list of copies and moves is answered 200 with what became of each.
include-path-regex = "(upload|files|temp-files/[^/]*|filesystem/copy|filesystem/move)$"
checks.negative_data_rejection.enabled = false

[[operations]]
# Also an id of a file, which may be PUT.
include-path-regex = "shared-files/delete-all$"
checks.allow_header_conformance.enabled = false
"""


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    with gateways.gateway(tmp_path, f"file://{tmp_path}/store") as running, running.client() as client:
        assert upload(client, {"a": b"1", "b": b"2"}, "d").status_code == 200
        _schemathesis(tmp_path, running)


@pytest.mark.mount
def test_schemathesis_finds_nothing_on_a_home_that_is_mounted(tmp_path: Path) -> None:
    with executing.host(tmp_path) as host:
        execution = host.run("ada")
        for region in ("uploads", "workspace", "shared"):
            (host.home(execution) / region / "a.txt").write_text("one\ntwo\n")
        listed = host.client.get(f"/agents/v2/executions/{execution}/files").json()["directories"]
        known = {
            "executionId": execution,
            "fileId": listed["uploads"][0]["id"],
            "agentId": "ada",
            "path": "workspace/a.txt",
        }
        parameters = "".join(f'"path.{name}" = "{value}"\n' for name, value in known.items())
        _schemathesis(
            tmp_path,
            host.gateway,
            *("--include-path-regex", "executionId|agentId.*(filesystem|shared-files)"),
            parameters=f"[parameters]\n{parameters}",
            phases="fuzzing",
            examples=5,
        )
        assert host.get(execution)["status"] == "running"


def _schemathesis(
    base: Path,
    gateway: Gateway,
    *arguments: str,
    parameters: str = "",
    phases: str = "coverage,fuzzing",
    examples: int = 5,
) -> None:
    config = base / "schemathesis.toml"
    config.write_text(parameters + CONFIG)
    program = str(Path(sys.executable).with_name("st"))
    command = [program, "--config-file", str(config), "run", f"{gateway.url}/openapi.json"]
    for header in (f"Authorization: Bearer {ACME}", f"X-Api-Key: {ACME}"):
        command += ["--header", header]
    command += ["--phases", phases, "--max-examples", str(examples), "--request-timeout", "20"]
    command += ["--generation-deterministic"]  # what CI finds, everybody finds
    # Each execution is a mount: what begins and ends one, or waits for it, is asked by test_asteroid.
    command += ["--exclude-path-regex", "(execute|sync|rerun|cancel|status|pause)$"]
    command += ["--no-color", *arguments]
    done = subprocess.run(
        command, cwd=base, capture_output=True, text=True, timeout=DEADLINE_S * 4, check=False
    )
    assert done.returncode == 0, "\n".join(line[:500] for line in done.stdout.splitlines())
