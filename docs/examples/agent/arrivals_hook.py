#!/usr/bin/env python3
"""A hook for a coding agent's harness (Claude Code's form): tells the model of files that have arrived.

It runs inside of the agent's sandbox, after each tool and before each prompt, and reads the home's own log.
In .claude/settings.json:

    {"hooks": {"PostToolUse": [{"hooks": [{"type": "command", "command": "arrivals_hook.py"}]}],
               "UserPromptSubmit": [{"hooks": [{"type": "command", "command": "arrivals_hook.py"}]}]}}
"""

import json
import os
import sys

HOME = os.environ.get("AGENTFUSE_HOME") or os.path.expanduser("~")
LOG = os.path.join(HOME, ".agentfuse")
MOST = 20


def last_seen(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def events_after(seq: int) -> list[dict]:
    """The events with higher numbers; the older of the two files is there once the log was rotated.

    It is read second: if that happens between the two, its events come twice, rather than never.
    """
    found = {}
    for name in ("events.ndjson", "events.1.ndjson"):
        try:
            with open(os.path.join(LOG, name), encoding="utf-8") as file:
                events = [json.loads(line) for line in file if line.endswith("\n")]
        except FileNotFoundError:
            continue
        found.update({event["seq"]: event for event in events if event["seq"] > seq})
    return [found[each] for each in sorted(found)]


def main() -> None:
    call = json.load(sys.stdin)
    # One place in the log for each session and execution; in a cache, for it is worth nothing afterwards.
    cache = os.path.join(HOME, ".cache")
    os.makedirs(cache, exist_ok=True)
    session = "".join(c for c in str(call.get("session_id", "")) if c.isalnum() or c == "-")
    cursor = os.path.join(cache, f"arrivals-{os.environ.get('AGENTFUSE_EXECUTION', '')}-{session}")
    events = events_after(last_seen(cursor))
    if not events:
        return
    with open(cursor + ".new", "w") as file:
        file.write(str(events[-1]["seq"]))
    os.replace(cursor + ".new", cursor)
    # The agent knows of its own files. Names are others' words: JSON keeps them apart from ours.
    told = [e for e in events if e["kind"] in ("arrived", "modified") and e["created_by"] != "agent"]
    if not told:
        return
    lines = [
        f"- {json.dumps(e['region'] + '/' + e['path'])}, {e['size']} bytes, {e['mime']}" for e in told[:MOST]
    ]
    if len(told) > MOST:
        lines.append(f"- and {len(told) - MOST} more")
    context = "Files have arrived in your home:\n" + "\n".join(lines)
    event_name = call.get("hook_event_name", "PostToolUse")
    print(json.dumps({"hookSpecificOutput": {"hookEventName": event_name, "additionalContext": context}}))


main()
