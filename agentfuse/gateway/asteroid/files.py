"""What the API says of files: nodes of trees as JSON. Pure functions.

Names that are not UTF-8 are written with U+FFFD where they are not: clients refuse anything else, and with
one file the whole list. Files are known by their ids.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agentfuse.gateway.asteroid.items import timestamp
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.filetree import Node
from agentfuse.gateway.ids import file_id, shared_file_id
from agentfuse.home.mime import type_of

DIRECTORIES = ("uploads", "downloads", "workspace", "shared", "debug")
CONTEXT = ("uploads", "downloads")
"""The regions whose files are an execution's context: what was attached to it, and what it fetched."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DOCUMENTS = (
    "application/pdf",
    "application/msword",
    "application/vnd.",
    "application/rtf",
    "application/epub",
)
_TEXTS = ("text/", "application/json", "application/xml", "application/yaml", "application/javascript")


def agent_file(execution: Execution, root: str, region: str, node: Node) -> dict[str, Any]:
    """An AgentFile. ``root`` is the URL of the execution."""
    found = _of_execution(execution, root, region, node, "debug-files" if region == "debug" else "files")
    found["updatedAt"] = (
        found["createdAt"] if node.mtime_ns == node.created_ns else timestamp(node.mtime_ns / 1e9)
    )
    found["directory"] = region
    found["createdBy"] = node.created_by
    return found


def context_file(execution: Execution, root: str, region: str, node: Node, signed_url: str) -> dict[str, Any]:
    """A ContextFile. ``root`` is the URL of the execution."""
    found = _of_execution(execution, root, region, node, "context-files")
    extension = os.path.splitext(found["fileName"])[1].removeprefix(".").lower()
    return found | {
        "fileExt": extension,
        "fileType": file_type(found["mimeType"]),
        "signedUrl": signed_url,
    }


def shared_file(agent: str, root: str, node: Node, version: int) -> dict[str, Any]:
    """A SharedFile. ``root`` is the URL of the agent's."""
    found_id = shared_file_id(agent, node.path)
    found: dict[str, Any] = {
        "id": found_id,
        "agentId": agent,
        "filePath": f"shared/{text_of(node.path)}",
        "fileName": text_of(node.name),
        "fileSize": node.size,
        "mimeType": media_type_of(node),
        "createdAt": timestamp((node.created_ns or node.mtime_ns) / 1e9),
        "updatedAt": timestamp(node.mtime_ns / 1e9),
        "version": version,
        "isFrozen": node.is_frozen,
        "downloadUrl": f"{root}/{found_id}/download",
    }
    return found | {"checksum": node.etag} if _SHA256.fullmatch(node.etag) else found


def agent_files(directories: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """An AgentFilesResponse."""
    found: dict[str, Any] = {"directories": {name: directories.get(name, ()) for name in DIRECTORIES}}
    latest = max((file["updatedAt"] for files in directories.values() for file in files), default=None)
    return found if latest is None else found | {"lastUpdated": latest}


def file_type(media_type: str) -> str:
    """The API's four kinds of files."""
    if media_type.startswith("image/"):
        return "image"
    if media_type.startswith(_DOCUMENTS):
        return "document"
    if media_type.startswith(_TEXTS):
        return "text"
    return "unknown"


def media_type_of(node: Node) -> str:
    """The MIME type of a file."""
    return type_of(node.path, None)


def text_of(path: bytes) -> str:
    """A name or path as text that every client takes."""
    return path.decode(errors="replace")


def _of_execution(execution: Execution, root: str, region: str, node: Node, kind: str) -> dict[str, Any]:
    found_id = file_id(execution.id, region, node.path)
    path = text_of(node.path)
    return {
        "id": found_id,
        "agentId": execution.agent,
        "workflowId": execution.agent,
        "executionId": execution.id,
        "filePath": f"{region}/{path}",
        "fileName": path.rpartition("/")[2],
        "fileSize": node.size,
        "mimeType": media_type_of(node),
        "createdAt": timestamp((node.created_ns or node.mtime_ns) / 1e9),
        "downloadUrl": f"{root}/{kind}/{found_id}/download",
    }
