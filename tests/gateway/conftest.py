"""One gateway for all modules, on a local store; a client of a tenant that is empty before each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gateways
import httpx
import pytest
from agents_files import Agent, executing
from gateways import Gateway


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    base = tmp_path_factory.mktemp("gateway")
    with gateways.gateway(base, f"file://{base}/store") as running:
        yield running


@pytest.fixture(scope="session")
def executed(gateway: Gateway) -> Iterator[tuple[Agent, Path]]:
    """An agent whose execution runs, for all modules, and where its home is."""
    with gateway.client() as client, executing(gateway, Agent(client)) as home:
        yield home.agent, home.path


@pytest.fixture
def live(executed: tuple[Agent, Path]) -> Agent:
    """An agent whose execution runs; what it holds is removed before each test."""
    agent, home = executed
    for region in ("shared", "workspace", "uploads", "downloads"):
        if any((home / region).iterdir()):
            agent.empty(region)
    return agent


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        _empty(client, "")
        yield client


def _empty(client: httpx.Client, path: str) -> None:
    for node in gateways.listing(client, path):
        if node["is_dir"]:
            _empty(client, node["path"])
        assert client.delete("/api/v1/files", params={"path": node["path"]}).status_code == 204
