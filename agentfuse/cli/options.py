"""Options that several verbs share, and the Config that they add up to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from agentfuse.config import Config, load_config

# Texts, not Paths: typer would stat a Path, and a mount whose daemon hangs answers nobody.
Mountpoint = Annotated[str, typer.Argument(metavar="MOUNTPOINT", help="Where the home is mounted.")]
NewMountpoint = Annotated[
    str, typer.Argument(metavar="MOUNTPOINT", help="Where to mount the home: a directory.")
]
Agent = Annotated[str, typer.Option("--agent", help="The agent whose home it is.")]
Execution = Annotated[
    str | None, typer.Option("--execution", help="The execution's id; a new one if left out.")
]
Store = Annotated[
    str | None, typer.Option("--store", metavar="URL", help="The object store, like file:///path.")
]
State = Annotated[str | None, typer.Option("--state", metavar="DIR", help="Where this host keeps its homes.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="The configuration, in TOML.")
]
Owner = Annotated[
    str | None, typer.Option("--owner", metavar="UID:GID", help="Whom the files of the home belong to.")
]
MountOptions = Annotated[
    list[str] | None,
    typer.Option("--mount-option", metavar="OPT", help="dev, suid or noexec; may be repeated, or dev,suid."),
]
Xattrs = Annotated[bool | None, typer.Option("--xattrs/--no-xattrs", help="Extended attributes.")]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="S", help="For how many seconds to try to reach the store.", min=0),
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


def configure(
    *,
    config: str | None = None,
    store: str | None = None,
    state: str | None = None,
    owner: str | None = None,
    mount_option: list[str] | None = None,
    xattrs: bool | None = None,
) -> Config:
    """The Config of this process: file, environment, these flags. Raises ConfigError."""
    return load_config(
        None if config is None else Path(config),
        environ=os.environ,
        overrides={
            "store": store,
            "state": os.path.abspath(state) if state else state,
            "owner": owner,
            "mount_options": mount_option or None,
            "xattrs": xattrs,
        },
    )
