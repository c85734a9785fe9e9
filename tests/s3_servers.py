"""S3 servers as processes: radosgw, ministack, and juicefs' gateway, which ignores conditions; and
a proxy that makes their requests fail.

Each is ready when its context is entered, and gone when it is left, or when this process dies: what is
started by a script because its standard input ends, the others by the kernel's parent-death signal.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import http.client
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest

ACCESS_KEY, SECRET_KEY = "agentfuse-test", "agentfuse-secret"
ENVIRON = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
READY_S = 90
SCRIPTS = Path(__file__).parent.parent / "scripts"


@dataclass(frozen=True)
class Server:
    """A server that answers at ``endpoint``, keeping its files in ``directory``."""

    endpoint: str
    directory: Path

    @functools.cached_property
    def client(self) -> Any:
        """The SDK's own client, to make buckets and to look behind the store."""
        return boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1").client(
            "s3", endpoint_url=self.endpoint
        )

    def make_bucket(self, name: str) -> str:
        self.client.create_bucket(Bucket=name)
        return name

    def url(self, bucket: str, prefix: str = "", **query: str) -> str:
        said = {"endpoint_url": self.endpoint, "region": "us-east-1", **query}
        return (
            f"s3://{bucket}/{quote(prefix)}".rstrip("/") + "?" + "&".join(f"{k}={v}" for k, v in said.items())
        )

    def outage(self) -> None:
        """Kill a radosgw, the cluster behind it keeping what it holds."""
        subprocess.run([SCRIPTS / "start-radosgw", "outage", self.directory], check=True)

    def back(self) -> None:
        """Start the radosgw of an outage again."""
        port = self.endpoint.rpartition(":")[2]
        subprocess.run(
            [SCRIPTS / "start-radosgw", "start", self.directory, port], check=True, stdout=subprocess.DEVNULL
        )


@dataclass(frozen=True)
class Proxy(Server):
    """A proxy in front of a server, see scripts/start-haproxy. Nothing fails until told."""

    def set(self, **faults: int) -> None:
        """Switch faults on and off; those that are not named stay as they are."""
        for name, value in faults.items():
            self._command(f"set map {self.directory}/faults.map {name} {value}")

    @contextlib.contextmanager
    def failing(self, **faults: int) -> Iterator[None]:
        """With these faults, and none of them afterwards."""
        self.set(**faults)
        try:
            yield
        finally:
            self.set(**dict.fromkeys(faults, 0))

    def counts(self) -> dict[str, int]:
        """How many requests of each kind have reached the server: lists, reads, writes."""
        return {row["pxname"]: int(row["stot"]) for row in self._statistics("BACKEND")}

    def failed(self) -> int:
        """How many requests were not answered, or with a failure of the server."""
        (row,) = self._statistics("FRONTEND")
        return int(row["req_tot"]) - sum(int(row[f"hrsp_{kind}xx"]) for kind in (1, 2, 3, 4))

    def _statistics(self, kind: str) -> list[dict[str, str]]:
        header, *lines = csv.reader(self._command("show stat").lstrip("# ").splitlines())
        rows = [dict(zip(header, line, strict=False)) for line in lines]
        return [row for row in rows if row.get("svname") == kind]

    def _command(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.directory / "haproxy.sock"))
            connection.sendall(line.encode() + b"\n")
            with connection.makefile() as answer:
                return answer.read()


@contextlib.contextmanager
def proxy(directory: Path, server: Server) -> Iterator[Proxy]:
    port, behind = free_port(), server.endpoint.rpartition(":")[2]
    command = [str(SCRIPTS / "start-haproxy"), str(directory / "haproxy"), str(port), behind]
    with _process(command, directory, port, stdin=subprocess.PIPE) as started:
        yield Proxy(started.endpoint, directory / "haproxy")


@contextlib.contextmanager
def radosgw(directory: Path, address: str = "127.0.0.1") -> Iterator[Server]:
    port = free_port()
    command = [str(SCRIPTS / "start-radosgw"), "serve", str(directory / "ceph"), str(port)]
    with _process(command, directory, port, {"ADDRESS": address}, stdin=subprocess.PIPE) as server:
        yield Server(server.endpoint, directory / "ceph")


@contextlib.contextmanager
def ministack(directory: Path) -> Iterator[Server]:
    port = free_port()
    environ = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3", "S3_PERSIST": "0"}
    with _process([_installed("ministack")], directory, port, environ) as server:
        yield server


@contextlib.contextmanager
def juicefs_gateway(directory: Path) -> Iterator[Server]:
    """A gateway of one bucket, "refused"."""
    port, juicefs, meta = free_port(), _installed("juicefs"), f"sqlite3://{directory}/meta.db"
    subprocess.run(
        [juicefs, "format", "--storage=file", f"--bucket={directory}/", "--trash-days=0", meta, "refused"],
        check=True,
        capture_output=True,
    )
    command = [juicefs, "gateway", "--no-usage-report", f"--metrics=127.0.0.1:{free_port()}"]
    command += [f"--cache-dir={directory}/cache", meta, f"127.0.0.1:{port}"]
    environ = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    with _process(command, directory, port, environ) as server:
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _installed(name: str) -> str:
    """A program of the environment that the tests run in."""
    path = shutil.which(name, path=os.path.dirname(sys.executable))
    assert path, f"{name} is missing: run scripts/setup --test"
    return path


@contextlib.contextmanager
def _process(
    command: list[str], directory: Path, port: int, environ: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Server]:
    """A server process that answers HTTP at a port; a failure to start is an error with its log."""
    log = directory / "server.log"
    if "stdin" not in options:
        command = ["setpriv", "--pdeathsig=KILL", *command]
        options["stdin"] = subprocess.DEVNULL
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=os.environ | (environ or {}), stdout=output, stderr=output, **options
        )
    try:
        _wait_for_answer(process, port, log)
        yield Server(f"http://127.0.0.1:{port}", directory)
    finally:
        if process.stdin:
            process.stdin.close()
        else:
            process.kill()
        process.wait(60)


def _wait_for_answer(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", "/")
                connection.getresponse()
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            raise RuntimeError(f"{process.args!r} ended:\n{log.read_text(errors='replace')}")
        if time.monotonic() > until:
            raise RuntimeError(f"{process.args!r} does not answer:\n{log.read_text(errors='replace')}")


_numbers = itertools.count()


def _local(request: pytest.FixtureRequest) -> str:
    tmp_path: Path = request.getfixturevalue("tmp_path")
    return f"file://{tmp_path}/store"


def _radosgw(request: pytest.FixtureRequest) -> str:
    server: Server = request.getfixturevalue("radosgw")
    return server.url("contract", f"with a prefix/{next(_numbers)}")


def _ministack(request: pytest.FixtureRequest) -> str:
    server: Server = request.getfixturevalue("ministack")
    return server.url(server.make_bucket(f"bucket-{next(_numbers)}"))


# By name: the URL of a new, empty store for the test that asks. Servers are fixtures of tests/contract.
STORES: dict[str, Callable[[pytest.FixtureRequest], str]] = {
    "local": _local,
    "radosgw": _radosgw,
    "ministack": _ministack,
}
