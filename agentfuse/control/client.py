"""Asks a mount's daemon over its control socket; blocking. Vendor errors of HTTP end here."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from agentfuse.control.registry import socket_address
from agentfuse.errors import AgentfuseError, BusyError, NotFoundError, UnflushedError, UsageError

ANSWER_DEADLINE_S = 30.0  # an unmount sends something every second while it works


CHECK_DEADLINE_S = 600.0
"""A home of a million files is walked for long."""

OVERTIME_S = 15.0
"""A daemon that was given a time ends soon after it: a request to the store may be under way then."""


class ControlClient:
    """A mount's operations, by its control socket. Every error is an AgentfuseError.

    A socket without a daemon is NotFoundError; a daemon silent for ``deadline_s`` is BusyError.
    """

    def __init__(self, socket_path: Path, *, deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self._path = socket_path
        self._deadline_s = deadline_s

    def status(self) -> dict[str, Any]:
        """The mount as the daemon describes it."""
        with self._http() as http:
            response = http.get("/v1/status")
            _require_ok(response)
            return dict(response.json())

    def metrics(self) -> str:
        """What the mount counts, in Prometheus' text format."""
        with self._http() as http:
            response = http.get("/v1/metrics")
            _require_ok(response)
            return response.text

    def events(
        self, *, since: int | None = None, region: str | None = None, follow: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Events numbered higher than ``since``, or all; with ``follow`` those to come, to the mount's end.

        An empty one says that this was all for now; it comes every few seconds while nothing else does.
        """
        wanted = {"since": since, "region": region, "follow": int(follow)}
        query = {name: value for name, value in wanted.items() if value is not None}
        with self._http() as http, http.stream("GET", "/v1/events", params=query) as response:
            _require_ok(response)
            for text in response.iter_lines():
                yield json.loads(text) if text else {}

    def check(self) -> dict[str, Any]:
        """Whether the home is sound: ``{execution, regions, events, problems, notes}``."""
        with self._http() as http:
            response = http.post("/v1/check", timeout=CHECK_DEADLINE_S)
            _require_ok(response)
            return dict(response.json())

    def sync(self, *, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Have everything closed so far brought into the store; yields as :meth:`unmount` does.

        Raises UnflushedError when that takes the daemon longer than ``timeout_s``.
        """
        return self._follow("/v1/sync", {"timeout_s": timeout_s}, "the sync", timeout_s)

    def unmount(self, *, lazy: bool = False, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """End the mount; yields {"say": ...}, {"progress": ...} and at last {"done": ...}.

        ``timeout_s``: how long the daemon tries to reach the store. Raises what the daemon reports (with
        its exit code); BusyError when it has not ended OVERTIME_S after that (the unmount goes on);
        UnflushedError when the daemon ends without having said that all is durable.
        """
        body = {"lazy": lazy, "timeout_s": timeout_s}
        return self._follow("/v1/unmount", body, "the unmount", timeout_s)

    def _follow(
        self, path: str, body: Mapping[str, object], what: str, timeout_s: float | None
    ) -> Iterator[dict[str, Any]]:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s + OVERTIME_S
        with self._http() as http, http.stream("POST", path, json=body) as response:
            _require_ok(response)
            for text in response.iter_lines():
                line = json.loads(text) if text else {}
                if "error" in line:
                    raise _reported(line["error"])
                if line:
                    yield line
                if "done" in line:
                    return
                if time.monotonic() > deadline:
                    raise BusyError(
                        f"{what} did not end within {timeout_s:g} s",
                        hint="it goes on; ask again, or look with agentfuse ps",
                    )
        raise _ended_early()

    @contextmanager
    def _http(self) -> Iterator[httpx.Client]:
        with (
            socket_address(self._path) as address,
            httpx.Client(
                transport=httpx.HTTPTransport(uds=address),
                base_url="http://agentfuse",
                timeout=self._deadline_s,
            ) as http,
            _map_httpx(self._path),
        ):
            yield http


@contextmanager
def _map_httpx(path: Path) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError as error:
        raise NotFoundError(
            f"no daemon answers at {path}",
            hint="it has ended; agentfuse umount MOUNTPOINT cleans up after it",
        ) from error
    except httpx.TimeoutException as error:
        raise BusyError(
            f"the daemon at {path} does not answer",
            hint="it may be stopped or hang: see its log, and agentfuse ps for its pid",
        ) from error
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise _ended_early() from error


def _require_ok(response: httpx.Response) -> None:
    if response.status_code != httpx.codes.OK:
        answer = json.loads(response.read())
        kind: dict[int, type[AgentfuseError]] = {
            httpx.codes.NOT_FOUND: NotFoundError,
            httpx.codes.BAD_REQUEST: UsageError,
        }
        raise kind.get(response.status_code, AgentfuseError)(answer["message"], hint=answer["hint"])


def _ended_early() -> UnflushedError:
    return UnflushedError(
        "the daemon ended without a full answer",
        hint="what was written is safe on this host: the next agentfuse mount of this agent finishes it",
    )


def _reported(error: dict[str, Any]) -> AgentfuseError:
    """The daemon's own error, with its own exit code."""
    reported = AgentfuseError(str(error["message"]), hint=str(error["hint"]))
    reported.exit_code = int(error["exit_code"])  # type: ignore[misc]
    return reported
