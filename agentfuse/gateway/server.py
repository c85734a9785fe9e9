"""The gateway as a process: its parts, the HTTP server around them, readiness, signals and the end."""

from __future__ import annotations

import logging
import os
import random
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypercorn.config
import hypercorn.trio
import hypercorn.trio.tcp_server
import trio

from agentfuse import longlived
from agentfuse.admission import Gateway
from agentfuse.config import Config
from agentfuse.errors import AgentfuseError, ConfigError, EnvironmentProblem, StoreError, leaves
from agentfuse.gateway import blobs
from agentfuse.gateway.agents import Agents
from agentfuse.gateway.app import Parts, build
from agentfuse.gateway.executions.life import PHASES
from agentfuse.gateway.executions.making import make_executions
from agentfuse.gateway.executions.records import Records
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.gateway.hosts.identity import claimed
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.metrics import Metrics
from agentfuse.gateway.staging import Staging
from agentfuse.gateway.trees import Trees
from agentfuse.objectstore import ObjectStore, probe
from agentfuse.sync.stores import Stores
from agentfuse.values import Address

OnReady = Callable[[Address], None]

_LOG = logging.getLogger(__name__)

_IDLE_CONNECTION_S = 30
_UNREAD_MS = 60_000
_CUT_OFF_AFTER_S = 2.0
_SWEEP_S = 300.0
_RECEIVED_BYTES = 256 * 1024
"""So much of a body is taken at a time: each piece costs as much as it takes to copy hundreds of KiB."""


def serve(config: Config, config_file: Path | None, *, on_ready: OnReady) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is under way, within the grace that is configured.

    ``on_ready`` gets the address when requests are answered. Raises ``AgentfuseError`` when it cannot
    begin: the store fails the probe, the address is taken. ``config_file`` is what the daemons that it starts
    are given, too.
    """
    longlived.prepare()
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs what clients do wrong
    stores = Stores(config.state, cache_bytes=config.cache_bytes)
    spool = _directory(config.state / "gateway" / "spool")
    http = _http(config.gateway)
    secret = blobs.secret_of(config.gateway, config.state)
    store = stores.open(config.store)
    probe(store)
    stores.remember(config.store)
    if not config.gateway.keys:
        _LOG.warning("there are no keys, so nobody can use it: add one with agentfuse key new")
    with claimed(config.state) as identity, _listen(config.gateway.listen) as listening:
        links = blobs.Links(secret)
        hosts = Hosts(identity, store, config.gateway, directory=spool.parent)
        failure: AgentfuseError | None = None
        try:
            trio.run(
                partial(
                    _run,
                    config,
                    store,
                    config_file=config_file,
                    spool=spool,
                    links=links,
                    hosts=hosts,
                    http=http,
                    listening=listening,
                    on_ready=on_ready,
                )
            )
        except* AgentfuseError as group:
            failure = next(leaves(group))
        if failure is not None:
            raise failure


async def _run(
    config: Config,
    store: ObjectStore,
    *,
    config_file: Path | None,
    spool: Path,
    links: blobs.Links,
    hosts: Hosts,
    http: hypercorn.config.Config,
    listening: socket.socket,
    on_ready: OnReady,
) -> None:
    limits, metrics, closing = Limits(), Metrics(), trio.Event()
    async with trio.open_nursery() as nursery:
        committer = f"gateway-{secrets.token_hex(8)}"
        trees = Trees(store, committer=committer, nursery=nursery, limits=limits)
        organizations = {key.organization for key in config.gateway.keys}
        agents = Agents(store, has_others=len(organizations) > 1)
        executions = make_executions(
            config, store, trees, agents, config_file=config_file, hosts=hosts, limits=limits, nursery=nursery
        )
        metrics.watch_executions(executions.lives.count_in, PHASES)
        parts = Parts(
            settings=config.gateway,
            regions=config.regions,
            store=store,
            trees=trees,
            agents=agents,
            executions=executions,
            links=links,
            limits=limits,
            metrics=metrics,
            spool=spool,
            hosts=hosts,
            closing=closing,
        )
        await hosts.begin(executions.lives)
        await nursery.start(hosts.run, executions.lives)
        nursery.start_soon(executions.lives.tidy)
        nursery.start_soon(executions.purge_old, config.gateway.purge_after_s)
        nursery.start_soon(_sweep, Staging(store), Records(store), limits, metrics)
        host, port = listening.getsockname()[:2]
        http.bind = [f"fd://{listening.detach()}"]  # it is closed with the server
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

            async def until_told() -> None:
                await anext(signals)
                closing.set()
                nursery.start_soon(_cut_off, config.gateway.grace_s)

            await nursery.start(_serve_http, parts, http, until_told, nursery.cancel_scope)
            on_ready(Address(host, port))
            await trio.sleep_forever()


async def _serve_http(
    parts: Parts,
    http: hypercorn.config.Config,
    until_told: Callable[[], object],
    everything: trio.CancelScope,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    await hypercorn.trio.serve(
        build(parts),  # type: ignore[arg-type]
        http,
        shutdown_trigger=until_told,  # type: ignore[arg-type]
        task_status=task_status,
        mode="asgi",
    )
    everything.cancel()


def _http(settings: Gateway) -> hypercorn.config.Config:
    """How HTTP is served. Raises ``ConfigError`` for a certificate that cannot be used."""
    hypercorn.trio.tcp_server.MAX_RECV = _RECEIVED_BYTES
    http = hypercorn.config.Config()
    http.max_app_queue_size = 2
    http.graceful_timeout = settings.grace_s
    http.keep_alive_timeout = _IDLE_CONNECTION_S
    http.ssl_handshake_timeout = _IDLE_CONNECTION_S
    http.include_server_header = False
    http.accesslog = None
    http.errorlog = logging.getLogger("agentfuse.gateway.http")
    http.errorlog.setLevel(logging.WARNING)
    http.alpn_protocols = ["http/1.1"]
    if settings.certificate and settings.private_key:
        http.certfile, http.keyfile = str(settings.certificate), str(settings.private_key)
        try:
            http.create_ssl_context()
        except OSError as error:  # those of ssl are, too
            raise ConfigError(
                [
                    f"gateway.certificate: {http.certfile} with gateway.private_key {http.keyfile}: "
                    f"{error.strerror or error}; both must be readable PEM files that belong together"
                ]
            ) from None
    return http


async def _cut_off(grace_s: float) -> None:
    """End the process although somebody does not read his answer, for whom the server would wait."""
    await trio.sleep(grace_s + _CUT_OFF_AFTER_S)
    _LOG.warning("ended %g s after it was told to, with requests under way", grace_s + _CUT_OFF_AFTER_S)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(AgentfuseError.exit_code)


async def _sweep(staging: Staging, records: Records, limits: Limits, metrics: Metrics) -> None:
    """Remove what has expired, now and then; gateways that began together do it apart."""
    while True:
        await trio.sleep(_SWEEP_S * random.uniform(0.5, 1.0))
        try:
            swept = await trio.to_thread.run_sync(staging.sweep, records.wants_files, limiter=limits.uploads)
        except StoreError as error:
            _LOG.warning("staged files were not swept: %s", error)
        else:
            metrics.swept(swept)
            if swept:
                _LOG.info("removed %d staged files that had expired", swept)


def _listen(address: Address) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by connections: who takes nothing of an answer for so long is gone.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        listening.bind(where)
        listening.listen(512)
        listening.setblocking(False)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot listen at {address}: {error.strerror}",
            hint="choose another address with --listen HOST:PORT; port 0 is any that is free",
        ) from error
    return listening


def _directory(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: {error.strerror}",
            hint="the state directory must be writable; choose another with --state",
        ) from error
    return path
