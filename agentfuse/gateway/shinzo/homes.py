"""Where an agent's home is live: on this host, on another, or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.requests import Request

from agentfuse.gateway.auth import key_of
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.executions.trees import ExecutionTree
from agentfuse.gateway.filetree import FileTree
from agentfuse.gateway.shinzo.filesystem import Filesystem
from agentfuse.gateway.shinzo.paths import agent_of


class Homes:
    """The live homes of agents, which have these ``regions``."""

    def __init__(self, executions: Executions, regions: Sequence[str]) -> None:
        self._executions = executions
        self._regions = regions

    async def of(self, organization: str, agent: str) -> Filesystem | None:
        """The files of an agent's home on this host, None if there is none."""
        execution = await self._live(organization, agent)
        if execution is None:
            return None
        # Who has to wait for a home does so here, before he takes a place that others need.
        await self._executions.tree_at_home(execution, self._regions[0])
        trees = {
            region: ExecutionTree(partial(self._tree, organization, agent, region))
            for region in self._regions
        }
        return Filesystem(trees, home=self._executions.mountpoint(execution))

    async def find(self, request: Request) -> Execution | None:
        """The newest live execution of the agent that a request names, on whichever host."""
        if "agentId" not in request.path_params:
            return None
        return await self._executions.home_of(key_of(request).organization, agent_of(request))

    async def _live(self, organization: str, agent: str) -> Execution | None:
        """The execution whose home is, or is about to be, where the agent's files are."""
        execution = await self._executions.home_of(organization, agent)
        return None if execution is None or execution.status.is_terminal else execution

    async def _tree(self, organization: str, agent: str, region: str, changes: bool) -> FileTree:
        """Where a region's files are now: an execution may end, or begin, while a request is answered."""
        execution = await self._live(organization, agent)
        if execution is not None:
            tree = await self._executions.tree_at_home(execution, region)
            if tree is not None:
                return tree
        return self._executions.idle_tree(agent, region)
