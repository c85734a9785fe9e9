"""Single values of the configuration, read from what TOML has; a ``ValueError`` names the fix."""

from __future__ import annotations

import os
from pathlib import Path


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
