"""``agentfuse doctor``: finds in advance what a mount would fail at, and names the fix."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agentfuse.cli import options
from agentfuse.cli.output import plain, print_json, say
from agentfuse.config import Config
from agentfuse.control.mountinfo import mounts, resolve_mountpoint
from agentfuse.control.registry import Registry, open_registry
from agentfuse.doctor import Finding, guarded, machine, mountpoints, sandboxes, storage, units
from agentfuse.errors import ConfigError, EnvironmentProblem


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(doctor)


def doctor(
    mountpoint: Annotated[
        str | None,
        typer.Argument(metavar="[MOUNTPOINT]", help="Where a home is, or will be, mounted or given."),
    ] = None,
    *,
    unit: Annotated[
        list[str] | None,
        typer.Option("--unit", metavar="NAME", help="Only this systemd unit; repeatable."),
    ] = None,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
) -> None:
    """Check that this machine can mount, and how it is deployed.

    Says how to fix what is in the way. Really tries a mount, the state directory (made if it is missing)
    and the object store; looks at the homes that are mounted, at the sandboxes that have them, and at
    systemd's units of agentfuse. With MOUNTPOINT also at that directory, also in a container or a sandbox.
    Exits 0 unless a check failed, else 69.
    """
    if unit:
        findings = list(guarded("systemd", lambda: units.units(unit)))
    else:
        findings = _each_failure_once(_findings(mountpoint, config=config, store=store, state=state))
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            say(f"{finding.verdict:4}  {finding.check:18} {plain(finding.found)}")
            if finding.fix:
                say(f"      {'':18} fix: {plain(finding.fix)}")
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(EnvironmentProblem.exit_code)


def _findings(
    mountpoint: str | None, *, config: str | None, store: str | None, state: str | None
) -> Iterator[Finding]:
    settings, problems = None, []
    try:
        settings = options.configure(config=config, store=store, state=state)
    except ConfigError as error:
        problems = error.problems
    yield from machine.machine(settings.mount_helper if settings else None)
    for problem in problems:
        yield Finding("configuration", "fail", problem, "correct it as the line says")
    if settings is not None:
        yield Finding("configuration", "ok", "no mistakes")
        yield from _of(settings)
    if os.geteuid() == 0 and units.is_there():
        yield from guarded("systemd", lambda: units.units([]))
    try:
        registry = open_registry(os.environ)
    except EnvironmentProblem as error:
        yield Finding("registry", "fail", error.message, error.hint)
        return
    yield from _of_mounts(registry, settings, resolve_mountpoint(mountpoint) if mountpoint else None)


def _of(settings: Config) -> Iterator[Finding]:
    of_state = list(guarded("state", lambda: storage.state(settings)))
    yield from of_state
    yield from guarded("object store", lambda: storage.store(settings))
    if not any(finding.verdict == "fail" for finding in of_state):
        yield from guarded("unflushed homes", lambda: storage.unflushed(settings))


def _of_mounts(registry: Registry, settings: Config | None, mountpoint: Path | None) -> Iterator[Finding]:
    entries = registry.list()
    alive = sum(entry.alive for entry in entries)
    yield Finding("registry", "ok", f"{registry.runtime}, {alive} live")
    if mountpoint is not None:
        yield from _of_mountpoint(mountpoint, registry, settings)
    yield from guarded("dead mounts", lambda: mountpoints.dead(registry))
    yield from guarded("stacked mounts", mountpoints.stacked)
    yield from guarded("hidden mounts", lambda: mountpoints.hidden(registry))
    if settings is not None:
        homes = {entry.mountpoint for entry in mounts() if entry.is_ours}
        homes |= {Path(entry.record.mountpoint) for entry in entries}
        homes |= {mountpoint} if mountpoint is not None else set()
        yield from guarded("sandboxes", lambda: sandboxes.sandboxes_of(sorted(homes), settings.state))


def _of_mountpoint(mountpoint: Path, registry: Registry, settings: Config | None) -> Iterator[Finding]:
    yield from guarded("propagation", lambda: mountpoints.propagation(mountpoint))
    yield from guarded("mountpoint", lambda: mountpoints.occupied(mountpoint))
    yield from guarded("below the mount", lambda: mountpoints.below(mountpoint))
    helper = settings.mount_helper if settings else None
    if helper is not None:
        yield from guarded("mounting", lambda: mountpoints.through_helper(helper, mountpoint, registry))


def _each_failure_once(findings: Iterable[Finding]) -> list[Finding]:
    """What fails several checks is told of with the first of them."""
    told: dict[object, Finding] = {}
    for finding in findings:
        failure = (finding.found, finding.fix) if finding.verdict == "fail" else finding
        told.setdefault(failure, finding)
    return list(told.values())
