"""What the routes answer, for the OpenAPI document: the fields are the API's own words."""

# ruff: noqa: N815
from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel

Status = Literal[
    "queued",
    "starting",
    "running",
    "paused",
    "awaiting_confirmation",
    "paused_by_agent",
    "completed",
    "cancelled",
    "failed",
]


class Error(BaseModel):
    """What went wrong; `code` is the HTTP status."""

    code: int
    message: str


class Started(BaseModel):
    """An execution that has begun."""

    executionId: str
    status: Status


class StatusChange(BaseModel):
    """The status that an execution was told to have."""

    executionId: str
    status: Literal["running", "paused", "cancelled"]


class ExecutionResult(BaseModel):
    """How an execution ended."""

    id: str
    executionId: str
    outcome: Literal["success", "failure"]
    reasoning: str
    createdAt: AwareDatetime
    result: dict[str, Any] | None = None


class Waited(BaseModel):
    """200: it has ended; 202: not yet."""

    executionId: str
    status: Status
    executionResult: ExecutionResult | None = None


class ExecutionItem(BaseModel):
    """An execution."""

    id: str
    agentId: str
    workflowId: str
    workflowVersionId: str
    status: Status
    createdAt: AwareDatetime
    organizationId: str
    agentName: str
    workflowName: str
    humanLabels: list[Any]
    comments: list[Any]
    hasBeenRerun: bool
    inputs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    executionOptions: dict[str, Any] | None = None
    startedAt: AwareDatetime | None = None
    terminalAt: AwareDatetime | None = None
    duration: float | None = None
    executionResult: ExecutionResult | None = None
    profileId: str | None = None
    agentProfileId: str | None = None
    parentExecutionId: str | None = None
    platformUrl: str | None = None
    purgedAt: AwareDatetime | None = None


class ExecutionPage(BaseModel):
    """A page of executions; `total` is of all pages."""

    items: list[ExecutionItem]
    page: int
    pageSize: int
    total: int


class Activity(BaseModel):
    """Something that happened; `payload.activityType` says what: status_changed, user_message_received or
    file_added."""

    id: str
    executionId: str
    timestamp: AwareDatetime
    payload: dict[str, Any]


class AgentFile(BaseModel):
    """A file of an execution."""

    id: str
    agentId: str
    workflowId: str
    executionId: str
    filePath: str
    fileName: str
    fileSize: int
    mimeType: str
    createdAt: AwareDatetime
    updatedAt: AwareDatetime
    directory: Literal["uploads", "downloads", "workspace", "shared", "debug"]
    createdBy: Literal["user", "agent", "environment", "system"]
    downloadUrl: str


class Directories(BaseModel):
    """The files by region."""

    uploads: list[AgentFile]
    downloads: list[AgentFile]
    workspace: list[AgentFile]
    shared: list[AgentFile]
    debug: list[AgentFile]


class AgentFiles(BaseModel):
    """All files of an execution."""

    directories: Directories
    lastUpdated: AwareDatetime | None = None


class ContextFile(BaseModel):
    """A file that was attached to an execution, or that it downloaded. `signedUrl` needs no key."""

    id: str
    agentId: str
    workflowId: str
    executionId: str
    filePath: str
    fileName: str
    fileExt: str
    fileSize: int
    fileType: Literal["image", "document", "text", "unknown"]
    mimeType: str
    createdAt: AwareDatetime
    downloadUrl: str
    signedUrl: str


class SharedFile(BaseModel):
    """A file of an agent's memory."""

    id: str
    agentId: str
    filePath: str
    fileName: str
    fileSize: int
    mimeType: str
    createdAt: AwareDatetime
    updatedAt: AwareDatetime
    version: int
    isFrozen: bool
    downloadUrl: str
    lastModifiedByExecutionId: str | None = None
    checksum: str | None = None


class SharedFiles(BaseModel):
    """An agent's memory; `totalSize` in bytes."""

    files: list[SharedFile]
    totalSize: int


class SharedUploaded(BaseModel):
    """The files that were uploaded."""

    files: list[SharedFile]


class Organization(BaseModel):
    """An organization."""

    id: str
    name: str


class Context(BaseModel):
    """Whom a key stands for. A key is nobody's in particular, so `email` is empty."""

    userId: str
    email: str
    organizations: list[Organization]


class WhoAmI(BaseModel):
    """Who asks."""

    kind: Literal["api_key"]
    id: str
    credential: Literal["org_api_key"]
    organizationId: str
