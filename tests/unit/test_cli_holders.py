"""Who keeps a mount busy, on a real (tmpfs) mount."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentfuse.cli.holders import holders_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

HOLD = {
    "working directory": "os.chdir(sys.argv[1])",
    "open file": "f = open(sys.argv[1] + '/file')",
    "mapped file": (
        "f = open(sys.argv[1] + '/file', 'rb');"
        "mmap = ctypes.CDLL(None).mmap; mmap.restype = ctypes.c_void_p;"
        "assert mmap(None, ctypes.c_size_t(4096), 1, 2, f.fileno(), ctypes.c_long(0)) != 2**64 - 1; f.close()"
    ),
    "root": "os.chroot(sys.argv[1])",
}


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "with space"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    try:
        (path / "file").write_text("x" * 4096)
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def holder() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that holds a path in some way until the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(how: str, path: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        program = f"import ctypes, os, sys; {HOLD[how]}; os.write(1, b'!'); os.read(0, 1)"
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.read(1) == b"!"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", HOLD)
def test_a_holder_is_found_with_how_it_holds(
    mounted: Path, holder: Callable[..., subprocess.Popen[bytes]], how: str
) -> None:
    process = holder(how, mounted)
    found = holders_of(mounted)
    assert [(h.pid, h.how) for h in found if h.pid == process.pid] == [(process.pid, how)]


def test_a_program_started_from_the_mount_is_found(mounted: Path) -> None:
    program = mounted / "cat"
    program.write_bytes(Path("/bin/cat").read_bytes())
    program.chmod(0o755)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"!")
        process.stdin.flush()
        assert process.stdout.read(1) == b"!"
        assert [str(h) for h in holders_of(mounted)] == [f"cat (pid {process.pid}, program)"]
        process.kill()


def test_a_holder_in_another_mount_namespace_is_found(
    mounted: Path, holder: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = holder("open file", mounted, prefix=("unshare", "-m", "--propagation", "slave"))
    assert [h.pid for h in holders_of(mounted)] == [process.pid]


def test_the_neighbours_of_a_mount_do_not_hold_it(
    mounted: Path, tmp_path: Path, holder: Callable[..., subprocess.Popen[bytes]]
) -> None:
    beside = tmp_path / "with space beside"
    beside.mkdir()
    holder("working directory", beside)
    assert holders_of(mounted) == []
    assert holders_of(beside) == []
