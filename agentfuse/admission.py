"""Who may use the gateway, and how much: keys, and the tenants' quotas. Only what was written: a key is
known by its SHA-256, so that the configuration gives none away.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit
from uuid import NAMESPACE_OID, UUID, uuid5

from agentfuse.regions import MiB
from agentfuse.values import Address, shown

FAMILIES = ("asteroid", "tenant-files", "shinzo")
"""The APIs that a key may be for; with ``:read`` for what changes nothing."""

SCOPES = tuple(f"{family}{what}" for family in FAMILIES for what in ("", ":read"))

MAX_FILES = 1_000_000
"""No tree may hold more: a snapshot cannot list them."""

OnHostLost = Literal["fail", "wait"]

Starter = Literal["child", "systemd"]
STARTERS: tuple[Starter, ...] = get_args(Starter)

DEFAULT_LISTEN = Address("127.0.0.1", 8080)

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
PLACES = ("{home}", "{agent}", "{execution}")
"""What stands for something in a launcher."""

_PLACE = re.compile(r"\{[a-z_]+\}")
_UNIT = re.compile(r"[A-Za-z0-9:_.-]{1,200}@\.service")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MIN_KEY = 8


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key. ``organization`` is a UUID in lower case; ``scopes`` are some of ``SCOPES``."""

    sha256: str
    organization: str
    tenant: str
    scopes: tuple[str, ...] = FAMILIES
    name: str = ""

    @property
    def id(self) -> str:
        """What stands for the key wherever it must be named: a UUID that gives nothing away."""
        return str(uuid5(NAMESPACE_OID, f"agentfuse key {self.sha256}"))


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tree may hold; ``files`` counts directories, too."""

    bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the gateway needs to know besides the store and the state directory.

    ``tenant_quota`` is that of a tenant that ``tenants`` does not name. ``blob_secret_file`` holds what
    links are signed with, the same on all gateways; None: each host makes its own.
    ``grace_s``: how long requests may go on after SIGTERM. ``max_request_bytes``: the longest body.
    ``certificate`` and ``private_key``: PEM files to serve HTTPS with; None: plain HTTP.
    ``public_url``: how clients reach it, without a slash at the end; empty: as they say themselves.
    ``presign``: links may be URLs of the object store's own, where it has some.

    ``advertise``: the URL at which other hosts reach this one, which makes it one of a cluster, whose
    members know each other by what ``cluster_secret_file`` holds. A host that was not heard of for
    ``lease_s`` is taken for dead, and ``on_host_lost`` says what becomes of its executions. ``executes``:
    whether executions begin here.
    ``mounts``: the directory of the mountpoints of executions; None: beside the state directory.
    ``search_s``: how long one search for contents may take.
    ``max_restarts``: how often a daemon that died is followed by another. ``max_executions``: how many run
    on this host at a time; None: any number. ``launcher``: the command that is run in a home, with
    ``{home}``, ``{agent}`` and ``{execution}`` in it; ``launcher_grace_s``: how long it may take to end.
    ``purge_after_s``: how long files of executions can be had after their end; None: for ever.
    ``starter``: who starts daemons, this process or systemd with the template ``mount_unit``.
    """

    listen: Address = DEFAULT_LISTEN
    keys: tuple[ApiKey, ...] = ()
    tenant_quota: Quota = Quota(5120 * MiB, 100_000)
    tenants: Mapping[str, Quota] = field(default_factory=dict)
    blob_secret_file: Path | None = None
    grace_s: float = 30.0
    max_request_bytes: int = 1024 * MiB
    public_url: str = ""
    presign: bool = True
    certificate: Path | None = None
    private_key: Path | None = None
    mounts: Path | None = None
    max_restarts: int = 3
    search_s: float = 10.0
    max_executions: int | None = None
    launcher: tuple[str, ...] = ()
    launcher_grace_s: float = 10.0
    purge_after_s: float | None = None
    starter: Starter = "child"
    mount_unit: str = "agentfuse-execution@.service"

    @property
    def scheme(self) -> str:
        """``http`` or ``https``."""
        return "https" if self.certificate else "http"

    advertise: str | None = None
    cluster_secret_file: Path | None = None
    lease_s: float = 30.0
    on_host_lost: OnHostLost = "fail"
    executes: bool = True

    def quota_of(self, tenant: str) -> Quota:
        """What a tenant's store may hold."""
        return self.tenants.get(tenant, self.tenant_quota)


def check(settings: Gateway) -> Gateway:
    """What only makes sense together. Raises ``ValueError``."""
    if bool(settings.certificate) != bool(settings.private_key):
        raise ValueError("certificate and private_key belong together; set both, or neither for plain HTTP")
    if settings.advertise and settings.cluster_secret_file is None:
        raise ValueError(
            "advertise makes it one of many hosts, which must share a secret; make one with "
            "openssl rand -hex 32, give every host the same file, and add "
            'cluster_secret_file = "/etc/agentfuse/cluster.secret"'
        )
    if settings.cluster_secret_file and not settings.advertise:
        raise ValueError(
            "with cluster_secret_file it is one of many hosts, but the others cannot reach it; add "
            'advertise = "http://10.0.0.5:8080", its address for them, or remove cluster_secret_file'
        )
    if not settings.executes and not settings.advertise:
        raise ValueError("executes = false is for one of many hosts; remove it, or add advertise")
    return settings


def on_host_lost(value: object) -> OnHostLost:
    """What becomes of a dead host's executions."""
    if value in ("fail", "wait"):
        return "wait" if value == "wait" else "fail"
    raise ValueError(f'{shown(value)} is neither "fail" nor "wait"')


def sha256_of(key: str) -> str:
    """What the configuration says of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def public_url(value: object) -> str:
    """How clients reach the gateway: a URL, perhaps with a path, without a slash at the end."""
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() else ""
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or parts.query or parts.fragment or parts.username or " " in text:
        raise ValueError(f'{shown(value)} is not a base URL; write it like "https://files.example.com"')
    return text.rstrip("/")


def advertise(value: object) -> str:
    """How other hosts reach this one: ``http://HOST:PORT``, or ``https``, and nothing behind it."""
    try:
        url = public_url(value)
    except ValueError:
        url = ""
    if not url or urlsplit(url).path:
        raise ValueError(f'{shown(value)} is not such a URL; write it like "http://10.0.0.5:8080"')
    return url


def launcher(value: object) -> tuple[str, ...]:
    """A command and its arguments, in which only what there is stands for something."""
    words = value if isinstance(value, list) else []
    if not words or not all(isinstance(word, str) and word and "\0" not in word for word in words):
        raise ValueError(f'{shown(value)} is no command; write it like ["bwrap", "--bind", "{{home}}", "/x"]')
    for place in _PLACE.findall(" ".join(words)):
        if place not in PLACES:
            raise ValueError(f"{place} stands for nothing; there are {', '.join(PLACES)}")
    return tuple(words)


def starter(value: object) -> Starter:
    """Who starts daemons."""
    for each in STARTERS:
        if value == each:
            return each
    raise ValueError(f"{shown(value)} is not one of {', '.join(STARTERS)}")


def mount_unit(value: object) -> str:
    """The name of a template unit of systemd."""
    if isinstance(value, str) and _UNIT.fullmatch(value):
        return value
    raise ValueError(f'{shown(value)} is no template unit; write it like "agentfuse-execution@.service"')


def _sha256(value: object) -> str:
    if isinstance(value, str) and _SHA256.fullmatch(value):
        return value.lower()
    raise ValueError(
        "this is not a SHA-256 in hexadecimal; agentfuse key new prints one, never write the key itself"
    )


def _organization(value: object) -> str:
    try:
        return str(UUID(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError(f"{shown(value)} is not a UUID; agentfuse key new makes one") from None


def tenant(value: object) -> str:
    """The id of a tenant."""
    if isinstance(value, str) and _TENANT.fullmatch(value):
        return value
    raise ValueError(
        f"{shown(value)} cannot be a tenant; use 1 to 128 letters, digits, dots, underscores or dashes, "
        "the first a letter or digit"
    )


def _scopes(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'{shown(value)} is not a list of scopes; write it like ["tenant-files"]')
    for scope in value:
        if scope not in SCOPES:
            raise ValueError(f"there is no scope {shown(scope)}; there are {', '.join(SCOPES)}")
    return tuple(dict.fromkeys(value))


def _name(value: object) -> str:
    if isinstance(value, str) and value.isprintable() and len(value) <= 128:
        return value
    raise ValueError(f"{shown(value)} is no name; write up to 128 printable characters")


KEY_KEYS: dict[str, Callable[[object], Any]] = {
    "sha256": _sha256,
    "organization": _organization,
    "tenant": tenant,
    "scopes": _scopes,
    "name": _name,
}


def api_key(values: Mapping[str, Any], _: object, others: Sequence[ApiKey]) -> ApiKey:
    """One entry of ``[[keys]]``; ``others`` are those before it. Raises ``ValueError``."""
    for name in ("sha256", "organization"):
        if name not in values:
            raise ValueError(f"{name} is missing; agentfuse key new prints a whole entry")
    if any(other.sha256 == values["sha256"] for other in others):
        raise ValueError("this key is there twice; remove one of the entries")
    return ApiKey(
        values["sha256"],
        values["organization"],
        values.get("tenant", values["organization"]),
        values.get("scopes", FAMILIES),
        values.get("name", ""),
    )


def dev_key(text: str) -> ApiKey:
    """The key of ``KEY:ORGANIZATION``, good for everything. Raises ``ValueError``."""
    key, colon, organization = text.rpartition(":")
    if not colon or len(key) < _MIN_KEY:
        raise ValueError(
            f"this is not a key of {_MIN_KEY} characters or more, a colon and an organization's UUID"
        )
    owner = _organization(organization)
    return ApiKey(sha256_of(key), owner, owner, FAMILIES, "AGENTFUSE_DEV_KEY")
