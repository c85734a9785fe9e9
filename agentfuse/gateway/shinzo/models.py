"""What the OpenAPI document says that this API answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

Type = Literal["file", "directory", "symlink", "fifo", "socket", "device"]


class ShinzoError(BaseModel):
    """What went wrong, in words and for programs."""

    error: str
    code: str


class FileContent(BaseModel):
    """A file with its content."""

    path: str
    content: str
    encoding: Literal["utf-8", "base64"]
    size: int
    mime_type: str


class Created(BaseModel):
    """A file that was made."""

    path: str
    size: int
    created_at: str


class Updated(BaseModel):
    """A file that was changed."""

    path: str
    size: int
    updated_at: str


class FileDeleted(BaseModel):
    """A file that is gone."""

    message: str
    path: str
    deleted_at: str


class DirectoryEntry(BaseModel):
    """A name in a directory."""

    name: str
    type: Type
    size: int
    modified_at: str


class DirectoryListing(BaseModel):
    """What a directory holds."""

    path: str
    entries: list[DirectoryEntry]


class DirectoryMade(BaseModel):
    """A directory that was made."""

    path: str
    created_at: str


class DirectoryDeleted(BaseModel):
    """It is gone."""

    message: str


class Transfer(BaseModel):
    """What became of a copy or move; error: why it failed."""

    source: str | None
    destination: str | None
    success: bool
    error: str | None = None


class Transferred(BaseModel):
    """What became of each, in the order given."""

    results: list[Transfer]


class Found(BaseModel):
    """Something that was found; matches: the lines of its content."""

    path: str
    type: Type
    size: int
    matches: list[str] | None = None


class SearchResults(BaseModel):
    """What was found. truncated: there may be more."""

    results: list[Found]
    total: int
    truncated: bool


class Archived(BaseModel):
    """An archive that was made. skipped: symbolic links and the like, which are not in it."""

    path: str
    size: int
    format: Literal["zip", "tar", "tar.gz", "tar.bz2"]
    skipped: int


class Extracted(BaseModel):
    """An archive that was extracted. skipped: symbolic links in it, of which nothing was made."""

    destination: str
    files_extracted: int
    skipped: int


class FileMetadata(BaseModel):
    """The metadata of a file or directory."""

    path: str
    type: Type
    size: int
    permissions: str
    created_at: str
    modified_at: str
    tags: list[str]
    owner: str | None = None
    group: str | None = None


class InitialFile(BaseModel):
    """A file that an agent begins with."""

    path: str
    size: int


class AgentCreated(BaseModel):
    """An agent that exists now."""

    id: str
    agentId: str  # noqa: N815  # the API's word
    created_at: str
    initial_files: list[InitialFile]
