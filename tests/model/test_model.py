"""Random operations on a mount against an oracle: a plain directory, plus the quota's arithmetic.

A command that the oracle refuses must be refused by the mount with the same errno; one that the oracle
could do but the quota has no room for must fail on the mount and change nothing. A crash of the daemon
and a remount are commands as well. AGENTFUSE_MODEL_EXAMPLES makes it look longer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import invariants
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mounts import PLAIN, Home
from syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

BYTES = 6000
FILES = 9
QUOTAS = {"shared": (BYTES, FILES), "workspace": (BYTES, FILES), "home": (BYTES, FILES)}
EXAMPLES = int(os.environ.get("AGENTFUSE_MODEL_EXAMPLES", "300"))

PREFIXES = ("shared/", "workspace/", ".")
NAMES = ("a", "b", "d", "d/a", "d/b", "d/e", "d/e/a")
paths = st.builds(lambda prefix, name: prefix + name, st.sampled_from(PREFIXES), st.sampled_from(NAMES))
sizes = st.sampled_from([0, 1, 10, 100, 2000, 4096, 5999, 6000, 6001, 9000])
offsets = st.sampled_from([0, 0, 1, 50, 1999, 4096, 5990, 7000])
numbers = st.integers(0, 3)
creations = st.sampled_from([0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_CREAT | os.O_APPEND])


@dataclass
class Handle:
    """One open file: on the mount, on the oracle, and the region it is charged to."""

    real: int
    model: int
    writable: bool


def region_of(path: str) -> str:
    """The region that a path belongs to."""
    return path.partition("/")[0] if path.startswith(("shared/", "workspace/")) else "home"


class Machine(RuleBasedStateMachine):
    """One random life of a home."""

    home: Home
    oracle: Path

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Handle] = []
        self.unlinked: dict[tuple[int, int], str] = {}  # oracle inode without a name -> its region
        self.crashes = 0

    @initialize()
    def start_empty(self) -> None:
        for root in (self.home.path, self.oracle):
            for region in ("shared", "workspace"):
                (root / region).mkdir(exist_ok=True)

    # What the quota has room for ---------------------------------------------------------------------

    def usage(self, region: str) -> tuple[int, int]:
        """(bytes, files) charged to a region, computed from the oracle."""
        truth = invariants.truth_of(self.oracle, ("shared", "workspace"))[region]
        size, files = truth.bytes_used, truth.files_used
        for handle in {self.identity(h): h for h in self.handles}.values():
            if self.unlinked.get(self.identity(handle)) == region:
                size += os.fstat(handle.model).st_size
                files += 1
        return size, files

    def identity(self, handle: Handle) -> tuple[int, int]:
        found = os.fstat(handle.model)
        return found.st_dev, found.st_ino

    def names(self) -> dict[tuple[int, int], str]:
        """Every inode of the oracle that has a name, and its region."""
        found = {}
        for path in invariants.walk(os.fsencode(self.oracle)):
            status = os.lstat(path)
            relative = os.fsdecode(path)[len(str(self.oracle)) + 1 :]
            found[(status.st_dev, status.st_ino)] = region_of(relative)
        return found

    def does(self, action: Callable[[Path], object], *, fits: bool = True) -> None:
        """Do it on both sides and compare the outcome; without room it must fail on the mount."""
        before = self.names()
        if not fits and not PLAIN:
            with pytest.raises(OSError):
                action(self.home.path)
            return
        outcomes = []
        for root in (self.oracle, self.home.path):
            try:
                result = action(root)
                outcomes.append("done" if result is None else result)
            except OSError as error:
                outcomes.append(errno.errorcode[error.errno or 0])
        assert outcomes[0] == outcomes[1], f"oracle: {outcomes[0]}, mount: {outcomes[1]}"
        after = self.names()
        for handle in self.handles:
            inode = self.identity(handle)
            if inode in before and inode not in after:
                self.unlinked[inode] = before[inode]

    def room(self, path: str) -> tuple[int, int]:
        """(bytes, files) that still fit where a path would be."""
        size, files = self.usage(region_of(path))
        return BYTES - size, FILES - files

    # Names ---------------------------------------------------------------------------------------------

    @rule(path=paths)
    def mkdir(self, path: str) -> None:
        self.does(lambda root: os.mkdir(root / path), fits=self.room(path)[1] > 0)

    @rule(path=paths)
    def symlink(self, path: str) -> None:
        self.does(lambda root: os.symlink("target", root / path), fits=self.room(path)[1] > 0)

    @rule(path=paths)
    def mkfifo(self, path: str) -> None:
        self.does(lambda root: os.mkfifo(root / path), fits=self.room(path)[1] > 0)

    @rule(path=paths)
    def unlink(self, path: str) -> None:
        self.does(lambda root: os.unlink(root / path))

    @rule(path=paths)
    def rmdir(self, path: str) -> None:
        self.does(lambda root: os.rmdir(root / path))

    @rule(source=paths, to=paths)
    def link(self, source: str, to: str) -> None:
        if region_of(source) != region_of(to) and not PLAIN:
            with pytest.raises(OSError):
                os.link(self.home.path / source, self.home.path / to, follow_symlinks=False)
            return
        self.does(lambda root: os.link(root / source, root / to, follow_symlinks=False))

    @rule(source=paths, to=paths)
    def rename(self, source: str, to: str) -> None:
        self.rename_with(source, to, 0)

    @rule(source=paths, to=paths)
    def rename_noreplace(self, source: str, to: str) -> None:
        self.rename_with(source, to, RENAME_NOREPLACE)

    @rule(source=paths, to=paths)
    def exchange(self, source: str, to: str) -> None:
        self.rename_with(source, to, RENAME_EXCHANGE)

    def rename_with(self, source: str, target: str, flags: int) -> None:
        fits = self.rename_fits(source, target, exchange=flags == RENAME_EXCHANGE)
        self.does(lambda root: renameat2(root / source, root / target, flags), fits=fits)

    def rename_fits(self, source: str, target: str, *, exchange: bool) -> bool:
        if region_of(source) == region_of(target):
            return True
        if not os.path.lexists(self.oracle / source):
            return True
        there, back = self.weight(source), self.weight(target)
        if there is None or (exchange and back is None):
            return False  # a hard link would cross regions: EXDEV
        room_bytes, room_files = self.room(target)
        if exchange:
            assert back is not None
            there_room = self.room(source)
            return (
                self.is_room((there[0] - back[0], there[1] - back[1]), (room_bytes, room_files))
                and self.is_room((back[0] - there[0], back[1] - there[1]), there_room)
            )  # fmt: skip
        freed = self.freed_by_replacing(target)
        return self.is_room((there[0] - freed[0], there[1] - freed[1]), (room_bytes, room_files))

    @staticmethod
    def is_room(wanted: tuple[int, int], room: tuple[int, int]) -> bool:
        return all(want <= 0 or want <= left for want, left in zip(wanted, room, strict=True))

    def weight(self, path: str) -> tuple[int, int] | None:
        """(bytes, files) of a subtree; None when hard links lead out of it."""
        top = os.fsencode(self.oracle / path)
        if not os.path.lexists(top):
            return 0, 0
        truth = invariants.Truth()
        found: dict[tuple[int, int], list[int]] = {}
        for each in (top, *invariants.walk(top)):
            status = os.lstat(each)
            truth.add(status)
            if not stat.S_ISDIR(status.st_mode):
                found.setdefault((status.st_dev, status.st_ino), []).append(status.st_nlink)
        if any(len(counts) != counts[0] for counts in found.values()):
            return None
        return truth.bytes_used, truth.files_used

    def freed_by_replacing(self, target: str) -> tuple[int, int]:
        path = self.oracle / target
        if not os.path.lexists(path):
            return 0, 0
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            return 0, 1
        is_open = any(self.identity(h) == (status.st_dev, status.st_ino) for h in self.handles)
        if status.st_nlink > 1 or is_open:
            return 0, 0
        return (status.st_size if stat.S_ISREG(status.st_mode) else 0), 1

    # Attributes ----------------------------------------------------------------------------------------

    # Without set-id bits: a write by root keeps them on the oracle, and drops them on the mount.
    @rule(path=paths, mode=st.sampled_from([0o600, 0o644, 0o755, 0o1755]))
    def chmod(self, path: str, mode: int) -> None:
        self.does(lambda root: os.chmod(root / path, mode))

    @rule(path=paths, seconds=st.integers(0, 2_000_000_000))
    def utime(self, path: str, seconds: int) -> None:
        self.does(lambda root: os.utime(root / path, (seconds, seconds), follow_symlinks=False))

    @rule(path=paths, size=sizes)
    def truncate(self, path: str, size: int) -> None:
        try:
            more = size - (self.oracle / path).stat().st_size
        except OSError:
            more = 0
        self.does(lambda root: os.truncate(root / path, size), fits=more <= 0 or more <= self.room(path)[0])

    # Open files ----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.handles) < 4)
    @rule(path=paths, flags=st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR]), extra=creations)
    def open(self, path: str, flags: int, extra: int) -> None:
        if flags == os.O_RDONLY:
            extra &= ~os.O_TRUNC
        creates = bool(extra & os.O_CREAT) and not os.path.lexists(self.oracle / path)
        opened: dict[Path, int] = {}

        def act(root: Path) -> None:
            opened[root] = os.open(root / path, flags | extra | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)

        self.does(act, fits=not creates or self.room(path)[1] > 0)
        if len(opened) == 2:
            pair = Handle(opened[self.home.path], opened[self.oracle], flags != os.O_RDONLY)
            if stat.S_ISREG(os.fstat(pair.model).st_mode):
                self.handles.append(pair)
            else:
                os.close(pair.real)
                os.close(pair.model)

    @precondition(lambda self: self.handles)
    @rule(number=numbers, offset=offsets, size=sizes, byte=st.integers(1, 255))
    def write(self, number: int, offset: int, size: int, byte: int) -> None:
        handle = self.handles[number % len(self.handles)]
        if not handle.writable:
            for side in (handle.real, handle.model):
                with pytest.raises(OSError):
                    os.pwrite(side, b"x", 0)
            return
        before = os.fstat(handle.model).st_size
        region = self.unlinked.get(self.identity(handle)) or self.names()[self.identity(handle)]
        if fcntl.fcntl(handle.model, fcntl.F_GETFL) & os.O_APPEND:
            offset = before
        data = bytes([byte]) * size
        limit = before + BYTES - self.usage(region)[0]
        if not PLAIN and size and offset + size > before:
            data = data[: max(0, limit - offset)]
            if not data:
                with pytest.raises(OSError) as refused:
                    os.pwrite(handle.real, b"x" * size, offset)
                assert refused.value.errno == errno.EDQUOT
                return
        written = os.pwrite(handle.real, bytes([byte]) * size, offset)
        assert written == len(data), "not exactly what fits was written"
        os.pwrite(handle.model, data, offset)

    @precondition(lambda self: self.handles)
    @rule(number=numbers, size=sizes)
    def ftruncate(self, number: int, size: int) -> None:
        handle = self.handles[number % len(self.handles)]
        region = self.unlinked.get(self.identity(handle)) or self.names()[self.identity(handle)]
        more = size - os.fstat(handle.model).st_size
        fits = more <= 0 or more <= BYTES - self.usage(region)[0]
        sides = {self.oracle: handle.model, self.home.path: handle.real}
        self.does(lambda root: os.ftruncate(sides[root], size), fits=fits or not handle.writable)

    @precondition(lambda self: self.handles)
    @rule(number=numbers, offset=offsets)
    def read(self, number: int, offset: int) -> None:
        handle = self.handles[number % len(self.handles)]
        sides = {self.oracle: handle.model, self.home.path: handle.real}
        self.does(lambda root: os.pread(sides[root], 10_000, offset))

    @precondition(lambda self: self.handles)
    @rule(number=numbers)
    def fstat(self, number: int) -> None:
        handle = self.handles[number % len(self.handles)]
        real, model = os.fstat(handle.real), os.fstat(handle.model)
        assert (real.st_size, real.st_nlink, real.st_mode) == (model.st_size, model.st_nlink, model.st_mode)

    @precondition(lambda self: self.handles)
    @rule(number=numbers)
    def close(self, number: int) -> None:
        handle = self.handles.pop(number % len(self.handles))
        os.close(handle.real)
        os.close(handle.model)

    @rule(path=paths)
    def listdir(self, path: str) -> None:
        self.does(lambda root: sorted(os.listdir(root / path)))

    # The daemon ----------------------------------------------------------------------------------------

    @precondition(lambda self: not PLAIN and self.crashes < 1 and len(self.names()) > 6)
    @rule()
    def crash_and_remount(self) -> None:
        self.crashes += 1
        self.home.kill()
        for handle in self.handles:
            with contextlib.suppress(OSError):
                os.close(handle.real)
            os.close(handle.model)
        self.handles.clear()
        self.unlinked.clear()
        self.home.start()

    def teardown(self) -> None:
        for handle in self.handles:
            os.close(handle.real)
            os.close(handle.model)
        try:
            invariants.check(self.home)
            found = invariants.differences(self.look(self.oracle), self.look(self.home.path))
            assert not found, "oracle and mount differ:\n" + "\n".join(found)
        finally:  # the next life starts empty, whatever became of this one
            for root in (self.oracle, self.home.path):
                empty(root)
        if not PLAIN:
            for region in QUOTAS:
                assert self.home.usage(region) == (0, 0), f"{region} is empty, but charged"

    @staticmethod
    def look(root: Path) -> dict[bytes, tuple[object, ...]]:
        """A picture without the times, which two trees cannot share, and without the other regions."""
        seen = {}
        for path, (mode, nlink, size, _, owner, content) in invariants.picture(root).items():
            is_region = path in {b"shared", b"workspace", b"downloads", b"uploads", b"debug"}
            if not is_region and path.split(b"/")[0] != b".agentfuse":
                seen[path] = (mode, nlink, size, owner, content)
        return seen


def empty(root: Path) -> None:
    """Remove everything that the machine made."""
    for top in (root / "shared", root / "workspace", root):
        for entry in list(os.scandir(top)):
            if top == root and (entry.name == ".agentfuse" or not entry.name.startswith(".")):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


@pytest.fixture
def mounted(new_home: Callable[..., Home]) -> Iterator[Home]:
    home = new_home(regions=QUOTAS)
    home.start()
    yield home
    home.umount()


@pytest.mark.timeout(1200)
def test_any_sequence_of_operations_does_what_a_plain_directory_does(mounted: Home, scratch: Path) -> None:
    class Life(Machine):
        home = mounted
        oracle = scratch

    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=60,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
