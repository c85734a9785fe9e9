"""The form of a route: a method, a path, its typed request, and what kind of answer there is."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import EnumType
from typing import Any, Generic, TypeVar, get_args
from urllib.parse import parse_qsl

import msgspec

from agentfuse.control import paths
from agentfuse.control.contract import Lines, MountControl
from agentfuse.control.messages import AnyQuery, Nothing
from agentfuse.control.transport import Header, RequestError

_Q = TypeVar("_Q", bound=msgspec.Struct)
_B = TypeVar("_B", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Call(Generic[_Q, _B]):
    """A request as its route gets it. Header names are lower-case.

    ``region`` and ``path`` are those of the URL; ``content`` is the body where the route takes it as it
    comes, ``size`` its length if the client said it. ``fd``: the descriptor that came along, until it is
    answered.
    """

    query: _Q
    body: _B
    headers: Mapping[bytes, bytes]
    region: str = ""
    path: bytes = b""
    content: AsyncIterator[bytes] | None = None
    size: int | None = None
    fd: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One JSON object, or its text."""

    value: msgspec.Struct | dict[str, object] | bytes
    status: int = 200


@dataclass(frozen=True, slots=True)
class Watched:
    """Work that goes on though nobody listens, and the lines that it is told in."""

    lines: Lines


@dataclass(frozen=True, slots=True)
class Streamed:
    """Bytes as they come, and no further when the client has left.

    What fails before the first of them is the answer; later it cuts the answer off.
    """

    content_type: str
    chunks: AsyncGenerator[bytes, None]
    status: int = 200
    headers: Sequence[Header] = ()


Reply = Answer | Watched | Streamed


@dataclass(frozen=True, slots=True)
class Media:
    """What is not one JSON object: its types, and the struct of each of its lines if it has some."""

    types: tuple[str, ...]
    line: type[msgspec.Struct] | None = None


@dataclass(frozen=True, slots=True)
class Route(Generic[_Q, _B]):
    """One method of one path. The docstring of ``handler`` is its description.

    ``path`` may have ``{region}`` and, at its end, ``{path}``, which takes what is left. ``answer`` is what
    ``status`` comes with. ``takes_content``: the body is any bytes, of any length. ``follows``: the
    answer may go on for as long as the mount does.
    """

    method: str
    path: str
    handler: Callable[[MountControl, Call[_Q, _B]], Awaitable[Reply]]
    answer: type[msgspec.Struct] | Media
    query: type[_Q] = AnyQuery  # type: ignore[assignment]
    body: type[_B] = Nothing  # type: ignore[assignment]
    status: int = 200
    takes_content: bool = False
    follows: bool = False

    def match(self, path: str) -> dict[str, str] | None:
        """The percent-encoded parts of a URL's path that this one has names for, None for another path."""
        found: dict[str, str] = {}
        parts = path.split("/")
        names = self.path.split("/")
        for position, name in enumerate(names):
            if position >= len(parts):
                return None
            if name == "{path}":
                return found | {"path": "/".join(parts[position:])}
            if name == "{region}":
                found["region"] = parts[position]
            elif name != parts[position]:
                return None
        return found if len(parts) == len(names) else None

    def call(self, target: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Call[_Q, _B]:
        """The request, typed. Raises ``RequestError`` and ``UsageError`` for one that is not understood."""
        where = self.match(path_of(target)) or {}
        path = paths.decode(where.get("path", ""))
        if "path" in where:
            path = paths.checked(path or b"/")
        length = headers.get(b"content-length")
        return Call(
            _parse_query(target, headers, self.query),
            _parse_body(body, self.body),
            headers,
            os.fsdecode(paths.decode(where.get("region", ""))),
            path,
            None,
            None if length is None else int(length),
        )


AnyRoute = Route[Any, Any]


def path_of(target: bytes) -> str:
    """The path of a request's target, as it was sent."""
    return target.partition(b"?")[0].decode("ascii", "replace")


def _parse_query(target: bytes, headers: Mapping[bytes, bytes], shape: type[_Q]) -> _Q:
    text = target.partition(b"?")[2].decode("ascii", "replace")
    fields = dict(parse_qsl(text, keep_blank_values=True, errors="surrogateescape"))
    names = [field.encode_name for field in msgspec.structs.fields(shape)]
    if "since" in names and b"last-event-id" in headers:
        # A browser that comes back to a stream of events tells where it was.
        fields["since"] = headers[b"last-event-id"].decode("ascii", "replace")
    try:
        return msgspec.convert(fields, shape, strict=False)
    except msgspec.ValidationError as error:
        takes = "it takes ?" + "&".join(f"{name}=..." for name in names) if names else "leave it out"
        hint = takes + _choices(shape)
        raise RequestError(400, f"the query is not understood: {error}", hint=hint) from None


def _choices(shape: type[msgspec.Struct]) -> str:
    """Of the fields that take some words only: which."""
    said = ""
    for field in msgspec.structs.fields(shape):
        words = list(field.type) if isinstance(field.type, EnumType) else get_args(field.type)
        if words and all(isinstance(word, str) for word in words):
            said += f"; {field.encode_name} is one of {', '.join(words)}"
    return said


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _parse_body(body: bytes, shape: type[_B]) -> _B:
    try:
        # Not msgspec's own parser: it refuses the lone surrogates of names that are no UTF-8.
        return msgspec.convert(json.loads(body or b"{}", parse_constant=_refuse_constant), shape)
    except (ValueError, RecursionError) as error:
        names = ", ".join(f'"{field.encode_name}": ...' for field in msgspec.structs.fields(shape))
        raise RequestError(
            400, f"the body is not understood: {error}", hint=f"send JSON like {{{names}}}{_choices(shape)}"
        ) from None
