"""How the URLs in answers begin."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from agentfuse.gateway.addresses import base_url


def request(host: str | None, server: tuple[str, int | None] | None = ("10.0.0.1", 8080)) -> Request:
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    return Request({"type": "http", "scheme": "http", "path": "/", "headers": headers, "server": server})


@pytest.mark.parametrize("host", ["localhost", "files.example.com:8443", "[::1]:8080", "[::1]", "10.0.0.1:1"])
def test_without_a_configured_url_it_is_what_the_client_calls_the_gateway(host: str) -> None:
    assert base_url(request(host), "") == f"http://{host}"
    assert base_url(request(host), "https://public/base") == "https://public/base"


@pytest.mark.parametrize(
    "host", [None, "", "a b", "[::1", "host/path", "user@host", "host:port", "h\xe9", "host:123456", "a\nb"]
)
def test_a_host_that_is_none_is_not_repeated(host: str | None) -> None:
    assert base_url(request(host), "") == "http://10.0.0.1:8080"
    assert base_url(request(host, ("::1", 80)), "") == "http://[::1]:80"
    assert base_url(request(host, None), "") == "http://localhost"
