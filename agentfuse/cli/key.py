"""``agentfuse key``: keys for the gateway."""

from __future__ import annotations

import json
import secrets
import uuid
from typing import Annotated

import typer

from agentfuse.admission import FAMILIES, KEY_KEYS, sha256_of
from agentfuse.cli.output import note, say
from agentfuse.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    key = typer.Typer(help="Keys for the gateway.", no_args_is_help=True, rich_markup_mode=None)
    key.callback()(_key)
    key.command()(new)
    app.add_typer(key, name="key")


def _key() -> None:
    """Keys for the gateway."""


def new(
    *,
    organization: Annotated[
        str | None, typer.Option("--organization", metavar="UUID", help="A new one if left out.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Whose file store it is for; the organization if left out.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope", help="asteroid, tenant-files, shinzo, or one of them with :read; repeatable."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What to call it.")] = None,
) -> None:
    """Print a new key, and the lines of the configuration that let it in. Nothing keeps the key itself."""
    key = f"af_{secrets.token_urlsafe(32)}"
    given: dict[str, object] = {
        "name": name,
        "organization": organization or str(uuid.uuid4()),
        "tenant": tenant,
        "scopes": scope or list(FAMILIES),
    }
    entry: dict[str, object] = {"sha256": sha256_of(key)}
    for field, value in given.items():
        if value is None:
            continue
        try:
            KEY_KEYS[field](value)
        except ValueError as error:
            raise UsageError(f"--{field.removesuffix('s')}: {error}") from error
        entry[field] = value
    note("The key, which is shown only now:")
    say(key)
    note("For the configuration of every gateway (/etc/agentfuse/config.toml):")
    say("\n[[keys]]")
    for field, value in entry.items():
        say(f"{field} = {json.dumps(value, ensure_ascii=False)}")
