"""Single values of the configuration, read from what TOML has; a ``ValueError`` names the fix."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import NamedTuple


def shown(value: object) -> str:
    """A value of somebody else's, quoted, without control characters and never long."""
    text = ascii(value) if not isinstance(value, str) else '"' + ascii(value)[1:-1] + '"'
    return text if len(text) <= 60 else text[:57] + "..."


def yes_no(value: object) -> bool:
    """A boolean, and nothing that looks like one."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{shown(value)} is neither true nor false; write true or false, without quotes")


def absolute_path(value: object, example: str) -> Path:
    """An absolute path without ``..``."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f'{shown(value)} is not an absolute path; write it like "{example}"')
    return Path(os.path.normpath(value))


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(value: object) -> Address:
    """An address to listen at, and a port; port 0 is any that is free."""
    match = re.fullmatch(r"\[?([^\[\]]+?)\]?:(\d{1,5})", value) if isinstance(value, str) else None
    if match is None or int(match[2]) > 65535:
        raise ValueError(f'{shown(value)} is not an address; write it like "127.0.0.1:9464"')
    return Address(match[1], int(match[2]))


def local_address(value: object) -> Address:
    """As :func:`address`, of this host only."""
    found = address(value)
    if not is_loopback(found.host):
        raise ValueError(
            f"{shown(value)} could be reached from elsewhere, and anybody may ask there; "
            'write "127.0.0.1:9464" and have a proxy in front of it'
        )
    return found


def is_loopback(host: str) -> bool:
    """Whether it is this host's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def textfile(value: object) -> Path:
    """A file for node_exporter, one for each mount."""
    example = "/var/lib/prometheus/node-exporter/agentfuse-{execution}.prom"
    path = absolute_path(value, example)
    if path.suffix != ".prom":
        raise ValueError(f'{shown(value)} is not read by node_exporter; end it with ".prom"')
    if "{execution}" not in path.name:
        raise ValueError(f'{shown(value)} would be every mount\'s; write it like "{example}"')
    return path


def of_mount(pattern: Path, *, agent: str, execution: str) -> Path:
    """The path of one mount, of a pattern with ``{agent}`` and ``{execution}``."""
    return Path(str(pattern).replace("{agent}", agent).replace("{execution}", execution))
