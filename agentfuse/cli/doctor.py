"""``agentfuse doctor``: finds in advance what a mount would fail at, and names the fix."""

from __future__ import annotations

import os
import resource
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from agentfuse import __version__
from agentfuse import mountpoint as mountpoints
from agentfuse.cli import options
from agentfuse.cli.output import plain, print_json, say
from agentfuse.cli.trial import try_to_mount
from agentfuse.config import Config, format_size
from agentfuse.control.liveness import liveness
from agentfuse.control.mountinfo import mounts
from agentfuse.control.registry import open_registry
from agentfuse.errors import AgentfuseError, ConfigError, EnvironmentProblem
from agentfuse.helped import HelpedMounter
from agentfuse.home.tree import list_homes
from agentfuse.objectstore import open_store, probe

Verdict = Literal["ok", "warn", "fail"]
_MIN_FREE_BYTES = 64 * 1024 * 1024
_MIN_DESCRIPTORS = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; ``fix`` is empty when there is nothing to fix."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(doctor)


def doctor(
    *,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
) -> None:
    """Check whether this machine can mount homes.

    Says how to fix what is in the way. Really tries a mount, the state directory (made if it is missing)
    and the object store. Exits 0 unless a check failed, else 69.
    """
    findings = _each_failure_once(_findings(config=config, store=store, state=state))
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            say(f"{finding.verdict:4}  {finding.check:18} {plain(finding.found)}")
            if finding.fix:
                say(f"      {'':18} fix: {plain(finding.fix)}")
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(EnvironmentProblem.exit_code)


def _findings(*, config: str | None, store: str | None, state: str | None) -> Iterator[Finding]:
    yield _python()
    yield from _guarded("/proc", _proc)
    settings, problems = None, []
    try:
        settings = options.configure(config=config, store=store, state=state)
    except ConfigError as error:
        problems = error.problems
    helper = settings.mount_helper if settings else None
    if helper is not None:
        yield from _guarded("mount helper", lambda: _mount_helper(helper))
    else:
        yield from _guarded("/dev/fuse", _device)
        if os.geteuid() != 0:
            yield from _guarded("allow_other", _allow_other)
        yield from _guarded("mounting", _mounting)
    yield from _guarded("open files", _descriptors)
    for problem in problems:
        yield Finding("configuration", "fail", problem, "correct it as the line says")
    if settings is None:
        return
    yield Finding("configuration", "ok", "no mistakes")
    yield from _guarded("state", lambda: _state(settings))
    yield from _guarded("object store", lambda: _store(settings))
    yield from _guarded("registry", _registry)
    yield from _guarded("dead mounts", _dead_mounts)
    yield from _guarded("unflushed homes", lambda: _unflushed(settings))


def _each_failure_once(findings: Iterable[Finding]) -> list[Finding]:
    """What fails several checks is told of with the first of them."""
    told: dict[object, Finding] = {}
    for finding in findings:
        failure = (finding.found, finding.fix) if finding.verdict == "fail" else finding
        told.setdefault(failure, finding)
    return list(told.values())


def _guarded(check: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The check's findings; an error of ours is one, too."""
    try:
        yield from look()
    except AgentfuseError as error:
        yield Finding(check, "fail", error.message, error.hint)
    except OSError as error:
        yield Finding(check, "fail", f"{error.filename or ''} {error.strerror}".strip(), "see the message")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("agentfuse", "ok", f"{__version__} on Python {version}, uid {os.geteuid()}")


def _proc() -> Iterator[Finding]:
    yield Finding("/proc", "ok", f"{len(mounts())} mounts visible")


def _device() -> Iterator[Finding]:
    mountpoints.require_fuse()
    yield Finding("/dev/fuse", "ok", "can be opened")


def _mount_helper(helper: Path) -> Iterator[Finding]:
    HelpedMounter(helper, Path("/")).require()
    yield Finding("mount helper", "ok", f"{helper} listens to this user")


def _allow_other() -> Iterator[Finding]:
    if mountpoints.may_allow_other():
        yield Finding("allow_other", "ok", "user_allow_other is set: other users can be let in")
    else:
        yield Finding(
            "allow_other",
            "warn",
            "only this user, not even root, will see the home",
            "to let others in, add a line user_allow_other to /etc/fuse.conf",
        )


def _mounting() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory(prefix="agentfuse-doctor-") as directory:
        try_to_mount(Path(directory))
    yield Finding("mounting", "ok", "a mount was made and taken away again")


def _descriptors() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= _MIN_DESCRIPTORS:
        yield Finding(
            "open files", "ok", f"at most {hard}" if hard != resource.RLIM_INFINITY else "unlimited"
        )
    else:
        yield Finding(
            "open files",
            "warn",
            f"at most {hard}: programs in a home share them",
            f"raise the hard limit: ulimit -Hn {_MIN_DESCRIPTORS}, LimitNOFILE= in a systemd unit",
        )


def _state(settings: Config) -> Iterator[Finding]:
    path = settings.state
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"agentfuse")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} cannot be written: {error.strerror}",
            hint="it must be a writable directory on a local disk; choose another with --state",
        ) from error
    yield Finding("state", "ok", f"{path} is writable")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding("state", "warn", f"{path} is open to other users", f"chmod 0700 {path}")
    yield _free_space(settings)


def _free_space(settings: Config) -> Finding:
    disk = os.statvfs(settings.state)
    free, wanted = disk.f_bavail * disk.f_frsize, sum(region.bytes_quota for region in settings.regions)
    found = f"{format_size(free)} free, a full home takes {format_size(wanted)}"
    fix = "free some space, or choose another --state"
    if free < _MIN_FREE_BYTES:
        return Finding("free space", "fail", found, fix)
    if disk.f_files and disk.f_favail < 1000:
        return Finding("free space", "fail", f"{found}, but only {disk.f_favail} inodes", fix)
    if free < wanted:
        return Finding("free space", "warn", f"{found}: writes may fail with ENOSPC before a quota does", fix)
    return Finding("free space", "ok", found)


def _store(settings: Config) -> Iterator[Finding]:
    probe(open_store(settings.store))
    yield Finding("object store", "ok", f"{settings.store} works and honours put-if-absent")


def _registry() -> Iterator[Finding]:
    registry = open_registry(os.environ)
    alive = sum(entry.alive for entry in registry.list())
    yield Finding("registry", "ok", f"{registry.runtime}, {alive} live")


def _dead_mounts() -> Iterator[Finding]:
    dead = {Path(entry.record.mountpoint) for entry in open_registry(os.environ).list() if not entry.alive}
    ours = {entry.mountpoint for entry in mounts() if entry.is_ours}
    for mountpoint in sorted(dead | ours):
        state = liveness(mountpoint) if mountpoint in ours else "dead"
        if state != "live":
            yield Finding(
                "dead mounts",
                "warn",
                f"{mountpoint}: its daemon is {state}",
                f"agentfuse umount {mountpoint}",
            )
    if not dead and not ours:
        yield Finding("dead mounts", "ok", "none")


def _unflushed(settings: Config) -> Iterator[Finding]:
    count = 0
    for home in list_homes(settings.state):
        record = home.record()
        if record and record.status == "live" and not home.is_locked():
            count += 1
            yield Finding(
                "unflushed homes",
                "warn",
                f"execution {record.execution} of agent {record.agent} is not in the store yet",
                f"mount agent {record.agent} on this host: that finishes it",
            )
    if not count:
        yield Finding("unflushed homes", "ok", "none")
