"""Mistakes with object stores, as ``agentfuse doctor`` names them, and each gone after its fix."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from s3_servers import Server

from agentfuse.config import load_config
from agentfuse.doctor import Finding, guarded, storage
from agentfuse.objectstore.s3_sdk import shared_client


def doctor(url: str) -> Finding:
    """What it finds of a store."""
    shared_client.cache_clear()  # a process of its own has none
    settings = load_config(
        None,
        environ={"AGENTFUSE_STORE": url, "AGENTFUSE_STATE": "/nowhere", "AGENTFUSE_CONFIG": "/dev/null"},
        overrides={},
    )
    (found,) = guarded("object store", lambda: storage.store(settings))
    return found


@pytest.fixture(autouse=True)
def _no_clients_stay() -> Iterator[None]:
    yield
    shared_client.cache_clear()


def test_a_wrong_secret_and_a_wrong_key(radosgw: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = radosgw.url("contract", "doctor")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        right = os.environ[name]
        monkeypatch.setenv(name, "wrong")
        found = doctor(url)
        assert found.verdict == "fail" and f"correct {name}" in found.fix
        monkeypatch.setenv(name, right)
    assert doctor(url).verdict == "ok"


def test_a_bucket_that_is_missing_and_one_that_is_no_name(radosgw: Server) -> None:
    found = doctor(radosgw.url("forgotten", "doctor"))
    assert "there is no such bucket" in found.found and found.fix.startswith("create it")
    radosgw.make_bucket("forgotten")
    assert doctor(radosgw.url("forgotten", "doctor")).verdict == "ok"
    assert "'ab' is no bucket's name" in doctor(radosgw.url("ab", "doctor")).found


def test_a_wrong_clock(radosgw: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.auth  # noqa: PLC0415

    url, right = radosgw.url("contract", "doctor"), botocore.auth.get_current_datetime
    with monkeypatch.context() as late:
        late.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: right(*a, **k).replace(year=2020))
        found = doctor(url)
    assert "clock" in found.found and "timedatectl set-ntp true" in found.fix
    assert doctor(url).verdict == "ok"


def test_a_bucket_s_name_before_a_host_that_knows_none(radosgw: Server) -> None:
    url = radosgw.url("contract", "doctor").replace("127.0.0.1", "localhost")
    found = doctor(f"{url}&addressing=virtual")
    assert found.verdict == "fail" and "leave out addressing=virtual" in found.fix, found
    assert doctor(url).verdict == "ok"


def test_a_store_that_ignores_the_condition(juicefs_gateway: Server, radosgw: Server) -> None:
    found = doctor(juicefs_gateway.url("refused", "doctor"))
    assert "ignores put-if-absent" in found.found and "choose another store" in found.fix
    assert doctor(radosgw.url("contract", "doctor")).verdict == "ok"


@contextlib.contextmanager
def over_https(server: Server, directory: Path) -> Iterator[str]:
    """A port that ends TLS in front of a server, and its certificate's authority."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    behind = int(server.endpoint.rpartition(":")[2])

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = listening.accept()
                try:
                    client = context.wrap_socket(accepted, server_side=True)
                except ssl.SSLError:  # who does not trust it
                    continue
                upstream = socket.create_connection(("127.0.0.1", behind))
                for pair in ((client, upstream), (upstream, client)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"https://localhost:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def test_an_authority_that_is_unknown_and_no_checksums_that_trail(
    radosgw: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with over_https(radosgw, tmp_path) as endpoint:
        url = f"s3://contract/doctor?endpoint_url={endpoint}&region=us-east-1"
        found = doctor(url)
        assert "no TLS connection" in found.found and "AWS_CA_BUNDLE" in found.fix
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        # Payloads are signed, so the SDK has no checksum trail, which radosgw would refuse over HTTPS.
        for checksums in ("when_supported", "when_required"):
            assert doctor(f"{url}&checksums={checksums}").verdict == "ok"
