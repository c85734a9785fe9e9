"""The executions of a gateway: what its routes ask for."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from agentfuse.admission import ApiKey, Quota
from agentfuse.client import AsyncHome, Event
from agentfuse.errors import BusyError, NotFoundError, StoreError, UsageError
from agentfuse.gateway.agents import Agent, Agents
from agentfuse.gateway.executions import purging
from agentfuse.gateway.executions.archive import MOST_EVENTS
from agentfuse.gateway.executions.life import Life, Means, Phase
from agentfuse.gateway.executions.lives import Lives
from agentfuse.gateway.executions.pulse import Pulse
from agentfuse.gateway.executions.record import Execution, Message, Status
from agentfuse.gateway.executions.trees import ExecutionTree
from agentfuse.gateway.filetree import FileTree, Usage
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.gateway.trees import Trees
from agentfuse.regions import LOOSE, Region, Scope
from agentfuse.snapshots.layout import execution_region

_T = TypeVar("_T")

PATIENCE_S = 20.0
"""How long a request for a file waits for a home that is just being mounted or brought into the store."""

_LOOK_S = 0.5
_MAX_MESSAGES, _MAX_MESSAGES_CHARS = 1000, 512 * 1024
"""They are in the execution's record, which is written anew with every change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecuteBody:
    """What an execution is to be. ``staged``: ids of staged files; ``files``: paths of the tenant's store;
    ``queues``: it waits when the host has no room, rather than being refused."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    staged: Sequence[str] = ()
    files: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    profile: str | None = None
    queues: bool = False


class Executions:
    """All executions, as an organization sees them. What is not its own is a ``NotFoundError``.

    ``lives``: those of this host; ``hosts``: whose they are; ``regions``: those of homes; ``pulse``: whether
    their daemons answer; ``live_tree``: the tree of a region of a mounted home. Every method raises
    ``StoreError`` when the store failed.
    """

    def __init__(
        self,
        means: Means,
        lives: Lives,
        *,
        hosts: Hosts,
        agents: Agents,
        trees: Trees,
        regions: Sequence[Region],
        pulse: Pulse,
        live_tree: Callable[[Path, str], FileTree],
    ) -> None:
        self._means = means
        self._hosts = hosts
        self._agents = agents
        self._trees = trees
        self._regions = {region.name: region for region in regions}
        self._pulse = pulse
        self._live_tree = live_tree
        self.lives = lives

    async def purge_old(self, after_s: float | None) -> None:
        """Purge what ended so long ago, and prune records; see ``purging``."""
        await purging.purge_old(self._means, self._change, after_s)

    # -- what routes ask for

    async def execute(self, key: ApiKey, agent: str, body: ExecuteBody) -> Execution:
        """Begin an execution of an agent, which begins to exist with its first one.

        Raises ``UsageError`` and its kinds, ``QuotaExceededError``, ``NotFoundError`` for another's agent:
        then there is none, and what was staged can be used for another one.
        """
        self._hosts.check_owning()
        await self._in_thread(self._agents.claim, key.organization, agent)
        return await self._begin(key, agent, body)

    async def _begin(
        self, key: ApiKey, agent: str, body: ExecuteBody, *, parent: str | None = None
    ) -> Execution:
        staged, files = await self._means.attachments.check(
            key.organization, key.tenant, body.staged, body.files
        )
        record = Execution(
            id=str(uuid.uuid4()),
            organization=key.organization,
            agent=agent,
            tenant=key.tenant,
            user=key.id,
            host=self._hosts.id,
            epoch=self._hosts.epoch,
            created_at=time.time(),
            status=Status.STARTING,
            inputs=dict(body.inputs),
            metadata=dict(body.metadata),
            options=dict(body.options),
            profile=body.profile,
            staged=staged,
            files=files,
            parent=parent,
        )
        return await self.lives.begin(record, queues=body.queues)

    async def get(self, organization: str, execution: str) -> Execution:
        """An execution. Raises ``NotFoundError``."""
        record = await self._in_thread(self._means.records.read, organization, execution)
        if record.deleted_at is not None:
            raise NotFoundError("Execution not found.")
        life = self.lives.get(record.id)
        if life is not None and life.trouble and not record.reason:
            record = msgspec.structs.replace(record, reason=life.trouble)
        return record

    async def list(self, organization: str) -> Sequence[Execution]:
        """All that are not deleted, in no order."""
        found = await self._in_thread(lambda: list(self._means.records.list(organization)))
        return [record for record in found if record.deleted_at is None]

    async def set_status(
        self,
        organization: str,
        execution: str,
        status: Status,
        *,
        reason: str = "",
        result: dict[str, Any] | None = None,
    ) -> Execution:
        """Pause it, resume it or begin its end; what it is already, it stays.

        A terminal status is there once everything is in the store: until then ``ends_as`` says it. Raises
        ``BusyError`` for what makes no sense any more.
        """
        found = await self.get(organization, execution)
        change = partial(_changed, status=status, reason=reason, result=result)
        record = await self._change(organization, found.id, change)
        life = self.lives.get(record.id)
        if life is not None:
            await life.obey()
        return record

    async def wait(self, organization: str, execution: str, timeout_s: float) -> Execution:
        """An execution when it is terminal, or when the time is over."""
        record = await self.get(organization, execution)
        with trio.move_on_after(timeout_s):
            while not record.status.is_terminal:
                life = self.lives.get(record.id)
                if life is not None:
                    await life.ended.wait()
                else:
                    await trio.sleep(_LOOK_S)
                record = await self.get(organization, execution)
        return record

    async def rerun(
        self,
        key: ApiKey,
        execution: str,
        *,
        inputs: Mapping[str, Any] | None = None,
        profile: str | None = None,
    ) -> Execution:
        """Begin another execution like this one, without the files that were staged for it."""
        self._hosts.check_owning()
        parent = await self.get(key.organization, execution)
        body = ExecuteBody(
            inputs=parent.inputs if inputs is None else inputs,
            files=parent.files,
            metadata=parent.metadata,
            options=parent.options,
            profile=parent.profile if profile is None else profile,
        )
        begun = await self._begin(key, parent.agent, body, parent=parent.id)
        await self._change(parent.organization, parent.id, _rerun)
        return begun

    async def delete(self, organization: str, execution: str) -> None:
        """Have nobody see it any more. Raises ``BusyError`` unless it is terminal."""
        found = await self.get(organization, execution)

        def deleted(record: Execution) -> Execution:
            _require_ended(record)
            return msgspec.structs.replace(record, deleted_at=record.deleted_at or time.time())

        await self._change(organization, found.id, deleted)

    async def add_message(self, organization: str, execution: str, text: str, user: str) -> Execution:
        """Note what a user tells the agent. Raises ``BusyError`` when it has ended."""
        found = await self.get(organization, execution)
        message = Message(id=str(uuid.uuid4()), at=time.time(), text=text, user=user)

        def told(record: Execution) -> Execution:
            if record.status.is_terminal:
                raise BusyError(f"the execution is {record.status}", hint="begin another one")
            if len(record.messages) >= _MAX_MESSAGES:
                raise UsageError(f"an execution takes {_MAX_MESSAGES} messages at most")
            if sum(len(each.text) for each in (*record.messages, message)) > _MAX_MESSAGES_CHARS:
                raise UsageError(f"an execution takes messages of {_MAX_MESSAGES_CHARS:,} characters in all")
            return msgspec.structs.replace(record, messages=[*record.messages, message])

        return await self._change(organization, found.id, told)

    async def events(self, execution: Execution) -> Sequence[Event]:
        """What happened to its files so far, the newest of it."""
        life = self.lives.get(execution.id)
        if life is None or await self._settled(life) == "ended":
            return await self._in_thread(self._means.archive.read, execution)
        found: deque[Event] = deque(maxlen=MOST_EVENTS)
        async with aclosing(AsyncHome(self._means.mounts.path(execution.id)).events()) as events:
            async for event in events:
                found.append(event)
        return [*found]

    async def follow(self, execution: Execution, since: int) -> AsyncGenerator[Event, None]:
        """Events numbered higher than ``since``, and those to come until its home is unmounted.

        To stop early, leave the iteration within ``contextlib.aclosing``. Raises as ``AsyncHome.events``.
        """
        life = self.lives.get(execution.id)
        if life is None or await self._settled(life) == "ended":
            for event in await self._in_thread(self._means.archive.read, execution):
                if event.seq > since:
                    yield event
            return
        home = AsyncHome(self._means.mounts.path(execution.id))
        async with aclosing(home.events(since=since, follow=True)) as events:
            async for event in events:
                yield event

    async def usage(self, execution: Execution) -> Mapping[str, Usage]:
        """What each region of its home holds, once it has ended of those that are kept."""
        life = self.lives.get(execution.id)
        if life is not None and await self._settled(life) == "live":
            await self._pulse.require(self.mountpoint(execution))
            regions = await AsyncHome(self._means.mounts.path(execution.id)).regions()
            return {
                each.name: Usage(each.bytes_used, each.files_used, each.bytes_quota, each.files_quota)
                for each in regions
            }
        kept = [name for name in self._regions if name != LOOSE]
        return {name: await self.tree(execution, name).usage() for name in kept}

    def tree(self, execution: Execution, region: str) -> FileTree:
        """The files of a region. Raises ``NotFoundError`` for a region that homes do not have."""
        if region not in self._regions:
            raise NotFoundError(f"there is no region {region[:80]!a}")
        return ExecutionTree(partial(self._tree_now, execution, region))

    def idle_tree(self, agent: str, region: str = "shared") -> FileTree:
        """What an agent without a live execution has in a region of its own."""
        found = self._regions.get(region)
        if found is None or found.scope is not Scope.AGENT:
            raise BusyError(
                f"{region[:80]!a} belongs to an execution, and agent {agent} has none that runs",
                hint="begin one, or use shared/",
            )
        return self._trees.get(agent, region, Quota(found.bytes_quota, found.files_quota))

    async def home_of(self, organization: str, agent: str) -> Execution | None:
        """The execution of an agent that has a home, or is about to have one, on whatever host: the newest of
        those that go on, or else of those that are ending."""
        mine = [
            each
            for each in self.lives.records()
            if (each.organization, each.agent) == (organization, agent) and each.status is not Status.QUEUED
        ]
        if not mine and self._hosts.proofs is not None:
            for execution in await self._in_thread(self._means.hints.of, agent):
                with suppress(NotFoundError):
                    record = await self._in_thread(self._means.records.read, organization, execution)
                    if record.status.is_terminal:  # as its host, which is lost, did not say
                        with suppress(StoreError):
                            await self._in_thread(self._means.hints.remove, record)
                    elif record.status is not Status.QUEUED:
                        mine.append(record)
        return max(mine, key=lambda each: (each.ends_as is None, each.created_at), default=None)

    async def agents(self, organization: str, ids: Collection[str]) -> Mapping[str, Agent]:
        """Agents that exist. Raises ``NotFoundError`` for one that does not, or is another's."""
        find = partial(self._agents.find, organization)
        return await self._in_thread(lambda: {each: find(each) for each in ids})

    def mountpoint(self, execution: Execution) -> Path:
        """Where its home is mounted, or will be."""
        return self._means.mounts.path(execution.id)

    async def tree_at_home(self, execution: Execution, region: str) -> FileTree | None:
        """A region of its mounted home, which is waited for; None if it has ended, or is not this host's.
        Raises ``BusyError`` when that takes long, ``UnflushedError`` while its daemon does not answer."""
        life, mountpoint = self.lives.get(execution.id), self.mountpoint(execution)
        if life is None or await self._settled(life) != "live":
            self._pulse.forget(mountpoint)
            return None
        await self._pulse.require(mountpoint)
        return self._live_tree(mountpoint, region)

    # -- in between

    async def _tree_now(self, execution: Execution, region: str, changes: bool) -> FileTree:
        live = await self.tree_at_home(execution, region)
        if live is not None:
            return live
        if self.lives.get(execution.id) is None and not execution.status.is_terminal:
            execution = await self.get(execution.organization, execution.id)
            if not execution.status.is_terminal:
                raise BusyError("the execution is not this host's, or not yet", hint="ask again")
        if changes:
            raise UsageError("the execution has ended", hint="begin another one")
        found = self._regions[region]
        if region == LOOSE:
            raise NotFoundError("what lay loose in a home is not kept")
        # Of one that was purged, what somebody remembers of its snapshots is not asked for: there are none.
        name = region if execution.purged_at is None else f"{region}.purged"
        place = region if found.scope is Scope.AGENT else execution_region(execution.id, name)
        return self._trees.get(execution.agent, place, Quota(found.bytes_quota, found.files_quota))

    async def _settled(self, life: Life) -> Phase:
        """Wait until its files can be had. Raises ``BusyError`` if that takes long."""
        with trio.move_on_after(PATIENCE_S):
            while life.phase not in ("live", "ended"):
                await life.changed()
            return life.phase
        why = f": {life.trouble}" if life.trouble else ""
        raise BusyError(f"the execution's home is {life.phase}{why}", hint="ask again a little later")

    async def _change(
        self, organization: str, execution: str, change: Callable[[Execution], Execution]
    ) -> Execution:
        """Change a record by its own id: clients may spell one in other ways (``uuid.UUID``)."""
        life = self.lives.get(execution)
        if life is not None:
            return await life.change(change)
        return await self._in_thread(self._means.records.change, organization, execution, change)

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._means.limiter)


def _changed(record: Execution, *, status: Status, reason: str, result: dict[str, Any] | None) -> Execution:
    """The record after somebody asked for a status."""
    now = record.ends_as or record.status
    if now is status:
        return record
    if record.ends_as is not None:
        raise BusyError(f"the execution ends as {now}" if not record.status.is_terminal else f"it is {now}")
    if status.is_terminal:
        return msgspec.structs.replace(
            record, ends_as=status, reason=reason, result=record.result if result is None else result
        )
    if record.status not in _FROM.get(status, ()):
        raise BusyError(f"an execution that is {record.status} cannot become {status}")
    return record.with_status(status)


_FROM = {
    Status.PAUSED: (Status.RUNNING, Status.AWAITING_CONFIRMATION, Status.PAUSED_BY_AGENT),
    Status.RUNNING: (Status.PAUSED, Status.AWAITING_CONFIRMATION, Status.PAUSED_BY_AGENT),
}


def _rerun(record: Execution) -> Execution:
    return msgspec.structs.replace(record, has_been_rerun=True)


def _require_ended(record: Execution) -> None:
    if not record.status.is_terminal:
        raise BusyError(f"the execution is {record.status}", hint="cancel it first")
