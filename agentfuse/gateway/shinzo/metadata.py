"""Metadata: permissions, times, tags; and labels of who owns it, which mean nothing to the system.

Tags and labels are one JSON document in an extended attribute of the file (``filetree.LABELS``): so they are
in snapshots, come back with the file, and go where it goes.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from agentfuse.errors import UsageError
from agentfuse.gateway.bodies import JsonAnswer, read_json
from agentfuse.gateway.downloads import timestamp
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.filetree import MAX_LABELS_BYTES, Node
from agentfuse.gateway.shinzo.desk import Desk, kind_of, permissions_of
from agentfuse.gateway.shinzo.filesystem import USER
from agentfuse.gateway.shinzo.paths import absolute, path_of
from agentfuse.snapshots.entries import printable

_LABELS = ("owner", "group")


class Metadata:
    """What the routes do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def get(self, request: Request) -> Response:
        """The metadata of a file or directory."""
        path = path_of(request)
        return JsonAnswer(_facts(await (await self._desk.open(request)).stat(path)))

    async def set(self, request: Request) -> Response:
        """Set permissions, tags (all of them at a time), and the labels owner and group. What is not named
        stays; null takes a label away."""
        path = path_of(request)
        body = await read_json(request)
        mode = permissions_of(body)
        changes = _changes(body)
        place = (await self._desk.open(request)).place(path)
        if place.is_region:
            raise DeniedError(f"{printable(path)!r} is a region, which stays as it is", 403)
        labels = None
        if changes:
            there = _labels_of(await place.tree.stat(place.path)) | changes
            labels = _document({name: value for name, value in there.items() if value})
        node = await place.tree.annotate(place.path, creator=USER, mode=mode, labels=labels)
        return JsonAnswer(_facts(place.whole(node)))


def _changes(body: dict[str, Any]) -> dict[str, Any]:
    changes = {}
    for name in _LABELS:
        if name in body:
            if not isinstance(body[name], str | None):
                raise UsageError(f"{name} must be a string")
            changes[name] = body[name]
    if "tags" in body:
        tags = body["tags"] if body["tags"] is not None else []
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
            raise UsageError("tags must be a list of strings")
        changes["tags"] = list(dict.fromkeys(tags))
    return changes


def _document(labels: dict[str, Any]) -> bytes:
    if not labels:
        return b""
    document = json.dumps(labels, separators=(",", ":"), sort_keys=True).encode()
    if len(document) > MAX_LABELS_BYTES:
        raise UsageError(f"tags, owner and group take more than {MAX_LABELS_BYTES:,} bytes")
    return document


def _labels_of(node: Node) -> dict[str, Any]:
    """The labels of a node; what is not a document of ours, for an agent may set any, is none."""
    try:
        labels = json.loads(node.labels or b"{}")
        return _changes({name: labels[name] for name in (*_LABELS, "tags") if name in labels})
    except (ValueError, RecursionError, TypeError, UsageError):
        return {}


def _facts(node: Node) -> dict[str, Any]:
    labels = _labels_of(node)
    facts = {
        "path": absolute(node.path),
        "type": kind_of(node),
        "size": node.size,
        "permissions": f"{node.mode & 0o7777:03o}",
        "created_at": timestamp(node.created_ns or node.mtime_ns),
        "modified_at": timestamp(node.mtime_ns),
        "tags": labels.get("tags", []),
    }
    return facts | {name: labels[name] for name in _LABELS if labels.get(name)}
