"""Puts the executions of a gateway together from its configuration."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import trio

from agentfuse.admission import Quota
from agentfuse.config import Config
from agentfuse.control.registry import open_registry
from agentfuse.gateway.agents import Agents
from agentfuse.gateway.executions.archive import Archive
from agentfuse.gateway.executions.attachments import REGION, Attachments
from agentfuse.gateway.executions.journal import Journal
from agentfuse.gateway.executions.launcher import Launchers
from agentfuse.gateway.executions.life import Means
from agentfuse.gateway.executions.lives import Lives
from agentfuse.gateway.executions.mounts import Mounts
from agentfuse.gateway.executions.pulse import Pulse
from agentfuse.gateway.executions.records import Records
from agentfuse.gateway.executions.room import Room
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.executions.starters import Child, Starter, Systemd
from agentfuse.gateway.executions.whereabouts import Hints
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.gateway.hosts.lease import LEASE_FILE
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.livetree import LiveTree
from agentfuse.gateway.staging import Staging
from agentfuse.gateway.storedtree import StoredTree
from agentfuse.gateway.trees import Trees
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.layout import TENANT_FILES, tenant_owner


def make_executions(
    config: Config,
    store: ObjectStore,
    trees: Trees,
    agents: Agents,
    *,
    config_file: Path | None,
    hosts: Hosts,
    limits: Limits,
    nursery: trio.Nursery,
) -> Executions:
    """The executions of this host; lives run in ``nursery``. Raises ``EnvironmentProblem``."""
    settings = config.gateway
    uploads = next(region for region in config.regions if region.name == REGION)

    def tree_of(tenant: str) -> StoredTree:
        return trees.get(tenant_owner(tenant), TENANT_FILES, settings.quota_of(tenant))

    journal = Journal(config.state)
    journal.sweep()
    registry = open_registry(os.environ)
    starter = _starter(config, config_file, journal, registry.runtime)
    means = Means(
        records=Records(store),
        hints=Hints(store),
        room=Room(settings.max_executions),
        mounts=Mounts(
            config,
            settings.mounts or config.state.with_name(f"{config.state.name}-mounts"),
            registry=registry,
            starter=starter,
            limiter=limits.lives,
        ),
        launchers=Launchers(
            settings.launcher,
            journal=journal,
            starter=starter,
            lease=config.state / "gateway" / LEASE_FILE,
            grace_s=settings.launcher_grace_s,
            limiter=limits.lives,
        ),
        journal=journal,
        attachments=Attachments(
            Staging(store), tree_of, Quota(uploads.bytes_quota, uploads.files_quota), limits
        ),
        archive=Archive(store, config.state),
        limiter=limits.lives,
        max_restarts=settings.max_restarts,
    )
    return Executions(
        means,
        Lives(means, hosts=hosts, keep_ended_s=config.keep_ended_s, nursery=nursery),
        hosts=hosts,
        agents=agents,
        trees=trees,
        regions=config.regions,
        pulse=Pulse(registry),
        live_tree=partial(LiveTree, limiter=limits.uploads, readers=limits.contents),
    )


def _starter(config: Config, config_file: Path | None, journal: Journal, runtime: Path) -> Starter:
    if config.gateway.starter == "systemd":
        return Systemd(config, config_file, config.gateway.mount_unit, journal, runtime)
    return Child(config, config_file, os.environ)
