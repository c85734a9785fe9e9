"""The regions of one home that go to the store, each with the ``Memory`` that takes it there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from agentfuse.config import count, format_size
from agentfuse.errors import EnvironmentProblem
from agentfuse.home.index import Index
from agentfuse.home.tree import Home, HomeRecord
from agentfuse.objectstore import ObjectStore
from agentfuse.objectstore.cache import without_cache
from agentfuse.progress import Reporter
from agentfuse.regions import Region, Scope, SyncPolicy
from agentfuse.snapshots.entries import printable
from agentfuse.snapshots.layout import execution_region
from agentfuse.sync.engine import Memory
from agentfuse.sync.reports import CommitReport

_log = logging.getLogger(__name__)


class SyncedRegions:
    """The memories of a home, by region; the agent's own first. Use it as a context manager."""

    def __init__(
        self,
        regions: Iterable[Region],
        home: Home,
        record: HomeRecord,
        store: ObjectStore,
        owner: tuple[int, int] | None,
    ) -> None:
        self._indexes: list[Index] = []
        self.memories: dict[Region, Memory] = {}
        synced = [region for region in regions if region.sync is not SyncPolicy.NEVER]
        for region in sorted(synced, key=lambda region: region.scope is not Scope.AGENT):
            index = Index(home.index_of(region.name))
            self._indexes.append(index)
            is_agents = region.scope is Scope.AGENT
            self.memories[region] = Memory(
                store=store if is_agents else without_cache(store),  # no later run reads these
                agent=record.agent,
                execution=record.execution,
                root=home.tree / region.name,
                index=index,
                owner=owner,
                region=region.name if is_agents else execution_region(record.execution, region.name),
            )

    def __enter__(self) -> SyncedRegions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index in self._indexes:
            index.close()

    def agents(self) -> Iterator[tuple[Region, Memory]]:
        """Those that outlive the execution."""
        return (item for item in self.memories.items() if item[0].scope is Scope.AGENT)

    def note_restored(self) -> None:
        """What restoring has left for later, see ``Memory``; its failure costs reading, no more."""
        for _, memory in self.agents():
            try:
                memory.note_restored()
            except EnvironmentProblem as error:
                _log.warning("the next commit has more to read: %s", error)

    def commit(self, reporter: Reporter, reason: str, root: Path) -> None:
        """Commit all of them, which nobody writes to; ``root`` is the home's. Raises as ``Memory.commit``."""
        for region, memory in self.memories.items():
            if not (root / region.name).is_dir():
                continue  # a home that was laid out before the region was configured
            for line in told(region.name, memory.commit(reporter, reason)):
                reporter.say(line)


def told(region: str, report: CommitReport) -> Iterator[str]:
    """What a commit did, in lines for people."""
    if report.number is None:
        yield f"{region}/: everything is in the store already"
    else:
        yield (
            f"{region}/: flushed {format_size(report.bytes_put)} in {count(report.objects_put, 'object')}; "
            f"snapshot {report.number} holds {count(report.files, 'file')}, {format_size(report.bytes)}"
        )
    for path in report.merged:
        yield f"{region}/: {path} holds what this run and another execution wrote, merged by line"
    for conflict in report.conflicts:
        yield (
            f"{region}/: another execution changed {printable(conflict.path)} too: its version keeps the "
            f"name, this run's is kept as {printable(conflict.kept_at)}"
        )
    if report.skipped:
        yield f"{region}/: sockets and devices are not kept: {', '.join(report.skipped[:5])}"
