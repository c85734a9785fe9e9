"""What was changed through mmap is written back by a process that stays in the home."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest
import trio
from mounts import Home
from watchdog.events import FileOpenedEvent, FileSystemEventHandler
from watchdog.observers import Observer

from agentfuse.door.doors import Doors
from agentfuse.home.quota import Ledger
from agentfuse.regions import DEFAULT_REGIONS

pytestmark = pytest.mark.mount


def write_back(home: Home, paths: list[bytes]) -> None:
    doors = Doors(home.path, None, Ledger(DEFAULT_REGIONS))
    doors.device = home.path.stat().st_dev
    trio.run(doors.write_back, paths)


class Opened(FileSystemEventHandler):
    def __init__(self) -> None:
        self.paths: list[str] = []
        self.heard = threading.Event()

    def on_opened(self, event: FileOpenedEvent) -> None:  # type: ignore[override]
        self.paths.append(os.fsdecode(event.src_path))
        self.heard.set()


def test_mapped_pages_reach_the_disk(home: Home) -> None:
    path = home.path / "workspace" / "mapped"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as mapped:
        mapped[:4] = b"here"
        write_back(home, [b"workspace/mapped"])
        assert (home.tree / "workspace" / "mapped").read_bytes()[:4] == b"here"


def test_a_symlink_in_the_place_of_a_directory_leads_nowhere(home: Home, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("outside")
    (home.path / "workspace" / "inside").write_text("inside")
    (home.path / "workspace" / "swapped").symlink_to(tmp_path)
    (home.path / "workspace" / "link").symlink_to(tmp_path / "target")
    os.mkfifo(home.path / "workspace" / "pipe")
    opened, observer = Opened(), Observer()
    observer.schedule(opened, str(tmp_path), event_filter=[FileOpenedEvent])
    observer.start()
    try:
        paths = [b"workspace/swapped/target", b"workspace/link", b"workspace/pipe", b"workspace/gone"]
        write_back(home, [*paths, b"workspace/inside"])
        (tmp_path / "end").write_text("")
        while str(tmp_path / "end") not in opened.paths:
            assert opened.heard.wait(10)
            opened.heard.clear()
        assert str(tmp_path / "target") not in opened.paths
    finally:
        observer.stop()
        observer.join()
