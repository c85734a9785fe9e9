"""The configuration's rules of who made a file: each tells a creator of the processes that it fits.

Only what was written, and what can be found wrong with it; no process is looked at here.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentfuse.regions import Creator, Region
from agentfuse.values import shown

MAX_ID = 2**32 - 2  # (uid_t) -1 means "leave as it is" to chown


@dataclass(frozen=True, slots=True)
class CreatorRule:
    """What fits all that is not None is ``creator``'s.

    ``exe`` is an executable's path, or a pattern of it; ``cgroup`` that of a cgroup of version 2, or of one
    above it. In patterns ``*`` stands for anything but a slash.
    """

    creator: Creator
    uid: int | None = None
    gid: int | None = None
    exe: str | None = None
    cgroup: str | None = None


def creator(value: object) -> Creator:
    """One of the four."""
    try:
        return Creator(value)  # type: ignore[arg-type]  # that is what is being found out
    except ValueError:
        raise ValueError(
            f"{shown(value)} is not a creator; write one of {', '.join(Creator)}, in quotes"
        ) from None


def _uid(value: object) -> int:
    return _id(value, "user", lambda name: pwd.getpwnam(name).pw_uid)


def _gid(value: object) -> int:
    return _id(value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _id(value: object, kind: str, look_up: Callable[[str], int]) -> int:
    if isinstance(value, str) and value and "\0" not in value:
        try:
            return look_up(value)
        except KeyError:
            raise ValueError(
                f"no {kind} {shown(value)} on this host; create it or write its number, without quotes"
            ) from None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ID:
        raise ValueError(
            f'{shown(value)} is not a {kind}; write its number like 1000, or its name like "browser"'
        )
    return value


def _exe(value: object) -> str:
    path = _pattern(value, "/usr/lib/chromium/chromium", "/opt/*/chrome")
    if _is_pattern(path):
        return path
    path = os.path.realpath(path)  # that is what the kernel calls it
    try:
        with open(path, "rb") as file:
            is_script = file.read(2) == b"#!"
    except OSError:
        return path
    if is_script:
        raise ValueError(
            f"{shown(value)} is a script, so its processes are those of its interpreter, or of what it "
            "starts; write the program that it starts"
        )
    return path


def _cgroup(value: object) -> str:
    return _pattern(value, "/system.slice/browser.service", "/user.slice/*/browser-*.scope")


def _pattern(value: object, example: str, pattern: str) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(
            f'{shown(value)} is not an absolute path; write it like "{example}" or, for several, "{pattern}"'
        )
    if "**" in value:
        raise ValueError(f'{shown(value)}: "**" means nothing here; write a "*" for each name on the way')
    return os.path.normpath(value)


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


KEYS: dict[str, Callable[[object], Any]] = {
    "creator": creator,
    "uid": _uid,
    "gid": _gid,
    "exe": _exe,
    "cgroup": _cgroup,
}


def rule(
    values: Mapping[str, Any], regions: Mapping[str, Region], others: Sequence[CreatorRule]
) -> CreatorRule:
    """The rule that was written. Raises ``ValueError`` for one that can do nothing."""
    if "creator" not in values:
        raise ValueError('it tells no creator; add creator = "environment"')
    made = CreatorRule(**values)
    if len(values) == 1:
        raise ValueError(
            "it fits every process; add uid, gid, exe or cgroup (what no rule fits is told by each region's "
            "own creator)"
        )
    for other in others:
        if all(getattr(other, key) in (None, getattr(made, key)) for key in ("uid", "gid", "exe", "cgroup")):
            raise ValueError("an earlier rule fits all that it fits, and the first one counts; put it first")
    return made
