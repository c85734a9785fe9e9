"""What the configuration binds to a home's regions from outside: webhooks that hear of their files, and
inboxes whose files are brought in. Only what was written: opens no file and knows no home.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agentfuse.attribution import creator
from agentfuse.regions import Creator, Region
from agentfuse.values import absolute_path, is_loopback, of_mount, shown, yes_no

KINDS = ("arrived", "modified", "moved", "deleted", "refused")
"""What an event can tell of a file."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_\[\]-]{0,127}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where events of some regions are sent to.

    ``name`` stands for it wherever people look, since the URL may be a secret; it also names how far
    the endpoint has got, so it stays when the URL changes. The secret is in exactly one of
    ``secret_file`` and ``secret_env``. ``ca_file``: None for the host's own authorities.
    """

    name: str
    url: str = field(repr=False)
    secret_file: Path | None
    secret_env: str | None
    ca_file: Path | None
    regions: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on this host."""
        return is_loopback(urlsplit(self.url).hostname or "")


@dataclass(frozen=True, slots=True)
class Inbox:
    """A directory outside of the home whose files are moved into a region, as a creator's.

    ``directory`` may hold ``{agent}`` and ``{execution}``; see :meth:`of`.
    """

    directory: Path
    region: str
    creator: Creator

    def of(self, *, agent: str, execution: str) -> Path:
        """The directory of one mount."""
        return of_mount(self.directory, agent=agent, execution=execution)


def _text(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{shown(value)} is not a text; write it in quotes")


def _name(value: object) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ValueError(f'{shown(value)} cannot name a webhook; use letters, digits, ".", "_", "-" and ":"')


def _variable(value: object) -> str:
    if isinstance(value, str) and _VARIABLE.fullmatch(value):
        return value
    raise ValueError(
        f"{'this' if isinstance(value, str) else shown(value)} is not the name of an environment variable; "
        "write the name, never the secret itself"
    )


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(dict.fromkeys(value))
    raise ValueError(f'{shown(value)} is not a list of names; write it like ["downloads"]')


def _kinds(value: object) -> tuple[str, ...]:
    for kind in (kinds := _texts(value)):
        if kind not in KINDS:
            raise ValueError(f"there is no kind {shown(kind)}; there are {', '.join(KINDS)}")
    return kinds


def _url(value: object) -> str:
    """The value is never shown: whatever it is, it may be a secret."""
    try:
        parts = urlsplit(_text(value))
        _ = parts.port
    except ValueError:
        raise ValueError('this is not a URL; write it like "https://example.com/agentfuse"') from None
    if not parts.hostname or parts.scheme not in {"http", "https"} or not str(value).isascii():
        raise ValueError('this is not a URL of HTTPS; write it like "https://example.com/agentfuse"')
    if "@" in parts.netloc:
        raise ValueError("it holds a user or a password; remove them: what is sent is signed instead")
    if parts.fragment:
        raise ValueError("it ends with a fragment, which is never sent; remove it from # on")
    return str(value)


WEBHOOK_KEYS: dict[str, Callable[[object], Any]] = {
    "name": _name,
    "url": _url,
    "secret_file": lambda value: absolute_path(value, "/etc/agentfuse/webhook.secret"),
    "secret_env": _variable,
    "ca_file": lambda value: absolute_path(value, "/etc/agentfuse/ca.pem"),
    "allow_http": yes_no,
    "regions": _texts,
    "kinds": _kinds,
}
INBOX_KEYS: dict[str, Callable[[object], Any]] = {
    "directory": lambda value: absolute_path(value, "/var/lib/browser/{execution}/downloads"),
    "region": _text,
    "creator": creator,
}


def webhook(values: Mapping[str, Any], regions: Mapping[str, Region], others: Sequence[Webhook]) -> Webhook:
    """One entry of ``[[webhooks]]``; ``others`` are those before it. Raises ``ValueError``."""
    if "url" not in values:
        raise ValueError('url is missing; add url = "https://example.com/agentfuse"')
    parts = urlsplit(values["url"])
    host = parts.hostname or ""
    if parts.scheme == "http" and not (is_loopback(host) or values.get("allow_http")):
        raise ValueError(
            "url: anybody on the way could read it; write https, or allow_http = true if nobody can"
        )
    if ("secret_file" in values) == ("secret_env" in values):
        raise ValueError("the secret is missing; add either secret_file or secret_env, not both")
    name = values.get("name", host if parts.port is None else f"{host}:{parts.port}")
    if any(other.name == name for other in others):
        raise ValueError(f'there is another webhook {shown(name)}; give this one a name = "..." of its own')
    notifying = tuple(region.name for region in regions.values() if region.notify)
    for region in values.get("regions", ()):
        if region not in notifying:
            raise ValueError(
                f"regions: {shown(region)} does not notify; those that do: {', '.join(notifying) or 'none'}"
            )
    return Webhook(
        name=name,
        url=values["url"],
        secret_file=values.get("secret_file"),
        secret_env=values.get("secret_env"),
        ca_file=values.get("ca_file"),
        regions=values.get("regions", notifying),
        kinds=values.get("kinds", KINDS),
    )


def inbox(values: Mapping[str, Any], regions: Mapping[str, Region], others: Sequence[Inbox]) -> Inbox:
    """One entry of ``[[inbox]]``; ``others`` are those before it. Raises ``ValueError``."""
    for key, example in (("directory", "/var/lib/browser/downloads"), ("region", "downloads")):
        if key not in values:
            raise ValueError(f'{key} is missing; add {key} = "{example}"')
    names = [region.name for region in regions.values() if not region.is_loose]
    if values["region"] not in names:
        raise ValueError(f"region: there is no {shown(values['region'])}; there are {', '.join(names)}")
    directory: Path = values["directory"]
    for other in others:
        if directory.is_relative_to(other.directory) or other.directory.is_relative_to(directory):
            raise ValueError(
                f"directory: {shown(str(directory))} and {shown(str(other.directory))} are one in the other; "
                "choose directories that are apart"
            )
    return Inbox(directory, values["region"], values.get("creator", Creator.ENVIRONMENT))
