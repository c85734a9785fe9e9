"""Links to files that need no key, for answers: absolute URLs."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from agentfuse.gateway.addresses import base_url
from agentfuse.gateway.blobs import ExecutionFile, Links
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.storedtree import StoredFile


@dataclass(frozen=True, slots=True)
class FileLinks:
    """Makes them. ``public_url``: see ``addresses.base_url``."""

    links: Links
    public_url: str

    def of_file(
        self, request: Request, execution: Execution, region: str, path: bytes, media_type: str
    ) -> str:
        """A link to what a path of an execution has when it is followed. Costs next to nothing."""
        file = ExecutionFile(execution.organization, execution.id, region, path, media_type)
        return base_url(request, self.public_url) + self.links.make_of(file)

    def of_content(self, request: Request, file: StoredFile, media_type: str) -> str:
        """A link to the content of a stored file."""
        return base_url(request, self.public_url) + self.links.make(file, media_type)
