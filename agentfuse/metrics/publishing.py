"""Where metrics go besides the control socket: a port on this host that Prometheus scrapes, and a file for
node_exporter's textfile collector.

Neither is worth a mount: what does not work is logged, and tried again where that may help.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from agentfuse.control.mount_routes import METRICS_TYPE
from agentfuse.control.transport import CLIENT_LEFT, Exchange, RequestError
from agentfuse.values import Address

log = logging.getLogger(__name__)

Metrics = Callable[[], Awaitable[bytes]]

_MOST_SCRAPES = 8
_DEADLINE_S = 10.0


class Scrapes:
    """Answers ``GET /metrics`` at an address of this host. ``url`` once it does; ``open``: clients now, a few
    at most.
    """

    def __init__(self) -> None:
        self.url: str | None = None
        self.open = 0

    async def serve(
        self,
        address: Address,
        metrics: Metrics,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Until cancelled, started when it answers. At an address that is taken nothing is served."""
        host, port = address
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)  # a name may have several addresses
        except OSError as error:
            log.warning(
                "no metrics at %s: %s; each mount needs a port of its own, or metrics_file", address, error
            )
            task_status.started()
            return
        bound = listeners[0].socket.getsockname()[1]
        self.url = f"http://{Address(host, bound)}/metrics"
        task_status.started()
        await trio.serve_listeners(partial(self._handle, metrics), listeners)

    async def _handle(self, metrics: Metrics, stream: trio.SocketStream) -> None:
        async with stream:
            if self.open >= _MOST_SCRAPES:
                return
            self.open += 1
            try:
                with trio.move_on_after(_DEADLINE_S):
                    await _answer(Exchange(stream), metrics)
            except CLIENT_LEFT:
                log.debug("a scrape was given up")
            except Exception:
                log.exception("unexpected error in a scrape")
            finally:
                self.open -= 1


async def _answer(exchange: Exchange, metrics: Metrics) -> None:
    try:
        request = await exchange.read_head()
    except RequestError as error:
        await exchange.send_json(error.status, error.body, error.headers)
        return
    if (request.method, request.target) != (b"GET", b"/metrics"):
        await exchange.send_json(404, {"code": "not_found", "message": "there is GET /metrics only"})
        return
    try:
        text = await metrics()
    except Exception:
        log.exception("unexpected error in metrics")
        await exchange.send_json(500, {"code": "internal", "message": "unexpected error"})
        return
    await exchange.begin(200, METRICS_TYPE, [("Content-Length", str(len(text)))])
    await exchange.send(text)
    await exchange.end()


async def keep_textfile(path: Path, metrics: Metrics, interval_s: float) -> None:
    """Have a file hold the newest metrics, whole at any moment, until cancelled; then it is removed, for it
    would tell of a mount that is no more.
    """
    limiter = trio.CapacityLimiter(1)
    has_failed = False
    try:
        while True:
            try:
                text = await metrics()
                await trio.to_thread.run_sync(_replace, path, text, limiter=limiter)
                has_failed = False
            except Exception as error:
                if not has_failed:
                    why, is_unexpected = str(error), not isinstance(error, OSError)
                    log.warning("metrics cannot be written to %s: %s", path, why, exc_info=is_unexpected)
                has_failed = True
            await trio.sleep(interval_s)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _replace(path: Path, text: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")  # no name that node_exporter reads
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    with open(fd, "wb") as file:
        file.write(text)
    temporary.replace(path)
