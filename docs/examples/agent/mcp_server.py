#!/usr/bin/env python3
"""A minimal MCP server (stdio) for an agent's sandbox: what has arrived in the home, and how full it is.

    {"mcpServers": {"home": {"command": "mcp_server.py"}}}

It needs no package and no access but to the home's own .agentfuse/.
"""

import json
import os
import sys
import threading
import time

HOME = os.environ.get("AGENTFUSE_HOME") or os.path.expanduser("~")
LOG = os.path.join(HOME, ".agentfuse")
VERSIONS = ("2025-06-18", "2025-03-26", "2024-11-05")
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
        with open(os.path.join(LOG, name), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def arrivals(since: int = 0, wait_s: float = 0) -> list[dict]:
    until = time.monotonic() + min(wait_s, MOST_WAIT_S)
    while True:
        # The newer file first: if it is rotated between the two, its events come twice, rather than never.
        text = read("events.ndjson") + read("events.1.ndjson")
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        found = {event["seq"]: event for event in map(json.loads, lines) if event["seq"] > since}
        if found or time.monotonic() >= until:
            return [found[seq] for seq in sorted(found)]
        time.sleep(0.2)


def space() -> dict:
    refused = read("last-error.json")
    return {"status": json.loads(read("status.json")), "last_error": json.loads(refused) if refused else None}


def answer(request: dict) -> dict:
    """The result of a request, or its error."""
    method, parameters = request.get("method"), request.get("params") or {}
    if method == "initialize":
        asked = parameters.get("protocolVersion")
        version = asked if asked in VERSIONS else VERSIONS[0]
        server = {"name": "agentfuse-home", "version": "1"}
        return {"result": {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": server}}
    if method == "ping":
        return {"result": {}}
    if method == "tools/list":
        return {"result": {"tools": TOOLS}}
    if method != "tools/call":
        return {"error": {"code": -32601, "message": f"there is no method {method}"}}
    tool = {"arrivals": arrivals, "space": space}.get(parameters.get("name"))
    if tool is None:
        return {"error": {"code": -32602, "message": f"Unknown tool: {parameters.get('name')}"}}
    try:
        said, failed = json.dumps(tool(**parameters.get("arguments") or {})), False
    except (OSError, TypeError, ValueError) as error:
        said, failed = str(error), True
    return {"result": {"content": [{"type": "text", "text": said}], "isError": failed}}


def say(number: object, said: dict) -> None:
    # One write for each: answers of several threads do not mix.
    os.write(1, json.dumps({"jsonrpc": "2.0", "id": number, **said}).encode() + b"\n")


def main() -> None:
    for line in sys.stdin:
        try:
            request = json.loads(line)
        except ValueError as error:
            say(None, {"error": {"code": -32700, "message": str(error)}})
            continue
        if not isinstance(request, dict) or not isinstance(request.get("params") or {}, dict):
            say(None, {"error": {"code": -32600, "message": "a request is an object"}})
        elif "id" in request and "method" in request:  # else a notification, or an answer to nothing
            # Whoever waits for arrivals is not in the way of a ping.
            work = threading.Thread(target=lambda asked: say(asked["id"], answer(asked)), args=(request,))
            work.daemon = True
            work.start()
            if request["method"] != "tools/call":
                work.join()


main()
