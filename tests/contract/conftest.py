"""Real object stores, started once for all tests: a store that does not start is an error, never a skip."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import s3_servers
from s3_servers import STORES, Proxy, Server


@pytest.fixture(scope="session", autouse=True)
def _credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_servers.ENVIRON.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A radosgw with the bucket "contract"."""
    with s3_servers.radosgw(tmp_path_factory.mktemp("radosgw")) as server:
        server.make_bucket("contract")
        yield server


@pytest.fixture(scope="session")
def proxied(radosgw: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The radosgw behind a proxy that makes requests fail."""
    with s3_servers.proxy(tmp_path_factory.mktemp("haproxy"), radosgw) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_servers.ministack(tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture(scope="session")
def juicefs_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_servers.juicefs_gateway(tmp_path_factory.mktemp("juicefs")) as server:
        yield server


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty store of one test's own."""
    return STORES[request.param](request)


@pytest.fixture(params=["radosgw", "ministack"])
def s3(request: pytest.FixtureRequest) -> str:
    """The URL of an empty S3 store of one test's own."""
    return STORES[request.param](request)
