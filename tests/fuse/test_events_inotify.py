"""Real inotify in the mounted directories, from inside a sandbox with a mount namespace of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from mounts import READY_S, Home

import agentfuse.client

pytestmark = pytest.mark.mount

# What is told on a line: the event's name, a space, the path.
INOTIFYWAIT = (
    "inotifywait", "-m", "-r", "-e", "close_write", "-e", "moved_to", "--format", "%e %w%f",
    "downloads", "uploads",
)  # fmt: skip
WATCHDOG = """
import sys, time
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

class Tell(FileSystemEventHandler):
    def on_closed(self, event):
        print("CLOSE_WRITE,CLOSE", event.src_path, flush=True)
    def on_moved(self, event):
        print("MOVED_TO", event.dest_path, flush=True)
    def on_created(self, event):
        print("MOVED_TO" if event.src_path.endswith(".pdf") else "CREATE", event.src_path, flush=True)

observer = Observer()
for region in ("downloads", "uploads"):
    observer.schedule(Tell(), region, recursive=True)
observer.start()
print("Watches established.", file=sys.stderr, flush=True)
observer.join()
"""


@contextmanager
def watching(home: Home, command: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """The command in a sandbox that sees the home at /mnt; it has begun to watch."""
    sandbox = (
        "bwrap",
        "--ro-bind",
        "/",
        "/",
        "--bind",
        str(home.path),
        "/mnt",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
    )
    process = subprocess.Popen(
        [*sandbox, "--unshare-pid", "--die-with-parent", "--chdir", "/mnt", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert any("Watches established" in line for line in process.stderr), "it did not come to watch"
        yield process
    finally:
        process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str], wanted: set[str]) -> None:
    """Read until all of these lines were told."""
    assert process.stdout is not None
    for line in process.stdout:
        wanted.discard(line.strip())
        if not wanted:
            return
    raise AssertionError(f"the watcher ended and had not told of {wanted}")


@pytest.mark.parametrize(
    "command", [INOTIFYWAIT, (sys.executable, "-c", WATCHDOG)], ids=["inotifywait", "watchdog"]
)
def test_a_sandbox_hears_by_inotify_of_what_others_write(
    home: Home, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes and renames, and files come through the control API."""
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    shutil.rmtree(home.path / "downloads" / "sub", ignore_errors=True)
    (home.path / "downloads" / "sub").mkdir()
    with watching(home, command) as watcher:
        script = "echo a,b > uploads/written.csv; cd downloads/sub; echo x > b.part; mv b.part b.pdf"
        subprocess.run(["sh", "-c", script], cwd=home.path, check=True, timeout=READY_S)
        hear(watcher, {"CLOSE_WRITE,CLOSE uploads/written.csv", "MOVED_TO downloads/sub/b.pdf"})
        put = agentfuse.client.Home(home.path).put(b"%PDF-1.7", "uploads/sent.pdf", creator="user")
        assert (put.region, put.path, put.size) == ("uploads", "sent.pdf", 8)
        (home.base / "c.pdf").write_bytes(b"%PDF-1.7")
        done = home.agentfuse("put", str(home.path), str(home.base / "c.pdf"), "downloads/sub/")
        assert done.returncode == 0, done.stderr
        hear(watcher, {"MOVED_TO uploads/sent.pdf", "MOVED_TO downloads/sub/c.pdf"})
