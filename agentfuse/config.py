"""One frozen Config from a TOML file, the environment and flags, parsed once.

Later sources win: file, then environment, then flags. Every mistake in all of them is found before
anything is reported, each with its line where there is one, the key's full name, what is wrong and
the fix. Knows the syntax of configuration; opens no store and creates no directory.
"""

from __future__ import annotations

import difflib
import grp
import os
import pwd
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from agentfuse import admission, attribution, bindings
from agentfuse.errors import ConfigError, UsageError
from agentfuse.logs import LOG_FORMATS, LogFormat
from agentfuse.regions import DEFAULT_REGIONS, LOOSE, Region, Scope, SyncPolicy
from agentfuse.values import Address, absolute_path, address, local_address, shown, textfile, yes_no

DEFAULT_PATH = Path("/etc/agentfuse/config.toml")
MOUNT_OPTIONS = ("dev", "suid", "noexec")
"""Mount options that change something: ``nodev,nosuid`` are our default, FUSE keeps no atime of its own."""

_T = TypeVar("_T")

_MAX_FILE_BYTES = 1024 * 1024
_MAX_QUOTA = 2**60
_MAX_SMALL = 100_000
_MIN_INTERVAL_S = 0.1

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REGION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)", re.ASCII)
_SIZE_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("kmgtpe")
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*(ms|s|m|h|d)", re.ASCII)
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Config:
    """What a mount needs to know.

    ``store`` is the object store's URL, ``state`` an absolute path. ``owner`` is the agent's uid and
    gid. ``keep_ended_s`` says how long an ended home stays on this host. ``regions`` holds the
    default ones, adjusted, then the additional ones.

    ``sync_delay_s``: a file closed after writing is in the store so much later at most, and in a snapshot
    ``checkpoint_interval_s`` later. ``flush_timeout_s``: how long an unmount tries to reach the store
    before it leaves the home for later. ``cache_bytes``: what contents of the store may take on this
    host's disk, 0 for no cache.

    ``metrics``: where Prometheus may ask, ``metrics_file``: a file for node_exporter, with ``{execution}`` in
    its name, written every ``metrics_interval_s``; None for neither. ``log_format``: see ``agentfuse.logs``.
    ``mount_helper``: the socket of agentfuse-mount-helper, which mounts for daemons without privileges.
    """

    store: str
    state: Path
    owner: tuple[int, int]
    regions: tuple[Region, ...]
    xattrs: bool
    keep_ended_s: float
    mount_options: tuple[str, ...]
    sync_delay_s: float
    checkpoint_interval_s: float
    flush_timeout_s: float
    cache_bytes: int
    creators: tuple[attribution.CreatorRule, ...] = ()
    webhooks: tuple[bindings.Webhook, ...] = ()
    inboxes: tuple[bindings.Inbox, ...] = ()
    metrics: Address | None = None
    metrics_file: Path | None = None
    metrics_interval_s: float = 15.0
    log_format: LogFormat = "auto"
    mount_helper: Path | None = None
    gateway: admission.Gateway = field(default_factory=admission.Gateway)


def load_config(path: Path | None, *, environ: Mapping[str, str], overrides: Mapping[str, object]) -> Config:
    """Read the file (``path``, else AGENTFUSE_CONFIG, else the host's if any), the environment and flags.

    ``overrides`` has the file's top keys (``mount_options`` a list); those with value None are not set.
    Raises ConfigError with every mistake found.
    """
    reading = _Reading()
    reading.file(path, environ)
    for key in ("store", "state", "log_format", "mount_helper"):
        variable = f"AGENTFUSE_{key.upper()}"
        if environ.get(variable):
            reading.top(key, environ[variable], variable)
    if environ.get("AGENTFUSE_DEV_KEY"):
        reading.dev_key(environ["AGENTFUSE_DEV_KEY"])
    if environ.get("AGENTFUSE_STARTER"):
        reading.starter(environ["AGENTFUSE_STARTER"])
    for key, value in overrides.items():
        if key == "listen" and value is not None:
            reading.listen(value)
        elif value is not None:
            reading.top(
                key, value, "--" + key.replace("_", "-").removesuffix("s" if key == "mount_options" else "")
            )
    return reading.finish(environ)


def parse_agent_id(text: str) -> str:
    """The text itself if it may name an agent; otherwise UsageError that states the rule."""
    return _parse_id("agent", text)


def parse_execution_id(text: str) -> str:
    """The text itself if it may name an execution; otherwise UsageError that states the rule."""
    return _parse_id("execution", text)


def parse_size(value: object) -> int:
    """Bytes of ``"50MiB"``, ``"500MB"``, ``"1.5GiB"`` or a plain integer; ValueError that names the fix."""
    fix = 'write it like "50MiB", "500MB", "1.5GiB" or 52428800'
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{shown(value)} is not a size; {fix}")  # noqa: TRY004 -- the file's mistake, not ours
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        unit = _SIZE_UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(f"{shown(value)} is not a size; {fix}")
        value = int(Decimal(match[1]) * unit)
    if not 0 <= value <= _MAX_QUOTA:
        raise ValueError(f"{shown(value)} is out of range; it must be between 0 and 1024PiB")
    return value


def parse_duration(value: object) -> float:
    """Seconds of ``"24h"``, ``"5s"``, ``"1.5d"``, ``"250ms"``; ValueError that names the fix."""
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{shown(value)} is not a duration; write it like "24h", "30m" or "5s"')
    return float(match[1]) * _DURATION_UNITS[match[2]]


def parse_interval(value: object) -> float:
    """As :func:`parse_duration`, 100 ms at least: below it the store would hear of nothing else."""
    seconds = parse_duration(value)
    if seconds < _MIN_INTERVAL_S:
        raise ValueError(f'{shown(value)} is too short; write "{_MIN_INTERVAL_S * 1000:g}ms" or more')
    return seconds


def format_size(size_bytes: int) -> str:
    """Bytes for people: ``17 B``, ``1.5 MiB``; three significant digits or more, never ``1024 KiB``."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    amount = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        amount /= 1024
        if amount < 1023.5 or unit == "EiB":
            break
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    number = f"{amount:.{digits}f}"
    return f"{number.rstrip('0').rstrip('.') if digits else number} {unit}"


def count(number: int, noun: str) -> str:
    """How many for people: ``1 file``, ``2 files``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _parse_id(kind: str, text: str) -> str:
    if _ID.fullmatch(text):
        return text
    raise UsageError(
        f"{shown(text)} cannot be an {kind} id",
        hint="use 1 to 128 letters, digits, dots, underscores or dashes, the first a letter or digit",
    )


def _store(value: object) -> str:
    if isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://.", value):
        return value
    raise ValueError(f'{shown(value)} is not a store URL; write it like "file:///var/lib/agentfuse/store"')


def _state(value: object) -> Path:
    return absolute_path(value, "/var/lib/agentfuse")


def _owner(value: object) -> tuple[int, int]:
    user, colon, group = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (user and colon and group):
        raise ValueError(f'{shown(value)} is not an owner; write it like "1000:1000" or "agent:agent"')
    try:
        uid = int(user) if user.isdecimal() and user.isascii() else pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        raise ValueError(f"no user {shown(user)} on this host; create it or write its number") from None
    try:
        gid = int(group) if group.isdecimal() and group.isascii() else grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise ValueError(f"no group {shown(group)} on this host; create it or write its number") from None
    if max(uid, gid) > attribution.MAX_ID:
        raise ValueError(f"{shown(value)} is out of range; ids end at {attribution.MAX_ID}")
    if os.geteuid() != 0 and (uid, gid) != (os.geteuid(), os.getegid()):
        raise ValueError(
            f"only root can give a home to {uid}:{gid}; run as root or leave the key out "
            f"(the home is then yours, {os.geteuid()}:{os.getegid()})"
        )
    for name, number in (("uid", uid), ("gid", gid)):
        if not _is_mapped(name, number):
            raise ValueError(
                f"{name} {number} is not in this user namespace, so no file can belong to it; "
                "leave the key out, or map it into the namespace"
            )
    return uid, gid


def _is_mapped(kind: str, number: int) -> bool:
    try:
        lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
    except OSError:  # who needs /proc says so better
        return True
    ranges = [[int(word) for word in line.split()] for line in lines]
    return any(first <= number < first + count for first, _, count in ranges)


def _mount_options(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f'{shown(value)} is not a list of options; write it like ["dev", "suid"]')
    options = [part.strip() for item in value for part in item.split(",")]
    for option in options:
        if option not in MOUNT_OPTIONS:
            raise ValueError(
                f"option {shown(option)} is not supported; allowed are {', '.join(MOUNT_OPTIONS)}"
            )
        if os.geteuid() != 0 and option in {"dev", "suid"}:
            raise ValueError(f"option {shown(option)} is for root only; leave it out or run as root")
    return tuple(dict.fromkeys(options))


def _file_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_QUOTA:
        raise ValueError(f"{shown(value)} is not a number of files; write a plain number like 50000")
    return value


def _small_number(value: object, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_SMALL:
        raise ValueError(f"{shown(value)} is no number from {least} to {_MAX_SMALL}; write it without quotes")
    return value


def _tenant_files(value: object) -> int:
    if _file_count(value) > admission.MAX_FILES:
        raise ValueError(f"{shown(value)} is too many; write {admission.MAX_FILES} or less")
    return _file_count(value)


def _mode(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{3,4}", value):
        return int(value.replace("o", ""), 8)
    raise ValueError(f'{shown(value)} is not a mode; write it in octal, as text, like "0755"')


def _scope(value: object) -> Scope:
    if value == "execution":
        return Scope.EXECUTION
    raise ValueError(
        f'{shown(value)} is not a scope that a region of yours can have; write "execution" '
        "(what must survive an execution belongs into shared)"
    )


def _sync(value: object) -> SyncPolicy:
    try:
        return SyncPolicy(value)  # type: ignore[arg-type]  # that is what is being found out
    except ValueError:
        raise ValueError(f'{shown(value)} is not one of "never", "at_end" and "continuous"') from None


def _lease(value: object) -> float:
    seconds = parse_duration(value)
    if not 1 <= seconds <= 3600:
        raise ValueError(f'{shown(value)} is out of range; write "1s" to "1h"')
    return seconds


def _log_format(value: object) -> LogFormat:
    for form in LOG_FORMATS:
        if value == form:
            return form
    raise ValueError(f"{shown(value)} is not a format of logs; write one of {', '.join(LOG_FORMATS)}")


def _mount_helper(value: object) -> Path:
    return absolute_path(value, "/run/agentfuse/mount.sock")


_TOP: dict[str, Callable[[object], Any]] = {
    "store": _store,
    "state": _state,
    "owner": _owner,
    "xattrs": yes_no,
    "keep_ended": parse_duration,
    "mount_options": _mount_options,
    "sync_delay": parse_interval,
    "checkpoint_interval": parse_interval,
    "flush_timeout": parse_duration,
    "cache_size": parse_size,
    "metrics": local_address,
    "metrics_file": textfile,
    "metrics_interval": parse_interval,
    "log_format": _log_format,
    "mount_helper": _mount_helper,
}
# A region's keys: how to read each, and the field of Region that it sets.
_REGION: dict[str, tuple[Callable[[object], Any], str]] = {
    "bytes": (parse_size, "bytes_quota"),
    "files": (_file_count, "files_quota"),
    "mode": (_mode, "mode"),
    "notify": (yes_no, "notify"),
    "scope": (_scope, "scope"),
    "sync": (_sync, "sync"),
    "creator": (attribution.creator, "creator"),
}
_GATEWAY: dict[str, tuple[Callable[[object], Any], str]] = {
    "listen": (address, "listen"),
    "blob_secret_file": (
        lambda value: absolute_path(value, "/etc/agentfuse/blob.secret"),
        "blob_secret_file",
    ),
    "certificate": (lambda value: absolute_path(value, "/etc/agentfuse/cert.pem"), "certificate"),
    "private_key": (lambda value: absolute_path(value, "/etc/agentfuse/key.pem"), "private_key"),
    "grace": (parse_duration, "grace_s"),
    "max_request": (parse_size, "max_request_bytes"),
    "public_url": (admission.public_url, "public_url"),
    "presign": (yes_no, "presign"),
    "advertise": (admission.advertise, "advertise"),
    "cluster_secret_file": (
        lambda value: absolute_path(value, "/etc/agentfuse/cluster.secret"),
        "cluster_secret_file",
    ),
    "lease": (_lease, "lease_s"),
    "on_host_lost": (admission.on_host_lost, "on_host_lost"),
    "executes": (yes_no, "executes"),
    "mounts": (lambda value: absolute_path(value, "/srv/agents"), "mounts"),
    "max_restarts": (_small_number, "max_restarts"),
    "search_time": (parse_duration, "search_s"),
    "max_executions": (partial(_small_number, least=1), "max_executions"),
    "launcher": (admission.launcher, "launcher"),
    "launcher_grace": (parse_duration, "launcher_grace_s"),
    "purge_after": (parse_duration, "purge_after_s"),
    "starter": (admission.starter, "starter"),
    "mount_unit": (admission.mount_unit, "mount_unit"),
}
_QUOTA: dict[str, tuple[Callable[[object], Any], str]] = {
    "bytes": (parse_size, "bytes"),
    "files": (_tenant_files, "files"),
}
_EVERY_TENANT = "default"  # [tenants.default] is the quota of those that are not named


@dataclass(slots=True)
class _Reading:
    """What was understood so far, and every mistake so far."""

    values: dict[str, Any] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=lambda: {r.name: r for r in DEFAULT_REGIONS})
    creators: list[attribution.CreatorRule] = field(default_factory=list)
    webhooks: list[bindings.Webhook] = field(default_factory=list)
    inboxes: list[bindings.Inbox] = field(default_factory=list)
    gateway: admission.Gateway = field(default_factory=admission.Gateway)
    problems: list[str] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    path: Path | None = None

    def file(self, path: Path | None, environ: Mapping[str, str]) -> None:
        if path is None and environ.get("AGENTFUSE_CONFIG"):
            path = Path(environ["AGENTFUSE_CONFIG"])
        if path is None:
            if not DEFAULT_PATH.exists():
                return
            path = DEFAULT_PATH
        self.path = path
        parsed = self._parse(path)
        bound = {key: parsed.pop(key) for key in ("creators", "webhooks", "inbox") if key in parsed}
        for key, value in parsed.items():
            if key == "regions":
                self._region_tables(value)
            elif key in ("gateway", "tenants", "keys"):
                self._of_gateway(key, value)
            elif key in _TOP:
                self.top(key, value, self._where(key))
            else:
                self.problems.append(
                    f"{self._where(key)}: there is no such key; {_did_you_mean(key, [*_TOP, *_TABLES])}"
                )
        if "creators" in bound:
            self.creators = self._entries("creators", bound["creators"], attribution.KEYS, attribution.rule)
        if "webhooks" in bound:  # these name regions
            keys = bindings.WEBHOOK_KEYS
            self.webhooks = self._entries("webhooks", bound["webhooks"], keys, bindings.webhook)
        if "inbox" in bound:
            self.inboxes = self._entries("inbox", bound["inbox"], bindings.INBOX_KEYS, bindings.inbox)

    def top(self, key: str, value: object, where: str) -> None:
        self._note(where, lambda: self.values.__setitem__(key, _TOP[key](value)))

    def _of_gateway(self, key: str, value: object) -> None:
        if key == "gateway":
            self.gateway = self._table(self.gateway, key, value, _GATEWAY)
            self._note(self._where(key), lambda: admission.check(self.gateway))
        elif key == "tenants":
            self._tenant_tables(value)
        else:
            entries = self._entries(key, value, admission.KEY_KEYS, admission.api_key)
            self.gateway = replace(self.gateway, keys=tuple(entries))

    def listen(self, value: object) -> None:
        self.gateway = self._table(self.gateway, "--listen", {"": value}, {"": _GATEWAY["listen"]})

    def starter(self, value: str) -> None:
        where = {"": _GATEWAY["starter"]}
        self.gateway = self._table(self.gateway, "AGENTFUSE_STARTER", {"": value}, where)

    def dev_key(self, value: str) -> None:
        key = self._note("AGENTFUSE_DEV_KEY", lambda: admission.dev_key(value))
        if key is not None:
            self.gateway = replace(self.gateway, keys=(*self.gateway.keys, key))

    def finish(self, environ: Mapping[str, str]) -> Config:
        state = self.values.get("state") or self._default_state(environ)
        if self.problems or state is None:
            raise ConfigError(self.problems)
        return Config(
            store=self.values.get("store", (state / "store").as_uri()),
            state=state,
            owner=self.values.get("owner", (os.geteuid(), os.getegid())),
            regions=tuple(self.regions.values()),
            xattrs=self.values.get("xattrs", False),
            keep_ended_s=self.values.get("keep_ended", 24 * 3600.0),
            mount_options=self.values.get("mount_options", ()),
            sync_delay_s=self.values.get("sync_delay", 5.0),
            checkpoint_interval_s=self.values.get("checkpoint_interval", 15.0),
            flush_timeout_s=self.values.get("flush_timeout", 60.0),
            cache_bytes=self.values.get("cache_size", 1024**3),
            metrics=self.values.get("metrics"),
            metrics_file=self.values.get("metrics_file"),
            metrics_interval_s=self.values.get("metrics_interval", 15.0),
            log_format=self.values.get("log_format", "auto"),
            mount_helper=self.values.get("mount_helper"),
            creators=tuple(self.creators),
            webhooks=tuple(self.webhooks),
            inboxes=tuple(self.inboxes),
            gateway=self.gateway,
        )

    def _default_state(self, environ: Mapping[str, str]) -> Path | None:
        if os.geteuid() == 0:
            return Path("/var/lib/agentfuse")
        base = environ.get("XDG_STATE_HOME", "")
        if base.startswith("/"):
            return Path(base) / "agentfuse"
        home = environ.get("HOME", "")
        if home.startswith("/"):
            return Path(home) / ".local/state/agentfuse"
        self.problems.append("state: no default without HOME; set AGENTFUSE_STATE or give --state DIR")
        return None

    def _parse(self, path: Path) -> dict[str, Any]:
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            self.problems.append(
                f"{path}: cannot be read ({error.strerror}); correct the path or its permissions"
            )
            return {}
        if len(data) > _MAX_FILE_BYTES:
            self.problems.append(f"{path}: larger than 1MiB; this cannot be a configuration of agentfuse")
            return {}
        try:
            text = data.decode()
            parsed = tomllib.loads(text)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.problems.append(f"{path}:{line}: not UTF-8 text; save the file as UTF-8")
            return {}
        except (ValueError, RecursionError) as error:  # tomllib lets int's own ValueError out, too
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            self.problems.append(f"{path}: not valid TOML: {reason}")
            return {}
        self.lines = _key_lines(text)
        return parsed

    def _entries(
        self,
        key: str,
        tables: object,
        parsers: Mapping[str, Callable[[object], Any]],
        build: Callable[[Mapping[str, Any], Mapping[str, Region], list[_T]], _T],
    ) -> list[_T]:
        """The entries of an array of tables; an entry with a mistake is left out."""
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self.problems.append(f"{self._where(key)}: must hold tables; write [[{key}]] and its keys below")
            return []
        entries: list[_T] = []
        for number, table in enumerate(tables):
            before = len(self.problems)
            values: dict[str, Any] = {}
            for name, value in table.items():
                at = self._where(f"{key}[{number}].{name}")
                if name not in parsers:
                    self.problems.append(f"{at}: there is no such key; {_did_you_mean(name, list(parsers))}")
                else:
                    values[name] = self._note(at, partial(parsers[name], value))
            if len(self.problems) == before:
                where = self._where(f"{key}[{number}]")
                entry = self._note(where, partial(build, values, self.regions, entries))
                entries += [] if entry is None else [entry]
        return entries

    def _table(
        self, into: _T, name: str, table: object, keys: Mapping[str, tuple[Callable[[object], Any], str]]
    ) -> _T:
        """A dataclass with what a table sets of it."""
        if not isinstance(table, dict):
            self.problems.append(f"{self._where(name)}: must be a table; write [{name}] and its keys below")
            return into
        for key, value in table.items():
            at = self._where(f"{name}.{key}") if key else name
            if key not in keys:
                self.problems.append(f"{at}: there is no such key; {_did_you_mean(key, list(keys))}")
                continue
            parse, attribute = keys[key]
            parsed = self._note(at, partial(parse, value))
            if parsed is not None:
                into = replace(into, **{attribute: parsed})  # type: ignore[type-var]  # all are dataclasses
        return into

    def _tenant_tables(self, tables: object) -> None:
        if not isinstance(tables, dict):
            self.problems.append(f"{self._where('tenants')}: must hold tables, like [tenants.default]")
            return
        every = self.gateway.tenant_quota
        if _EVERY_TENANT in tables:
            every = self._table(every, f"tenants.{_EVERY_TENANT}", tables[_EVERY_TENANT], _QUOTA)
        quotas = {}
        for name, table in tables.items():
            if name != _EVERY_TENANT and self._note(
                self._where(f"tenants.{name}"), partial(admission.tenant, name)
            ):
                quotas[name] = self._table(every, f"tenants.{name}", table, _QUOTA)
        self.gateway = replace(self.gateway, tenant_quota=every, tenants=quotas)

    def _region_tables(self, tables: object) -> None:
        if not isinstance(tables, dict):
            self.problems.append(f"{self._where('regions')}: must hold tables, like [regions.shared]")
            return
        for name, table in tables.items():
            where = self._where(f"regions.{name}")
            if not isinstance(table, dict):
                self.problems.append(f"{where}: must be a table; write [regions.NAME] and its keys below")
                continue
            region = self._base_region(name, table, where)
            for key, value in table.items():
                at = self._where(f"regions.{name}.{key}")
                if key not in _REGION:
                    self.problems.append(f"{at}: there is no such key; {_did_you_mean(key, list(_REGION))}")
                elif key == "scope" and name in _DEFAULT_NAMES:
                    self.problems.append(f"{at}: the scope of a default region is fixed; remove the line")
                elif key == "notify" and name == LOOSE:
                    self.problems.append(f"{at}: what lies loose in a home never notifies; remove the line")
                elif key == "sync" and name in _ALWAYS:
                    self.problems.append(f"{at}: {_ALWAYS[name]}; remove the line")
                else:
                    parse, attribute = _REGION[key]
                    parsed = self._note(at, lambda parse=parse, value=value: parse(value))  # type: ignore[misc]
                    if parsed is not None and region is not None:
                        region = replace(region, **{attribute: parsed})
            if region is not None:
                self.regions[name] = region

    def _base_region(self, name: str, table: dict[str, Any], where: str) -> Region | None:
        if name in self.regions:
            return self.regions[name]
        if not _REGION_NAME.fullmatch(name):
            self.problems.append(
                f"{where}: {shown(name)} cannot name a region; use 1 to 64 letters, digits, dashes "
                "or underscores, the first a letter"
            )
        elif "scope" not in table:
            close = difflib.get_close_matches(name, _DEFAULT_NAMES, n=1)
            meant = f"did you mean {close[0]}? Otherwise, for" if close else "for"
            self.problems.append(
                f'{where}: no such region; {meant} a region of your own add scope = "execution"'
            )
        elif "bytes" not in table:
            self.problems.append(f'{where}: a region of your own needs a quota; add bytes = "100MiB"')
        else:
            return Region(name, Scope.EXECUTION, 0, 50_000)
        return None

    def _note(self, where: str, parse: Callable[[], Any]) -> Any:
        """What ``parse`` returns; None when it found a mistake, which is kept."""
        try:
            return parse()
        except ValueError as error:
            self.problems.append(f"{where}: {error}")
            return None

    def _where(self, key: str) -> str:
        """``FILE:LINE: full.key``, the line of the nearest enclosing key that has one."""
        known = key
        while known and known not in self.lines:
            known = known.rpartition(".")[0]
        name = key if key.isprintable() and len(key) <= 100 else shown(key)
        return f"{self.path}:{self.lines[known]}: {name}" if known else f"{self.path}: {name}"


_ALWAYS = {
    "shared": "the agent's memory is always synced continuously",
    LOOSE: "what lies loose in a home is scratch and never synced",
}
_TABLES = ("regions", "creators", "webhooks", "inbox", "gateway", "tenants", "keys")
_DEFAULT_NAMES = tuple(region.name for region in DEFAULT_REGIONS)


def _did_you_mean(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def _key_lines(text: str) -> dict[str, int]:
    """Where each dotted key begins. tomllib keeps no positions, so this reads one key per line.

    What it misses (inline tables, keys inside multi-line strings) only costs a less exact line.
    """
    lines: dict[str, int] = {}
    entries: dict[str, int] = {}  # of each array of tables, the number of the last
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.match(r"""\s*\[(\[?)([^\]#]+)\]""", line):
            table = _dotted(match[2])
            lines.setdefault(table, number)
            if match[1]:
                entries[table] = entries.get(table, -1) + 1
                table = f"{table}[{entries[table]}]"
                lines[table] = number
        elif match := re.match(
            r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""", line
        ):
            key = _dotted(match[1])
            lines.setdefault(f"{table}.{key}" if table else key, number)
    return lines


def _dotted(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))
