"""Fixtures of real mounts. A mount is started once for a module; each test gets a directory of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import invariants
import mounts
import pytest
from mounts import PLAIN, Home, base_directory, remove_base

HANG_S = 240.0  # below pytest's own timeout, which cannot wake a process that hangs in the kernel


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a plain directory, leave out what only a mount can show."""
    if PLAIN:
        left_out = [item for item in items if item.get_closest_marker("mount")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionstart() -> None:
    """Whoever started us with nohup, or in the background, ignores signals that our children need."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _hanging_mounts_fail(request: pytest.FixtureRequest) -> Iterator[None]:
    """A request that the daemon never answers cannot be interrupted, only its connection aborted."""
    marker = request.node.get_closest_marker("timeout")
    limit_s = marker.args[0] - 30 if marker and marker.args else HANG_S
    timer = threading.Timer(limit_s, mounts.abort_everything)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


@contextlib.contextmanager
def _homes() -> Iterator[Callable[..., Home]]:
    """Makes homes (not started), each in a base directory of its own, and ends them all afterwards."""
    made: list[Home] = []

    def make(**options: Any) -> Home:
        made.append(Home(base_directory(), **options))
        return made[-1]

    yield make
    complaints = []
    for home in made:
        home.discard()
        complaints += home.complaints()
        remove_base(home.base)
    assert not complaints, "the daemon complained:\n" + "\n".join(complaints)


@pytest.fixture(scope="module")
def make_home() -> Iterator[Callable[..., Home]]:
    """Makes homes for a module."""
    with _homes() as make:
        yield make


@pytest.fixture
def new_home() -> Iterator[Callable[..., Home]]:
    """Makes homes for one test."""
    with _homes() as make:
        yield make


@pytest.fixture(scope="module")
def home(make_home: Callable[..., Home]) -> Iterator[Home]:
    """A mounted home with the default regions, for a whole module. At its end the invariants hold."""
    mounted = make_home().start()
    yield mounted
    invariants.check(mounted)
    mounted.umount()


@pytest.fixture
def work(home: Home, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory in the home's workspace for one test; afterwards it is removed again."""
    path = home.path / "workspace" / f"t{abs(hash(request.node.nodeid)) % 10**8}"
    path.mkdir()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
    if not PLAIN:
        used = home.usage("workspace")
        assert used == (0, 0), f"the test left {used} charged to an empty workspace"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A plain directory outside of every mount, that other users may pass through."""
    path = base_directory()
    yield path
    subprocess.run(["chmod", "-R", "u+rwX", str(path)], check=True)
    shutil.rmtree(path)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the daemons' own account beside a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        for home in list(mounts._live):
            said = "\n".join([*home.output[-15:], *home.log().splitlines()[-40:]])
            report.sections.append((f"daemon of {home.path} (cwd {os.getcwd()})", said))
