"""Gateways as processes of their own, with keys for several tenants, and clients of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from agentfuse.admission import sha256_of

DEADLINE_S = 60.0
ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-000000000001"
OTHER_ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-000000000002"
SECRET = "s3cret-of-links-0123456789abcdef0123456789"
KEYS = {
    # key: organization, tenant, scopes
    "key-of-acme-0001": (ORGANIZATION, "acme", '["asteroid", "tenant-files", "shinzo"]'),
    "key-of-other-001": (OTHER_ORGANIZATION, "other", '["asteroid", "tenant-files"]'),
    "key-of-reader-01": (ORGANIZATION, "acme", '["tenant-files:read"]'),
    "key-of-small-001": (ORGANIZATION, "small", '["tenant-files"]'),
    "key-of-shinzo-02": (OTHER_ORGANIZATION, "other", '["shinzo"]'),
}
ACME, OTHER, READER, SMALL, SHINZO_OTHER = KEYS
SMALL_BYTES = 100_000
"""The quota of the tenant "small"."""


class Gateway:
    """One ``agentfuse serve``; ``url`` is where it answers."""

    def __init__(
        self,
        base: Path,
        store: str,
        *,
        settings: str = "",
        gateway: str = "",
        top: str = "",
        grace: str = "20s",
        listen: str = "127.0.0.1:0",
        prefix: Sequence[str] = (),
        **environ: str,
    ) -> None:
        self.state = base / "state"
        self.store = store
        secret = base / "blob.secret"
        base.mkdir(parents=True, exist_ok=True)
        secret.write_text(SECRET)
        config = base / "config.toml"
        config.write_text(top + _configuration(secret, gateway, settings, grace))
        command = [sys.executable, "-m", "agentfuse", "serve", "--listen", listen]
        command += ["--config", str(config), "--state", str(self.state), "--store", store]
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *prefix, *command],
            env=without_ours(os.environ) | {"AGENTFUSE_RUNTIME_DIR": str(base / "run")} | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self.process.stdout
        line = self.process.stdout.readline()
        self.url = line.removeprefix("ready: ").strip()
        if not self.url:
            self.process.wait(DEADLINE_S)
            self._reader.join()

    def client(self, key: str = ACME, **options: Any) -> httpx.Client:
        """A client with a key."""
        headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {key}"} if key else {})
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=DEADLINE_S, trust_env=False, **options
        )

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Until it ends; the exit code."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join()
        return code

    def complaints(self) -> list[str]:
        """What it logged as wrong."""
        return [line for line in self.log if '"level": "ERROR"' in line or '"level": "WARNING"' in line]

    def _read_log(self) -> None:
        assert self.process.stderr
        self.log.extend(self.process.stderr)


@contextmanager
def gateway(base: Path, store: str, **options: Any) -> Iterator[Gateway]:
    """A gateway that ends well and had nothing to complain about."""
    running = Gateway(base, store, **options)
    assert running.url, "".join(running.log)
    try:
        yield running
        assert running.stop() == 0
        assert not running.complaints(), "".join(running.log)
    finally:
        running.process.kill()
        running.process.wait(DEADLINE_S)


def without_ours(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment that configures nothing."""
    return {name: value for name, value in environ.items() if not name.startswith("AGENTFUSE_")}


def _configuration(secret: Path, gateway: str, settings: str, grace: str) -> str:
    keys = "".join(
        f'[[keys]]\nsha256 = "{sha256_of(key)}"\norganization = "{organization}"\n'
        f'tenant = "{tenant}"\nscopes = {scopes}\n\n'
        for key, (organization, tenant, scopes) in KEYS.items()
    )
    return (
        f'[gateway]\nblob_secret_file = "{secret}"\ngrace = "{grace}"\nmax_request = "256MiB"\n{gateway}\n'
        f"[tenants.small]\nbytes = {SMALL_BYTES}\nfiles = 1000\n\n{keys}{settings}"
    )


def upload(
    client: httpx.Client, files: dict[str, bytes] | list[tuple[str, bytes]], path: str | None = None
) -> httpx.Response:
    """Upload to the tenant's store."""
    pairs = list(files.items()) if isinstance(files, dict) else files
    parts = [("files", (name, content)) for name, content in pairs]
    return client.post("/api/v1/files/upload", files=parts, data={} if path is None else {"path": path})


def listing(client: httpx.Client, path: str = "") -> list[dict[str, Any]]:
    """What a directory of the tenant's store holds."""
    answer = client.get("/api/v1/files", params={"path": path} if path else {})
    assert answer.status_code == 200
    return list(answer.json()["files"])


def download(client: httpx.Client, path: str) -> httpx.Response:
    """A file of the tenant's store."""
    return client.get("/api/v1/files/download", params={"path": path})
