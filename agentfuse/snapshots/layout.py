"""Where an owner's objects and snapshots lie in an object store: the names, and nothing behind them.

An *owner* is an agent, written as its id, or a tenant, written ``tenants/<tenant>``: an id has no slash.
What says ``agent`` here and in what builds on it takes any owner.
"""

from __future__ import annotations

import re

from agentfuse.errors import IntegrityError, UsageError

DIGITS = 20
SUFFIX = ".json.gz"
_SMALL = re.compile(rf"(\d{{{DIGITS}}})\.json")
_NUMBERED = re.compile(rf"(\d{{{DIGITS}}})(.*)", re.DOTALL)
_TENANTS = "tenants"
TENANTS_PREFIX = f"{_TENANTS}/"
"""What all keys of tenants start with."""

TENANT_FILES = "files"
"""The region of a tenant: its file store."""

_OBJECT = re.compile(r"(?:agents|tenants)/[^/]+/objects/[0-9a-f]{2}/[0-9a-f]{64}")
_KEPT = re.compile(r"agents/[^/]+/(executions/[^/]+/[^/]+)/snapshots/[^/]+", re.DOTALL)
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f/]")


def check_id(kind: str, value: str) -> str:
    """Return an agent's, execution's or region's id, or raise ``UsageError`` if it cannot be part of a key.

    An id is one path component of 1 to 200 bytes of UTF-8, without control characters and not
    starting with a dot.
    """
    try:
        size_bytes = len(value.encode())
    except UnicodeEncodeError:
        size_bytes = 0
    if not 0 < size_bytes <= 200 or value.startswith(".") or _FORBIDDEN.search(value):
        raise UsageError(
            f"{kind} {value!r} is no valid id",
            hint="use 1 to 200 bytes without '/' or control characters, not starting with a dot",
        )
    return value


def tenant_owner(tenant: str) -> str:
    """The owner that a tenant is. Raises ``UsageError`` for an id that cannot be part of a key."""
    return f"{_TENANTS}/{check_id('tenant', tenant)}"


def check_owner(owner: str) -> str:
    """Return an owner, or raise ``UsageError`` for one whose id cannot be part of a key."""
    kind, slash, name = owner.partition("/")
    if slash and kind == _TENANTS:
        return tenant_owner(name)
    return check_id("agent", owner)


def object_key(agent: str, sha256: str) -> str:
    """Key of an object; ``sha256`` is the lower-case hexadecimal hash of the object's bytes."""
    return f"{objects_prefix(agent)}{sha256[:2]}/{sha256}"


def is_object_key(key: str) -> bool:
    """Whether it is the key of an object, which never changes."""
    return _OBJECT.fullmatch(key) is not None


def agent_prefix(agent: str) -> str:
    """What every key of an agent starts with."""
    return f"{agent}/" if agent.startswith(f"{_TENANTS}/") else f"agents/{agent}/"


def objects_prefix(agent: str) -> str:
    """What the keys of an agent's objects start with."""
    return f"{agent_prefix(agent)}objects/"


def execution_region(execution: str, region: str) -> str:
    """What stands for the region in the keys of a region that belongs to one execution of the agent."""
    return f"executions/{check_id('execution', execution)}/{check_id('region', region)}"


def executions_prefix(agent: str) -> str:
    """What the keys of all regions that executions of an agent kept start with."""
    return f"{agent_prefix(agent)}executions/"


def execution_prefix(agent: str, execution: str) -> str:
    """What the keys of all that one execution of an agent kept start with."""
    return f"{executions_prefix(agent)}{check_id('execution', execution)}/"


def snapshots_region(key: str) -> str | None:
    """The place of the region that a snapshot's key is of, if it is one that an execution kept."""
    match = _KEPT.fullmatch(key)
    return match[1] if match else None


def check_region(region: str) -> str:
    """Return a region's place below its agent: a name, or what :func:`execution_region` gives."""
    for part in region.split("/"):
        check_id("region", part)
    return region


def snapshots_prefix(agent: str, region: str) -> str:
    """What the keys of a region's snapshots start with; ``region`` as :func:`check_region` takes it."""
    return f"{agent_prefix(agent)}{region}/snapshots/"


def snapshot_key(agent: str, region: str, number: int) -> str:
    """Key of one snapshot; keys sort as their numbers do."""
    return f"{snapshots_prefix(agent, region)}{number:0{DIGITS}d}{SUFFIX}"


def snapshot_number(key: str) -> int | None:
    """The number in a snapshot's key; None for a key that is no snapshot's.

    Raises ``IntegrityError`` for a numbered document in a form that this version does not know:
    overlooking it would be taking an older snapshot for the newest.
    """
    match = _NUMBERED.fullmatch(key.rpartition("/")[2])
    if match is None:
        return None
    if match[2] != SUFFIX:
        raise IntegrityError(
            f"snapshot {key}: not in a form that this version of agentfuse knows",
            hint="a newer agentfuse wrote it; install that one",
        )
    return int(match[1])


def pins_prefix(agent: str, region: str) -> str:
    """What the keys of a region's pins start with."""
    return f"{agent_prefix(agent)}{region}/pins/"


def pin_key(agent: str, region: str, number: int) -> str:
    """Key of the pin of one snapshot."""
    return f"{pins_prefix(agent, region)}{number:0{DIGITS}d}.json"


def pin_number(key: str) -> int | None:
    """The number of the snapshot that a pin's key names; None for a key that is no pin's."""
    match = _SMALL.fullmatch(key.rpartition("/")[2])
    return int(match[1]) if match else None


def collections_prefix(agent: str, region: str) -> str:
    """What the keys of the records of a region's collections start with."""
    return f"{agent_prefix(agent)}{region}/collections/"


def collection_key(agent: str, region: str, number: int) -> str:
    """Key of the record of one collection; they count from 1."""
    return f"{collections_prefix(agent, region)}{number:0{DIGITS}d}.json"


def collection_number(key: str) -> int | None:
    """The number in a collection's key; None for another key."""
    return pin_number(key)
