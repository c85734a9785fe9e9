"""What clients ask of a daemon and how they understand its answers, without doing any of it.

So the blocking and the asynchronous client are the same but for waiting. Vendor errors of HTTP end here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

import anyio
import h11
import httpx
import msgspec

from agentfuse.control import paths
from agentfuse.control.feeds import encode
from agentfuse.control.messages import (
    Checkpoint,
    Deleted,
    Error,
    Failure,
    FileInfo,
    Listing,
    LogLevel,
    Made,
    OnCollision,
    Placed,
    Put,
    PutParts,
    RegionInfo,
    Regions,
    Status,
)
from agentfuse.control.registry import NoDaemonError
from agentfuse.errors import AgentfuseError, BusyError, NotFoundError, UnflushedError, UsageError

ANSWER_DEADLINE_S = 30.0  # an unmount sends something every second while it works
CONTENT_DEADLINE_S = 600.0
"""A content may have to be fetched first, or to be brought to a slow disk at last."""

CHECK_DEADLINE_S = 600.0
"""A home of a million files is walked for long."""

_PAGE = 10_000
BASE_URL = "http://agentfuse"
_NOT_UNDERSTOOD = (json.JSONDecodeError, UnicodeDecodeError, msgspec.MsgspecError)
_CUT_OFF = (h11.RemoteProtocolError, anyio.BrokenResourceError, anyio.EndOfStream)
_T = TypeVar("_T")


class CutOffError(UnflushedError):
    """The daemon ended before its answer did."""


class SilentError(BusyError):
    """The daemon did not answer in time: it hangs, or its host has much to do."""


@dataclass(frozen=True, slots=True)
class Ask(Generic[_T]):
    """One request. ``answer``: the type of the JSON object that comes back."""

    method: str
    url: str
    answer: type[_T]
    body: object = None
    headers: Mapping[str, str] = field(default_factory=dict)
    deadline_s: float = 0.0

    def content(self) -> bytes | None:
        """The body as it is sent."""
        return None if self.body is None else encode(self.body)

    def understood(self, data: bytes) -> _T:
        """The answer, typed."""
        try:
            return msgspec.json.decode(data, type=self.answer)
        except msgspec.DecodeError:  # it refuses the lone surrogates of names that are no UTF-8
            return msgspec.convert(json.loads(data), self.answer)


@dataclass(frozen=True, slots=True)
class Content(Generic[_T]):
    """A content that comes. ``size``: of the whole file; ``offset``: where in it the ``pieces`` begin."""

    etag: str
    size: int
    offset: int
    pieces: _T


def content_of(response: httpx.Response, pieces: _T) -> Content[_T]:
    """What an answer with a content says of it."""
    span, _, whole = response.headers.get("Content-Range", "bytes 0-").removeprefix("bytes ").partition("/")
    size = int(whole or response.headers.get("Content-Length", 0))
    return Content(response.headers.get("ETag", "").strip('"'), size, int(span.partition("-")[0]), pieces)


def status() -> Ask[Status]:
    """The mount."""
    return Ask("GET", "/v1/status", Status)


def metrics() -> Ask[str]:
    """What is counted; the answer is text."""
    return Ask("GET", "/v1/metrics", str)


def check() -> Ask[dict[str, Any]]:
    """Whether the home is sound."""
    return Ask("POST", "/v1/check", dict[str, Any], deadline_s=CHECK_DEADLINE_S)


def regions() -> Ask[Regions]:
    """Its regions."""
    return Ask("GET", "/v1/regions", Regions)


def set_quota(region: str, *, bytes_quota: int | None, files_quota: int | None) -> Ask[RegionInfo]:
    """Change what a region may hold; None leaves it."""
    body = {"bytes_quota": bytes_quota, "files_quota": files_quota}
    return Ask("PATCH", f"/v1/regions/{paths.encode(region)}", RegionInfo, body)


def checkpoint() -> Ask[Checkpoint]:
    """Begin to commit."""
    return Ask("POST", "/v1/checkpoint", Checkpoint)


def set_log_level(level: str) -> Ask[LogLevel]:
    """Log from this level on."""
    return Ask("PUT", "/v1/log-level", LogLevel, {"level": level})


def dump() -> Ask[str]:
    """What every thread and task does; the answer is text."""
    return Ask("GET", "/v1/dump", str)


def stat(path: str) -> Ask[FileInfo]:
    """The facts of ``uploads/a.csv``."""
    return Ask("GET", f"/v1/stat/{_place(path)}", FileInfo)


def page(path: str, *, recursive: bool, brief: bool, cursor: str | None) -> Ask[Listing]:
    """Some of a listing."""
    query = _query(recursive=int(recursive), brief=int(brief), cursor=cursor, limit=_PAGE)
    return Ask("GET", f"/v1/files/{_place(path)}{query}", Listing)


def get(path: str, *, offset: int = 0, length: int | None = None, etag: str | None = None) -> Ask[bytes]:
    """A content, or a part of it; the answer is it. ``etag``: a part of this one only, else the whole."""
    headers = {}
    if offset or length is not None:
        headers["Range"] = f"bytes={offset}-{'' if length is None else offset + length - 1}"
    if etag is not None:
        headers["If-Range"] = f'"{etag}"'
    return Ask(
        "GET", f"/v1/content/{_place_of_file(path)}", bytes, headers=headers, deadline_s=CONTENT_DEADLINE_S
    )


def put(
    path: str, *, creator: str, on_collision: OnCollision, mode: int = 0o644, if_match: str | None = None
) -> Ask[Put]:
    """A file; its content goes along."""
    query = urlencode({"as": creator, "on_collision": on_collision, "mode": f"{mode:03o}"})
    headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
    url = f"/v1/content/{_place_of_file(path)}?{query}"
    return Ask("PUT", url, Put, headers=headers, deadline_s=CONTENT_DEADLINE_S)


def put_parts(
    region: str, files: Iterable[Mapping[str, object]], *, creator: str, on_collision: OnCollision
) -> Ask[PutParts]:
    """Files; a descriptor that has their contents goes along."""
    body = {"files": [*files], "as": creator, "on_collision": on_collision}
    url = f"/v1/parts/{paths.encode(region)}"
    return Ask("POST", url, PutParts, body, deadline_s=CONTENT_DEADLINE_S)


def mkdir(path: str, *, creator: str, parents: bool, exist_ok: bool) -> Ask[Made]:
    """A directory."""
    query = urlencode({"as": creator, "parents": int(parents), "exist_ok": int(exist_ok)})
    return Ask("POST", f"/v1/directories/{_place_of_file(path)}?{query}", Made)


def annotate(path: str, *, mode: int | None, labels: bytes | None, creator: str) -> Ask[FileInfo]:
    """Other permissions, other labels."""
    body = {
        "mode": None if mode is None else f"{mode:03o}",
        "labels": None if labels is None else base64.b64encode(labels).decode(),
        "as": creator,
    }
    return Ask("PATCH", f"/v1/stat/{_place_of_file(path)}", FileInfo, body)


def delete(path: str, *, creator: str, recursive: bool) -> Ask[Deleted]:
    """Remove a name."""
    query = urlencode({"as": creator, "recursive": int(recursive)})
    return Ask("DELETE", f"/v1/files/{_place_of_file(path)}?{query}", Deleted)


def move(source: str, target: str, *, creator: str, on_collision: OnCollision) -> Ask[Placed]:
    """Another name."""
    body = {"from": source, "to": target, "as": creator, "on_collision": on_collision}
    return Ask("POST", "/v1/move", Placed, body)


def set_frozen(path: str, *, frozen: bool) -> Ask[FileInfo]:
    """Whether it is frozen."""
    return Ask("PATCH", f"/v1/stat/{_place_of_file(path)}", FileInfo, {"is_frozen": frozen})


def copy(source: str, target: str, *, creator: str, on_collision: OnCollision) -> Ask[Placed]:
    """Another one."""
    body = {"from": source, "to": target, "as": creator, "on_collision": on_collision}
    return Ask("POST", "/v1/copy", Placed, body, deadline_s=CONTENT_DEADLINE_S)


def events(*, since: int | None, region: str | None, follow: bool) -> Ask[dict[str, Any]]:
    """Events, one a line."""
    return Ask("GET", f"/v1/events{_query(since=since, region=region, follow=int(follow))}", dict[str, Any])


def trace(
    *,
    operations: Iterable[str],
    path: str | None,
    pid: int | None,
    region: str | None,
    errors: bool,
    for_s: float | None,
) -> Ask[dict[str, Any]]:
    """Requests of the kernel, one a line."""
    query = _query(
        op=",".join(operations), path=path, pid=pid, region=region, errors=int(errors), for_s=for_s
    )
    return Ask("GET", f"/v1/trace{query}", dict[str, Any])


def watch(interval_s: float, frames: int | None) -> Ask[dict[str, Any]]:
    """Intervals, one a line."""
    return Ask("GET", f"/v1/watch{_query(interval_s=interval_s, frames=frames)}", dict[str, Any])


def sync(timeout_s: float | None) -> Ask[dict[str, Any]]:
    """A sync, told in lines."""
    return Ask("POST", "/v1/sync", dict[str, Any], {"timeout_s": timeout_s})


def drain(timeout_s: float | None, hold_s: float) -> Ask[dict[str, Any]]:
    """A drain, told in lines, of which most are empty."""
    return Ask("POST", "/v1/drain", dict[str, Any], {"timeout_s": timeout_s, "hold_s": hold_s})


def unmount(*, lazy: bool, timeout_s: float | None) -> Ask[dict[str, Any]]:
    """An unmount, told in lines."""
    return Ask("POST", "/v1/unmount", dict[str, Any], {"lazy": lazy, "timeout_s": timeout_s})


def line_of(text: str) -> dict[str, Any]:
    """One line of an answer; empty for a heartbeat. Raises the daemon's own error, with its exit code."""
    line = msgspec.convert(json.loads(text), dict[str, Any]) if text else {}
    if "error" in line:
        error = msgspec.convert(line["error"], Failure)
        reported = AgentfuseError(error.message, hint=error.hint)
        reported.exit_code = error.exit_code  # type: ignore[misc]
        raise reported
    return line


def refusal(status_code: int, data: bytes) -> AgentfuseError:
    """The error that an answer other than success tells of."""
    answer = msgspec.convert(json.loads(data), Error)
    kinds = {kind.code(): kind for kind in AgentfuseError.kinds() if kind.__init__ is AgentfuseError.__init__}
    by_status = {
        httpx.codes.NOT_FOUND: NotFoundError,
        httpx.codes.BAD_REQUEST: UsageError,
        httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE: UsageError,
    }
    kind = kinds.get(answer.code) or by_status.get(httpx.codes(status_code), AgentfuseError)
    return kind(answer.message, hint=answer.hint)


@contextmanager
def map_httpx(path: Path) -> Iterator[None]:
    """Turns what httpx, or anyio without it, raises while it asks at a socket into errors of ours."""
    try:
        yield
    except (httpx.ConnectError, ConnectionRefusedError, FileNotFoundError) as error:
        raise NoDaemonError(
            f"no daemon answers at {path}",
            hint="it has ended; agentfuse umount MOUNTPOINT cleans up after it",
        ) from error
    except (httpx.TimeoutException, TimeoutError) as error:
        raise SilentError(
            f"the daemon at {path} does not answer",
            hint="it may be stopped or hang: agentfuse dump MOUNTPOINT shows where",
        ) from error
    except (httpx.HTTPError, *_CUT_OFF, *_NOT_UNDERSTOOD) as error:
        raise ended_early() from error


@contextmanager
def whole_content() -> Iterator[None]:
    """Turns the end of an answer before its time into the error of a content that is not whole."""
    try:
        yield
    except CutOffError as error:
        raise BusyError(
            "the content was cut off: the file became shorter, or the daemon ended", hint="try again"
        ) from error


def ended_early() -> CutOffError:
    """The error of an answer that was cut off."""
    return CutOffError(
        "the daemon ended without a full answer",
        hint="what was written is safe on this host: the next agentfuse mount of this agent finishes it",
    )


def _place_of_file(path: str) -> str:
    if not paths.split(path.removesuffix("/"))[1]:
        raise UsageError(
            f"{path!a} is not a path of a file, but a region", hint="name what is in it: uploads/a.csv"
        )
    return _place(path)


def _place(path: str) -> str:
    return paths.encode(*paths.split(path.removesuffix("/")))


def _query(**fields: object) -> str:
    given = {name: value for name, value in fields.items() if value is not None}
    return "?" + urlencode(given, errors="surrogateescape") if given else ""
