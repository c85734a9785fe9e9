"""What a real mount exports: at the control socket, at a port, and in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from mounts import Home
from prometheus_client.parser import text_string_to_metric_families

from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry
from agentfuse.metrics.families import FAMILIES

pytestmark = pytest.mark.mount

KiB = 1024


@pytest.fixture(scope="module")
def published(make_home: Callable[..., Home], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("textfiles")


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inbox")


@pytest.fixture(scope="module")
def home(make_home: Callable[..., Home], published: Path, inbox: Path) -> Iterator[Home]:
    top = f"""
        metrics = "127.0.0.1:0"
        metrics_file = "{published}/agentfuse-{{agent}}-{{execution}}.prom"
        sync_delay = "100ms"
        checkpoint_interval = "100ms"

        [[inbox]]
        directory = "{inbox}"
        region = "uploads"
    """
    made = make_home(top=top, regions={"downloads": (100 * KiB, 5)}).start()
    yield made
    made.umount()
    assert os.listdir(published) == []


def metrics(home: Home) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of the labels, in the order of their names, without the mount's."""
    text = ControlClient(Registry(home.runtime).find(home.path).socket).metrics()
    return samples(home, text)


def samples(home: Home, text: str) -> dict[tuple[str, ...], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("agent"), labels.pop("execution")) == (home.agent, home.execution)
            found[sample.name, *labels.values()] = sample.value
    return found


def test_what_happens_is_counted(home: Home) -> None:
    (home.path / "shared/note").write_bytes(b"x" * 3 * KiB)
    assert home.agentfuse("sync", str(home.path)).returncode == 0
    (home.path / "downloads/a").write_bytes(b"x" * 90 * KiB)
    with pytest.raises(OSError, match="quota"), open(home.path / "downloads/b", "wb", buffering=0) as file:
        file.write(b"x" * 10 * KiB)
        file.write(b"x")
    assert (home.path / "downloads/a").read_bytes()
    home.settled()
    now = metrics(home)
    assert now["agentfuse_fuse_errors_total", "EDQUOT", "write"] == 1
    asked = now["agentfuse_fuse_requests_total", "write"]
    assert now["agentfuse_fuse_request_duration_seconds_count", "write"] == asked >= 4
    assert now["agentfuse_region_written_bytes_total", "downloads"] == 100 * KiB
    assert now["agentfuse_region_used_bytes", "downloads"] == 100 * KiB
    assert now["agentfuse_region_used_files", "downloads"] == 2
    assert now["agentfuse_region_quota_files", "downloads"] == 5
    assert now["agentfuse_region_quota_refusals_total", "downloads"] == 1
    assert now["agentfuse_sync_snapshots_total", "shared"] >= 1
    assert now["agentfuse_sync_dirty_files", "shared"] == 0
    assert now["agentfuse_store_requests_total", "put_if_absent"] >= 1
    assert now["agentfuse_store_sent_bytes_total",] >= 3 * KiB
    assert now["agentfuse_process_resident_memory_bytes",] > 1e6
    assert now["agentfuse_fuse_open_handles",] == 0


def test_events_are_counted_by_region_and_kind(home: Home) -> None:
    entry = Registry(home.runtime).find(home.path)
    before = int(home.status()["events"]["newest"])
    (home.path / "uploads/a").write_bytes(b"1")
    found = ControlClient(entry.socket).events(since=before, region="uploads", follow=True)
    assert next(event for event in found if event)["kind"] == "arrived"
    assert metrics(home)["agentfuse_events_total", "arrived", "uploads"] == 1


def test_files_from_an_inbox_are_counted(home: Home, inbox: Path) -> None:
    before = int(home.status()["events"]["newest"])
    (inbox / "came.txt").write_bytes(b"1")
    found = ControlClient(Registry(home.runtime).find(home.path).socket).events(since=before, follow=True)
    assert next(event for event in found if event)["path"] == "came.txt"
    while metrics(home)["agentfuse_inbox_taken_files_total", str(inbox)] < 1:
        assert home.status()["state"] == "live"
    assert metrics(home)["agentfuse_inbox_left_files", str(inbox)] == 0


def test_everything_exported_is_documented_and_everything_documented_is_exported(home: Home) -> None:
    entry = Registry(home.runtime).find(home.path)
    text = ControlClient(entry.socket).metrics()
    exported = {
        (name, kind)
        for line in text.splitlines()
        if line[:7] == "# TYPE "
        for name, kind in [line[7:].split()]
    }
    assert exported == {(family.name, family.kind) for family in FAMILIES}
    for family in FAMILIES:
        assert f"# HELP {family.name} {family.help}\n" in text


def test_the_port_and_the_file_have_the_same_metrics(home: Home, published: Path) -> None:
    answer = httpx.get(home.status()["metrics_url"])
    assert answer.status_code == 200
    (name,) = os.listdir(published)
    assert name == f"agentfuse-{home.agent}-{home.execution}.prom"
    names = {name for name, *_ in samples(home, (published / name).read_text())}
    assert names <= {name for name, *_ in samples(home, answer.text)}
    assert ("agentfuse_mount_start_time_seconds",) in samples(home, answer.text)


def test_two_mounts_of_one_configuration_both_live_though_one_has_the_port(
    home: Home, new_home: Callable[..., Home]
) -> None:
    taken = httpx.URL(home.status()["metrics_url"]).port
    other = new_home(top=f'metrics = "127.0.0.1:{taken}"').start()
    assert other.status()["metrics_url"] is None
    other.umount()
    assert any("each mount needs a port of its own" in line for line in other.output)
