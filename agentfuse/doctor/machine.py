"""Whether this user, on this machine or in this container, can mount at all."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from agentfuse import __version__
from agentfuse import mountpoint as mountpoints
from agentfuse.control.mountinfo import mounts
from agentfuse.doctor import MIN_DESCRIPTORS, Finding, guarded
from agentfuse.doctor.trial import in_user_namespace, try_to_mount
from agentfuse.helped import HelpedMounter


def machine(helper: Path | None) -> Iterator[Finding]:
    """All of it. ``helper``: the socket of the mount helper, if that mounts."""
    yield _python()
    yield from guarded("/proc", _proc)
    if helper is not None:
        yield from guarded("mount helper", lambda: _mount_helper(helper))
    else:
        yield from guarded("/dev/fuse", _device)
        if os.geteuid() != 0:
            yield from guarded("allow_other", _allow_other)
        yield from guarded("mounting", _mounting)
    yield from guarded("open files", _descriptors)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    where = ", in a user namespace: mounts are seen in it alone" if in_user_namespace() else ""
    return Finding("agentfuse", "ok", f"{__version__} on Python {version}, uid {os.geteuid()}{where}")


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
    if hard == resource.RLIM_INFINITY or hard >= MIN_DESCRIPTORS:
        found = f"at most {hard}" if hard != resource.RLIM_INFINITY else "unlimited"
        yield Finding("open files", "ok", found)
    else:
        yield Finding(
            "open files",
            "warn",
            f"at most {hard}: programs in a home share them",
            f"raise the hard limit: ulimit -Hn {MIN_DESCRIPTORS}, LimitNOFILE= in a systemd unit, "
            "--ulimit nofile= of a container",
        )
