"""Where an agent's home is live: on this host, on another, or nowhere."""

from __future__ import annotations

import trio
from starlette.requests import Request

from agentfuse.gateway.auth import key_of
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.shinzo.filesystem import Filesystem
from agentfuse.gateway.shinzo.paths import agent_of

_KNOWN_S = 2.0
"""How long what the store said of other hosts' executions is taken for true. Who acts on an agent as idle
when it is not any more changes its memory in the store, and the execution merges that like any change."""


class Homes:
    """The live homes of agents. ``has_others``: other hosts may have some."""

    def __init__(self, executions: Executions, *, regions: list[str], has_others: bool) -> None:
        self._executions = executions
        self._regions = regions
        self._has_others = has_others
        self._known: dict[str, tuple[float, dict[str, Execution]]] = {}

    async def of(self, organization: str, agent: str) -> Filesystem | None:
        """The files of an agent's home on this host, None if there is none."""
        execution = await self._executions.home_of(organization, agent)
        if execution is None:
            return None
        trees = {region: self._executions.tree(execution, region) for region in self._regions}
        return Filesystem(trees, home=self._executions.mountpoint(execution))

    async def find(self, request: Request) -> Execution | None:
        """The newest live execution of the agent that a request names, on whichever host."""
        if "agentId" not in request.path_params:
            return None
        organization, agent = key_of(request).organization, agent_of(request)
        execution = await self._executions.home_of(organization, agent)
        if execution is not None or not self._has_others:
            return execution
        return (await self._of_others(organization)).get(agent)

    async def _of_others(self, organization: str) -> dict[str, Execution]:
        at, known = self._known.get(organization, (0.0, {}))
        if trio.current_time() - at > _KNOWN_S:
            found = [
                each for each in await self._executions.list(organization) if not each.status.is_terminal
            ]
            known = {each.agent: each for each in sorted(found, key=lambda each: each.created_at)}
            self._known[organization] = (trio.current_time(), known)
        return known
