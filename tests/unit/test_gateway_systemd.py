"""Daemons as units of systemd. ``systemctl`` is a fake, which does what systemd would do with the unit."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import mounts
import pytest
import trio

from agentfuse.config import load_config
from agentfuse.control.registry import Registry
from agentfuse.errors import EnvironmentProblem
from agentfuse.gateway.executions.journal import Journal, Note
from agentfuse.gateway.executions.mounts import Mounts
from agentfuse.gateway.executions.starters import Systemd

_SYSTEMCTL = f"""#!/bin/sh
echo "$@" >> "$CALLS"
case "$CALLS" in *broken*) echo "Unit is masked." >&2; exit 1;; esac
[ $2 = start ] || exit 0
id=${{3#agentfuse-execution@}}; id=${{id%.service}}
set -a; . "$AGENTFUSE_RUNTIME_DIR/executions/$id/mount.env"; set +a
exec {mounts.AGENTFUSE} mount "$MOUNTPOINT" --agent "$AGENT" --execution "$id" --retain --background
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    base = mounts.base_directory()
    (base / "bin").mkdir()
    (base / "bin/systemctl").write_text(_SYSTEMCTL)
    (base / "bin/systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{base}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(base / "calls"))
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(base / "run"))
    (base / "run").mkdir(mode=0o700)
    yield base
    for path in mounts.mountpoints_below(base):
        mounts.detach(path)
    mounts.remove_base(base)


def _mounts(base: Path) -> tuple[Mounts, Journal]:
    overrides: dict[str, object] = {"state": str(base / "state"), "store": f"file://{base}/a $tore"}
    config = load_config(None, environ={"HOME": "/"}, overrides=overrides)
    journal = Journal(config.state)
    starter = Systemd(config, None, "agentfuse-execution@.service", journal, base / "run")
    limiter = trio.CapacityLimiter(4)
    found = Mounts(config, base / "mounts", registry=Registry(base / "run"), starter=starter, limiter=limiter)
    return found, journal


@pytest.mark.mount
async def test_a_home_is_mounted_by_its_unit_and_unmounted_as_others(base: Path) -> None:
    found, journal = _mounts(base)
    execution = str(uuid.uuid4())
    journal.write(Note(id=execution, organization="o", agent='a"da'))
    await found.start("ada", execution)
    assert (
        base / "calls"
    ).read_text() == f"--no-ask-password start agentfuse-execution@{execution}.service\n"
    (found.path(execution) / "workspace/x").write_bytes(b"x")
    await found.end(execution)
    assert found.outcome(execution) == "flushed"
    assert list((base / "a $tore").glob(f"agents/ada/executions/{execution}/workspace/snapshots/*"))


async def test_why_a_unit_cannot_be_started_is_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLS", str(base / "broken"))
    found, journal = _mounts(base)
    execution = str(uuid.uuid4())
    journal.write(Note(id=execution, organization="o", agent="ada"))
    with pytest.raises(EnvironmentProblem, match=r"Unit is masked.*journalctl -u agentfuse-execution@"):
        await found.start("ada", execution)
    (base / "bin/systemctl").unlink()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(base / "bin"))
        with pytest.raises(EnvironmentProblem, match="systemctl cannot be run"):
            await found.start("ada", execution)
