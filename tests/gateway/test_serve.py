"""The gateway as a process: how it begins, how it ends, what it says of itself."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import gateways
import httpx
import pytest
import trustme
from gateways import ACME, DEADLINE_S, ORGANIZATION, Gateway, download, listing, upload

from agentfuse.admission import sha256_of
from agentfuse.objectstore.local import LocalStore


def test_docs_and_openapi_need_nothing_from_outside(gateway: Gateway) -> None:
    with gateway.client("") as client:
        page = client.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page.text)
        api = client.get("/openapi.json").json()
        assert api["openapi"].startswith("3.")
        paths = {(path, method) for path, methods in api["paths"].items() for method in methods}
        assert {
            ("/api/v1/files", "get"),
            ("/api/v1/files", "delete"),
            ("/api/v1/files/download", "get"),
            ("/api/v1/files/upload", "post"),
            ("/api/v1/files/move", "post"),
            ("/api/v1/files/mkdir", "post"),
            ("/agents/v2/temp-files", "post"),
            ("/agents/v2/temp-files/{organizationId}", "post"),
            ("/blobs/{blob_id}", "get"),
            ("/healthz", "get"),
            ("/readyz", "get"),
            ("/metrics", "get"),
        } <= paths
        assert api["paths"]["/api/v1/files/upload"]["post"]["security"] == [{"Bearer": []}]


def test_metrics_count_requests_by_api_and_status(gateway: Gateway) -> None:
    def count(line: str) -> float:
        with gateway.client("") as client:
            answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = [each for each in answer.text.splitlines() if each.startswith(line)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    refused = 'agentfuse_gateway_requests_total{api="tenant-files",status="401"}'
    before = count(refused)
    with gateway.client("") as nobody:
        for _ in range(3):
            nobody.get("/api/v1/files")
    assert count(refused) == before + 3
    assert count("agentfuse_gateway_requests_in_progress") == 1  # the scrape itself


def test_readyz_says_whether_the_store_is_there(tmp_path: Path) -> None:
    running = Gateway(tmp_path, f"file://{tmp_path}/store")
    try:
        with running.client() as client:
            assert upload(client, {"a": b"1"}).status_code == 200
            assert client.get("/readyz").status_code == 200
            shutil.move(tmp_path / "store", tmp_path / "away")
            assert client.get("/healthz").text == "ok\n"
            answer = client.get("/readyz")
            while answer.status_code == 200:  # it asks once a second at most
                answer = client.get("/readyz")
            assert (answer.status_code, answer.json()["ready"]) == (503, False)
            assert client.get("/api/v1/files").status_code == 502
            assert download(client, "a").status_code == 502
            assert upload(client, {"b": b"1"}).status_code == 502
            shutil.move(tmp_path / "away", tmp_path / "store")
            assert [node["name"] for node in listing(client)] == ["a"]
    finally:
        assert running.stop() == 0


def test_sigterm_finishes_what_is_under_way(tmp_path: Path) -> None:
    with gateways.gateway(tmp_path, f"file://{tmp_path}/store") as running:
        url = urlsplit(running.url)
        body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="late"\r\n\r\n1\r\n--b--\r\n'
        head = (
            f"POST /api/v1/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n"
            f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        with socket.create_connection((url.hostname, url.port), DEADLINE_S) as upload_under_way:
            upload_under_way.sendall(head + body[:20])
            with running.client() as client:  # it is being served when this is answered
                assert client.get("/healthz").status_code == 200
            running.process.send_signal(signal.SIGTERM)
            _until_refused(url.hostname or "", url.port or 0)
            upload_under_way.sendall(body[20:])
            assert upload_under_way.recv(12) == b"HTTP/1.1 200"
        assert running.wait() == 0
    with gateways.gateway(tmp_path, f"file://{tmp_path}/store") as again, again.client() as client:
        assert download(client, "late").content == b"1"


def _until_refused(host: str, port: int) -> None:
    while True:
        try:
            socket.create_connection((host, port), DEADLINE_S).close()
        except (ConnectionRefusedError, ConnectionResetError):
            return


def test_who_does_not_read_his_answer_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    running = Gateway(tmp_path, f"file://{tmp_path}/store", grace="0s")
    try:
        with running.client() as client:
            upload(client, {"big": bytes(40 * 1024 * 1024)})
        url = urlsplit(running.url)
        with socket.create_connection((url.hostname, url.port), DEADLINE_S) as reader:
            request = "GET /api/v1/files/download?path=big HTTP/1.1\r\nHost: x\r\n"
            reader.sendall(f"{request}Authorization: Bearer {ACME}\r\n\r\n".encode())
            assert reader.recv(12) == b"HTTP/1.1 200"
            running.process.send_signal(signal.SIGTERM)
            assert running.wait() == 70
        assert any("requests under way" in line for line in running.complaints())
    finally:
        running.process.kill()


def test_an_address_that_is_taken_ends_it_with_69(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = _serve(tmp_path, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (69, "")
    assert "Address already in use" in done.stderr


def test_a_store_that_fails_at_the_start_ends_it_with_69(tmp_path: Path) -> None:
    host = "11111111-1111-4111-8111-111111111111"
    (tmp_path / "state/gateway").mkdir(parents=True)
    (tmp_path / "state/gateway/host.id").write_text(host)
    store = tmp_path / "store"
    LocalStore(store).put("any", b"")
    (store / f"gateway/hosts/{host}.json/in the way").mkdir(parents=True)
    done = _serve(tmp_path, "--listen", "127.0.0.1:0", "--store", store.as_uri())
    assert (done.returncode, done.stdout) == (69, "")
    assert host in done.stderr and "unexpected" not in done.stderr


def test_it_speaks_https_with_a_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(each.bytes() for each in server.cert_chain_pems))
    key.write_bytes(server.private_key_pem.bytes())
    settings = f'certificate = "{certificate}"\nprivate_key = "{key}"\n'
    trusting = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    trusting.set_alpn_protocols(["h2", "http/1.1"])
    with gateways.gateway(tmp_path, f"file://{tmp_path}/store", gateway=settings) as running:
        assert running.url.startswith("https://")
        with running.client(verify=trusting) as client:
            assert upload(client, {"a": bytes(3_000_000)}).status_code == 200
            assert download(client, "a").content == bytes(3_000_000)
            assert client.get("/healthz").http_version == "HTTP/1.1"
        with pytest.raises(httpx.ConnectError), running.client() as client:
            client.get("/healthz")
    config = tmp_path / "broken.toml"
    config.write_text(f'[gateway]\ncertificate = "{key}"\nprivate_key = "{key}"\n')
    done = _serve(tmp_path, "--config", str(config))
    assert (done.returncode, done.stdout) == (78, "")
    assert "gateway.certificate" in done.stderr


def test_a_state_directory_is_one_gateways_at_a_time(gateway: Gateway) -> None:
    done = _run("serve", "--state", str(gateway.state), "--store", gateway.store, "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (75, "")
    assert "another gateway serves with" in done.stderr
    assert "--state" in done.stderr


def test_mistakes_in_the_configuration_are_told_together(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[gateway]\nlisten = "nowhere"\nlissten = 1\n[tenants.acme]\nbytes = "much"\n'
        '[[keys]]\nsha256 = "af_in-clear"\norganization = "acme"\nscopes = ["everything"]\n'
    )
    done = _serve(tmp_path, "--config", str(config), AGENTFUSE_DEV_KEY="x")
    assert done.returncode == 78
    for wanted in (
        "config.toml:2: gateway.listen",
        "did you mean listen?",
        "tenants.acme.bytes",
        "keys[0].sha256",
        "keys[0].organization",
        "keys[0].scopes",
        "AGENTFUSE_DEV_KEY",
    ):
        assert wanted in done.stderr, wanted
    assert "af_in-clear" not in done.stderr


def test_key_new_prints_what_lets_a_key_in_and_a_dev_key_needs_nothing(tmp_path: Path) -> None:
    done = _run("key", "new", "--tenant", "acme", "--scope", "tenant-files", "--name", "ci")
    assert done.returncode == 0
    key, _, entry = done.stdout.partition("\n")
    assert sha256_of(key) in entry
    assert key not in entry
    dev = {"AGENTFUSE_DEV_KEY": f"dev-key-for-a-try:{ORGANIZATION}"}
    with gateways.gateway(tmp_path, f"file://{tmp_path}/store", settings=entry, **dev) as running:
        with running.client(key) as client:
            assert upload(client, {"a": b"1"}).status_code == 200
        with running.client("dev-key-for-a-try") as client:  # it is good for everything, and its own tenant
            assert listing(client) == []
            staged = client.post("/agents/v2/temp-files", files={"files": ("a", b"1")})
            assert staged.status_code == 200
    refused = _run("key", "new", "--scope", "everything")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--scope" in refused.stderr


def _serve(tmp_path: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return _run("serve", "--state", str(tmp_path / "state"), *arguments, **environ)


def _run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentfuse", *arguments],
        env=gateways.without_ours(os.environ) | environ,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_a_gateway_that_is_killed_loses_nothing_that_it_answered(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    running = Gateway(tmp_path, store)
    answered: list[tuple[str, bytes]] = []

    def put(worker: int) -> None:
        with suppress(httpx.TransportError), running.client() as client:
            for number in itertools.count():
                name, content = f"{worker}-{number}", b"%d-%d" % (worker, number)
                if upload(client, {name: content}).status_code == 200:
                    answered.append((name, content))
                if len(answered) > 60:
                    running.process.kill()

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(put, range(6)))
    assert running.process.wait(DEADLINE_S) == -signal.SIGKILL
    with gateways.gateway(tmp_path, store) as again, again.client() as client:
        stored = {node["name"] for node in listing(client)}
        assert {name for name, _ in answered} <= stored
        for name, content in answered:
            assert download(client, name).content == content
    assert list((running.state / "gateway" / "spool").iterdir()) == []
