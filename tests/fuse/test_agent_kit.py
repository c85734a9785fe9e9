"""What an agent and its harness are given: the text of ``agentfuse prompt``, a hook, and an MCP server."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import Home, eventually

pytestmark = pytest.mark.mount

EXAMPLES = Path(__file__).parents[2] / "docs/examples/agent"


@pytest.fixture
def given(home: Home, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A home with a file that a person has given, and the agent's environment."""
    (tmp_path / "q.csv").write_text("a,b\n")
    done = home.agentfuse("put", str(home.path), str(tmp_path / "q.csv"), "uploads/")
    assert done.returncode == 0, done.stderr
    yield {**os.environ, "AGENTFUSE_HOME": str(home.path), "AGENTFUSE_EXECUTION": home.execution}
    (home.path / "uploads" / "q.csv").unlink()


def test_the_prompt_tells_of_every_region_with_its_quota_and_of_files_that_exist(
    home: Home, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[regions.workspace]\nbytes = "3GiB"\n[regions.scratch]\nscope = "execution"\nbytes = "7MiB"\n'
    )
    said = home.agentfuse("prompt", "--home", str(home.path), "--config", str(config)).stdout
    assert re.search(r"`workspace/`.*3 GiB", said) and re.search(r"`scratch/`.*7 MiB", said)
    assert "{" not in said and "debug" not in said
    for name in re.findall(r"`([a-z]+)/`", said):
        assert (home.path / name).is_dir() or name == "scratch", name
    (home.path / "workspace" / "big").write_bytes(b"")
    with pytest.raises(OSError, match="quota"):
        os.truncate(home.path / "workspace" / "big", 2**40)
    (home.path / "workspace" / "big").unlink()
    for path in re.findall(rf"{re.escape(str(home.path))}/\S+?\.(?:nd)?json", said):
        eventually(Path(path).exists)
    (waiting,) = re.findall(r"`(tail .*)`", said)
    with subprocess.Popen(["sh", "-c", waiting], stdout=subprocess.PIPE, text=True) as waiter:
        assert waiter.stdout is not None
        heard = threading.Thread(target=lambda: lines.append(waiter.stdout.readline()))  # type: ignore[union-attr]
        lines: list[str] = []
        heard.start()
        for number in itertools.count():  # until tail has begun to look
            (home.path / "uploads" / f"{number}.txt").write_text("x")
            heard.join(0.2)
            if not heard.is_alive():
                break
    assert json.loads(lines[0])["kind"] == "arrived"
    for each in (home.path / "uploads").iterdir():
        each.unlink()


def call_hook(environment: dict[str, str], event: str = "PostToolUse") -> str:
    call = json.dumps({"session_id": "s-1", "hook_event_name": event, "tool_name": "Bash"})
    done = subprocess.run(
        [EXAMPLES / "arrivals_hook.py"],
        input=call,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    if not done.stdout:
        return ""
    said = json.loads(done.stdout)["hookSpecificOutput"]
    assert said["hookEventName"] == event
    return str(said["additionalContext"])


def test_the_hook_tells_of_each_file_once(home: Home, given: dict[str, str]) -> None:
    heard = call_hook(given, "UserPromptSubmit")
    assert '"uploads/q.csv", 4 bytes, text/csv' in heard
    assert call_hook(given) == ""


class Server:
    """The MCP server, and what a harness says to it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, EXAMPLES / "mcp_server.py"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.number = 0

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.number += 1
        request = {"jsonrpc": "2.0", "id": self.number, "method": method, "params": parameters}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert (answer["jsonrpc"], answer["id"]) == ("2.0", self.number)
        return answer

    def tool(self, name: str, **arguments: Any) -> Any:
        result = self.ask("tools/call", name=name, arguments=arguments)["result"]
        assert not result["isError"], result
        return json.loads(result["content"][0]["text"])


@pytest.fixture
def server(given: dict[str, str]) -> Iterator[Server]:
    made = Server(given)
    yield made
    made.process.communicate()
    assert made.process.returncode == 0


def test_the_mcp_server_tells_what_has_arrived_and_how_full_the_home_is(home: Home, server: Server) -> None:
    greeting = server.ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo={})[
        "result"
    ]
    assert (greeting["protocolVersion"], greeting["capabilities"]) == ("2025-06-18", {"tools": {}})
    assert server.process.stdin is not None
    server.process.stdin.write('{"jsonrpc": "2.0", "method": "notifications/initialized"}\n')
    assert {each["name"] for each in server.ask("tools/list")["result"]["tools"]} == {"arrivals", "space"}
    came = server.tool("arrivals")
    assert ("q.csv", "arrived", "user") in {(e["path"], e["kind"], e["created_by"]) for e in came}
    later = home.path / "downloads" / "later.txt"
    later.write_text("x")
    (event, *_) = server.tool("arrivals", since=came[-1]["seq"], wait_s=30)
    assert event["path"] == "later.txt"
    later.unlink()
    assert server.tool("space")["status"]["regions"]["uploads"]["bytes_used"] == 4
    assert server.ask("tools/call", name="rm", arguments={})["error"]["code"] == -32602
    assert server.ask("resources/list")["error"]["code"] == -32601
    assert server.ask("tools/call", name="arrivals", arguments={"x": 1})["result"]["isError"]


def test_the_mcp_server_survives_what_is_no_request_and_answers_while_a_tool_waits(server: Server) -> None:
    stdin, stdout = server.process.stdin, server.process.stdout
    assert stdin and stdout
    for line, code in (("{", -32700), ("[]", -32600), ('{"id": 1, "method": "ping", "params": []}', None)):
        stdin.write(line + "\n")
        stdin.flush()
        said = json.loads(stdout.readline())
        assert said.get("error", {}).get("code") == code, said
    greeting = server.ask("initialize", protocolVersion="1999-01-01")["result"]
    assert greeting["protocolVersion"] == "2025-06-18"
    waiting = {"name": "arrivals", "arguments": {"since": 10**9, "wait_s": 50}}
    stdin.write(json.dumps({"jsonrpc": "2.0", "id": "w", "method": "tools/call", "params": waiting}) + "\n")
    assert server.ask("ping")["result"] == {}
