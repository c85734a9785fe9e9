"""``mount -t agentfuse`` and fstab: what mount(8) and umount(8) call for a home (their EXTERNAL HELPERS).

    agentfuse  /home/alice  agentfuse  agent=alice,owner=1000:1000,_netdev  0 0

Both become ``agentfuse mount --background`` and ``agentfuse umount`` in this very process.
"""

from __future__ import annotations

import getopt
import re
import sys
from collections.abc import Callable, Sequence

from agentfuse.cli import main
from agentfuse.cli.output import print_error
from agentfuse.errors import AgentfuseError, UsageError

VALUES = ("agent", "execution", "store", "state", "config", "owner")
_OPTION = re.compile(r'(?:[^,"]|"[^"]*"?)+')
"""One option; a comma in quotation marks does not separate, as mount(8) has it."""
MOUNT_OPTIONS = ("dev", "suid", "noexec")
_DEFAULTS = frozenset({
    "rw", "defaults", "auto", "noauto", "nofail", "_netdev", "nouser", "exec", "nodev", "nosuid", "async",
    "relatime", "comment",
})  # fmt: skip


def mount() -> None:
    """``mount.agentfuse agentfuse MOUNTPOINT [-fnsv] [-o OPTIONS]``"""
    _become(_mounting)


def umount() -> None:
    """``umount.fuse.agentfuse MOUNTPOINT [-fln]``"""
    _become(_unmounting)


def _become(translate: Callable[[Sequence[str]], list[str] | None]) -> None:
    try:
        words = translate(sys.argv[1:])
    except AgentfuseError as error:
        print_error(error)
        sys.exit(error.exit_code)
    if words is None:
        sys.exit(0)
    sys.argv = ["agentfuse", *words]
    main()


def _mounting(arguments: Sequence[str]) -> list[str] | None:
    """The words of ``agentfuse mount``; None when nothing is to be done."""
    flags, rest = _parse(arguments, "fnsvo:t:N:")
    if len(rest) != 2:
        raise UsageError(
            "give a source and a mountpoint", hint="mount -t agentfuse agentfuse /home/a -o agent=a"
        )
    words, mount_options = ["mount", rest[1], "--background"], []
    options = ",".join(value for flag, value in flags if flag == "-o")
    for option in _OPTION.findall(options):
        name, _, value = option.partition("=")
        value = value.replace('"', "")
        if name in VALUES and value:
            words += [f"--{name}", value]
        elif option in MOUNT_OPTIONS:
            mount_options.append(option)
        elif option == "xattrs":
            words.append("--xattrs")
        elif option == "remount":
            raise UsageError(
                "a mounted home's options are not changed", hint=f"umount {rest[1]}, then mount it"
            )
        elif option == "ro":
            raise UsageError("a home cannot be mounted read-only", hint="leave ro out")
        elif (
            option and name not in _DEFAULTS and not name.startswith(("x-", "X-")) and ("-s", "") not in flags
        ):
            hint = f"there are {', '.join(f'{each}=' for each in VALUES)}, xattrs, {', '.join(MOUNT_OPTIONS)}"
            raise UsageError(f"there is no mount option {option!r}", hint=hint)
    if "--agent" not in words:
        raise UsageError("whose home it is is not said", hint="add the option agent=NAME")
    if mount_options:
        words += ["--mount-option", ",".join(mount_options)]
    return None if ("-f", "") in flags else words


def _unmounting(arguments: Sequence[str]) -> list[str] | None:
    flags, rest = _parse(arguments, "flnrvt:N:")
    if len(rest) != 1:
        raise UsageError("give a mountpoint", hint="umount /home/a")
    return ["umount", *(["--lazy"] if ("-l", "") in flags else []), rest[0]]


def _parse(arguments: Sequence[str], flags: str) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        return getopt.gnu_getopt(arguments, flags)
    except getopt.GetoptError as error:
        raise UsageError(str(error), hint="these are mount(8)'s own flags") from error
