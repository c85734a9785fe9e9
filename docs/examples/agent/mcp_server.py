#!/usr/bin/env python3
"""A minimal MCP server (stdio) for an agent's sandbox: what has arrived in the home, and how full it is.

    {"mcpServers": {"home": {"command": "mcp_server.py"}}}

It needs no package and no access but to the home's own .agentfuse/.
"""

import json
import os
import sys
import time

HOME = os.environ.get("AGENTFUSE_HOME") or os.path.expanduser("~")
LOG = os.path.join(HOME, ".agentfuse")
MOST_WAIT_S = 55  # harnesses give up after a minute
TOOLS = [
    {
        "name": "arrivals",
        "description": "Files that have arrived in downloads/ and uploads/ after event number `since`. With "
        "`wait_s` it waits for the first of them. Call again with the highest `seq` that you have had.",
        "inputSchema": {
            "type": "object",
            "properties": {
                "since": {"type": "integer", "default": 0},
                "wait_s": {"type": "number", "default": 0, "maximum": MOST_WAIT_S},
            },
        },
    },
    {
        "name": "space",
        "description": "How full each directory of the home is, and what was refused last.",
        "inputSchema": {"type": "object", "properties": {}},
    },
]


def read(name: str) -> str:
    try:
        with open(os.path.join(LOG, name)) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def arrivals(since: int = 0, wait_s: float = 0) -> list[dict]:
    until = time.monotonic() + min(wait_s, MOST_WAIT_S)
    while True:
        text = read("events.1.ndjson") + read("events.ndjson")
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        found = [event for event in map(json.loads, lines) if event["seq"] > since]
        if found or time.monotonic() >= until:
            return found
        time.sleep(0.2)


def space() -> dict:
    refused = read("last-error.json")
    return {"status": json.loads(read("status.json")), "last_error": json.loads(refused) if refused else None}


def answer(request: dict) -> dict | None:
    """The result of a request; None for a notification."""
    method, parameters = request.get("method"), request.get("params") or {}
    if "id" not in request:
        return None
    if method == "initialize":
        version = parameters.get("protocolVersion", "2025-06-18")
        server = {"name": "agentfuse-home", "version": "1"}
        return {"result": {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": server}}
    if method == "ping":
        return {"result": {}}
    if method == "tools/list":
        return {"result": {"tools": TOOLS}}
    tool = (
        {"arrivals": arrivals, "space": space}.get(parameters.get("name")) if method == "tools/call" else None
    )
    if tool is None:
        return {"error": {"code": -32601, "message": f"there is no {parameters.get('name') or method}"}}
    try:
        said, failed = json.dumps(tool(**parameters.get("arguments") or {})), False
    except (OSError, TypeError, ValueError) as error:
        said, failed = str(error), True
    return {"result": {"content": [{"type": "text", "text": said}], "isError": failed}}


for line in sys.stdin:
    request = json.loads(line)
    said = answer(request)
    if said is not None:
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **said}), flush=True)
