"""``agentfuse prompt``: what to tell a model of its home, for its system prompt."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from agentfuse.cli import options
from agentfuse.cli.output import say
from agentfuse.config import Config, format_size

_TOLD = ("workspace", "shared", "downloads", "uploads")


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(prompt)


def prompt(
    *,
    home: Annotated[
        str, typer.Option("--home", metavar="PATH", help="Where the agent has its home.")
    ] = "/home/agent",
    config: options.ConfigFile = None,
) -> None:
    """Print a text about the home for an agent's system prompt.

    What each directory is for, how much fits in, what to do when it is full, and how to see files arrive.
    Quotas and regions are those of the configuration.
    """
    say(text(options.configure(config=config), home).rstrip("\n"))


def text(settings: Config, home: str) -> str:
    """The text, in Markdown."""
    regions = {each.name: each for each in settings.regions}
    sizes = {name: f" At most {format_size(each.bytes_quota)}." for name, each in regions.items()}
    others = [
        f"- `{each.name}/` is for this run, too.{sizes[each.name]}\n"
        for each in settings.regions
        if each.name not in _TOLD and not each.is_loose and not each.root_only
    ]
    loose = next((sizes[each.name] for each in settings.regions if each.is_loose), "")
    template = resources.files("agentfuse").joinpath("prompt.md").read_text(encoding="utf-8")
    return template.format(
        home=home, others="".join(others), loose=loose, **{name: sizes[name] for name in _TOLD}
    )
