"""Fields of requests, each of the type it must be: of JSON bodies, and of queries.

Every mistake is a ``UsageError`` that names the field. What is not known is tolerated: clients are newer than
servers, now and then.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from agentfuse.errors import UsageError
from agentfuse.values import shown

_WITHIN = re.compile(r"(?:(\d{1,6})w)?(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?")
_WITHIN_S = (7 * 86400, 86400, 3600, 60)
_MAX_WITHIN_S = 10 * 366 * 86400
_SIGN_LOST = re.compile(r"(:\d{2}(?:\.\d+)?) (\d{2}:?\d{2})")


def object_of(body: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """An object that can be kept, or None where there is none."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise UsageError(f"{name} must be an object")
    return dict(_kept(name, value))


def text_or_none(body: Mapping[str, Any], *names: str) -> str | None:
    """A text under the first of these names that has one."""
    for name in names:
        value = body.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise UsageError(f"{name} must be a string")
            if value:
                return str(_kept(name, value))
    return None


def flag_of(body: Mapping[str, Any], name: str) -> bool:
    """True or false; false where nothing is said."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false")
    return bool(value)


def whole_or_none(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    """A whole number from ``least`` to ``most``."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{name} must be a whole number from {least} to {most}")
    return value


def whole(text: str | None, name: str, least: int, most: int) -> int | None:
    """As :func:`whole_or_none`, of a query."""
    if text is None:
        return None
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else -1
    if not least <= value <= most:
        raise UsageError(f"{name} must be a whole number from {least} to {most}, not {shown(text)}")
    return value


def one_of(text: str | None, name: str, choices: Iterable[str]) -> str | None:
    """One of these words."""
    known = sorted(choices)
    if text is not None and text not in known:
        raise UsageError(f"{name} must be one of {', '.join(known)}, not {shown(text)}")
    return text


def all_of(texts: Sequence[str], name: str, choices: Iterable[str]) -> list[str]:
    """Some of these words."""
    known = frozenset(choices)
    return [str(one_of(text, name, known)) for text in texts]


def moment(text: str | None, name: str) -> float | None:
    """A point in time, in seconds since the epoch; one without a zone is UTC.

    A plus sign that was sent as it is has become a space on the way, which is understood.
    """
    if text is None:
        return None
    try:
        found = datetime.datetime.fromisoformat(_SIGN_LOST.sub(r"\1+\2", text))
        if found.tzinfo is None:
            found = found.replace(tzinfo=datetime.UTC)
        return found.timestamp()
    except (ValueError, OverflowError):
        raise UsageError(
            f"{name} must be a time, not {shown(text)}", hint="write it like 2026-01-31T12:00:00Z"
        ) from None


def span(text: str | None, name: str) -> float | None:
    """A span of time like ``1d12h``, in seconds."""
    if text is None:
        return None
    match = _WITHIN.fullmatch(text)
    parts = [int(each or 0) for each in match.groups()] if match and text else []
    seconds = sum(part * unit for part, unit in zip(parts, _WITHIN_S, strict=False))
    if not 0 < seconds <= _MAX_WITHIN_S:
        raise UsageError(
            f"{name} must be a span of up to ten years, not {shown(text)}",
            hint="write it like 30m, 24h, 7d or 1d12h",
        )
    return float(seconds)


def shown_value(value: object) -> str:
    """What a filter compares: a text as it is, anything else as JSON has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _kept(name: str, value: Any) -> Any:
    """A value, if a record can hold it and give it back."""
    try:
        return msgspec.json.decode(msgspec.json.encode(value))
    except (UnicodeEncodeError, RecursionError, ValueError, OverflowError):
        raise UsageError(
            f"{name} cannot be kept", hint="it must be valid Unicode, and not nested deeply"
        ) from None
