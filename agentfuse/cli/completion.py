"""``agentfuse completion``: what a shell needs to complete verbs and options, made from the verbs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from enum import Enum
from typing import Annotated

import typer

from agentfuse.cli.output import say


class Shell(Enum):
    """The shells that there is a completion for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(completion)


def completion(shell: Annotated[Shell, typer.Argument(help="The shell.")]) -> None:
    """Print a completion for a shell.

    In bash and zsh: source <(agentfuse completion bash). In fish: agentfuse completion fish | source.
    """
    verbs = dict(_verbs())
    if shell is Shell.FISH:
        say(_fish(verbs))
    else:
        prefix = "autoload -U +X bashcompinit && bashcompinit\n" if shell is Shell.ZSH else ""
        say(prefix + _bash(verbs))


def _verbs() -> Iterator[tuple[str, tuple[str, list[str]]]]:
    """Each verb with the first sentence of its help, and its options."""
    from agentfuse.cli import VERBS, application  # noqa: PLC0415  it names this module

    for name, command in sorted(application(dict.fromkeys(VERBS.values())).commands.items()):
        options = [word for each in command.params for word in (*each.opts, *each.secondary_opts)]
        summary = (command.help or "").strip().split("\n\n")[0].replace("\n", " ")
        yield name, (summary, sorted({*(word for word in options if word.startswith("-")), "--help"}))


def _bash(verbs: dict[str, tuple[str, list[str]]]) -> str:
    cases = "\n".join(
        f"        {name}) words='{' '.join(options)}' ;;" for name, (_, options) in verbs.items()
    )
    return f"""_agentfuse() {{
    local words='' current=${{COMP_WORDS[COMP_CWORD]}}
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        words='{" ".join(verbs)} --help --version'
    elif [[ $current == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    [[ -n $words ]] && COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _agentfuse agentfuse"""


def _fish(verbs: dict[str, tuple[str, list[str]]]) -> str:
    lines = []
    for name, (summary, options) in verbs.items():
        lines.append(f"complete -c agentfuse -n __fish_use_subcommand -f -a {name} -d {shlex.quote(summary)}")
        for option in options:
            kind = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            lines.append(f"complete -c agentfuse -n '__fish_seen_subcommand_from {name}' {kind}")
    return "\n".join(lines)
