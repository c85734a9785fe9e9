"""One FUSE session: from the backing tree to a mounted, served home. pyfuse3 allows one a process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from agentfuse.attribution import CreatorRule
from agentfuse.errors import EnvironmentProblem
from agentfuse.fuse.filesystem import Filesystem
from agentfuse.fuse.inodes import InodeTable
from agentfuse.fuse.names import complete_files
from agentfuse.fuse.operations import Operations
from agentfuse.fuse.tally import Tally
from agentfuse.fuse.tracing import Tracer
from agentfuse.fuse.xattrs import Xattrs
from agentfuse.home.creators import Creator, Creators
from agentfuse.home.frozen import Frozen
from agentfuse.home.observer import Found
from agentfuse.home.quota import Ledger
from agentfuse.home.tree import regular_files
from agentfuse.sync.hydration import Hydration

log = logging.getLogger(__name__)

_READ_AHEAD_KIB = 1024

_OWN_DESCRIPTORS = 1536
"""So many the daemon keeps for itself, whatever agents open: clients, databases, doors, arriving contents."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How to mount. ``extra`` are mount options of libfuse's such as dev, suid.

    ``creator_of``: for whom a process writes, by its number, if it is a door of ours; ``content_of``: what a
    file of the platform's own, by its name, is to hold when it is opened, or None. ``rules`` and
    ``agent_uid``: who makes files, see ``Creators``.
    """

    allow_other: bool
    xattrs: bool
    extra: tuple[str, ...]
    creator_of: Callable[[int], Creator | None]
    content_of: Callable[[bytes], bytes | None]
    rules: tuple[CreatorRule, ...] = ()
    agent_uid: int | None = None


class Session:
    """A mounted home. Make it with ``mounted``; run it once; stop it from the trio thread.

    ``tracer`` tells of its requests; ``ended``: it answers none any more.
    """

    def __init__(
        self, tree: Path, ledger: Ledger, hydration: Hydration, frozen: Frozen, options: SessionOptions
    ) -> None:
        self.ledger = ledger
        self.ready = trio.Event()
        self.ended = trio.Event()
        self._options = options
        self._closed = False
        self._root_fd = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        directories = max(16, descriptors // 4)
        self._inodes = InodeTable(self._root_fd, ledger.loose, max_directory_fds=directories)
        self._filesystem = Filesystem(
            self._inodes,
            ledger,
            hydration.absent,
            Creators(options.rules, options.creator_of, agent_uid=options.agent_uid),
            frozen,
            gives_away=os.geteuid() == 0,
            allow_devices="dev" in options.extra,
            max_files=max(16, descriptors - directories - min(_OWN_DESCRIPTORS, descriptors // 4)),
        )
        self._operations = Operations(
            self._filesystem,
            Xattrs(self._inodes, enabled=options.xattrs),
            hydration,
            on_init=self.ready.set,
            free_bytes=self._free_bytes,
            creator_of=options.creator_of,
            content_of=options.content_of,
        )
        self.tracer = Tracer(self._operations, self._region_of)
        hydration.passed = self._operations.gate.passed
        hydration.absent.on_here = self._tell_anew

    def fuse_options(self) -> set[str]:
        """The options handed to libfuse. nosuid and nodev are its defaults."""
        wanted = {"fsname=agentfuse", "subtype=agentfuse", "default_permissions", *self._options.extra}
        return wanted | {"allow_other"} if self._options.allow_other else wanted

    @property
    def operations(self) -> Operations:
        """The handlers."""
        return self._operations

    async def run(self) -> None:
        """Answer the kernel until the home is unmounted or ``stop`` is called."""
        try:
            await pyfuse3.main(min_tasks=1, max_tasks=256)
        except* ConnectionAbortedError:
            # How the kernel ends a connection that was aborted, or unmounted while a request was being read.
            log.warning("the kernel has ended the connection")
        finally:
            self.ended.set()

    def written(self) -> list[bytes]:
        """Paths below the mountpoint of the files that are open for writing."""
        return self._filesystem.content.written()

    def is_written(self, ino: int) -> bool:
        """Whether somebody has a file open for writing, given by its inode's number."""
        inode = self._inodes.find(ino)
        return inode is not None and inode.file is not None and inode.file.writers > 0

    def unfinished(self) -> set[int]:
        """The numbers of the inodes that are being written."""
        return self._filesystem.content.unfinished()

    def booked(self) -> dict[str, tuple[int, int]]:
        """(bytes, files) that the names in each region are charged with; what is open without one is not."""
        booked = {each.name: [each.bytes_used, each.files_used] for each in self.ledger.accounts()}
        for file in self._filesystem.content.nameless():
            account = booked[file.inode.account.name]
            account[0] -= file.size
            account[1] -= 1
        return {name: (account[0], account[1]) for name, account in booked.items()}

    def still(self) -> contextlib.AbstractContextManager[None]:
        """While it is held nothing in the home changes: who wants to change something waits."""
        return self._operations.gate.closed()

    def stop(self) -> None:
        """Stop answering: whoever still holds files of the home gets ENOTCONN. Late calls do nothing."""
        if not self._closed:  # libfuse would touch a session that is freed
            pyfuse3.terminate()

    @property
    def tally(self) -> Tally:
        """What was asked, and how it went."""
        return self._operations.tally

    @property
    def inodes_known(self) -> int:
        """How many inodes the kernel knows."""
        return len(self._inodes)

    @property
    def handles_open(self) -> int:
        """How many files are open."""
        return self._filesystem.content.open_count()

    def files_of(self, region: str) -> Found:
        """The regular files of a region, by their paths in it. Walks it, so nothing changes meanwhile.

        Raises ``OSError`` when the session has ended.
        """
        if self._closed:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        found = complete_files(self._inodes, regular_files(self._root_fd, region.encode()))
        return [(path[len(region) + 1 :], st) for path, st in found]

    def as_dict(self) -> dict[str, object]:
        """``{requests: {operation: count}, inodes_known, handles_open, traced}``: the last, who listens."""
        return {
            "requests": dict(self._operations.tally.requests),
            "inodes_known": self.inodes_known,
            "handles_open": self.handles_open,
            "traced": self.tracer.listeners,
        }

    def disconnect(self) -> None:
        """Close the connection to the kernel."""
        self._closed = True
        pyfuse3.close(unmount=False)

    def close(self) -> None:
        """Close all backing descriptors."""
        self._filesystem.content.close()
        self._inodes.close()

    def _tell_anew(self, ino: int) -> None:
        inode = self._inodes.find(ino)
        if inode is not None:
            inode.answer = None

    def _region_of(self, path: bytes) -> str:
        return self.ledger.of_root_entry(path.partition(b"/")[0]).name

    def _free_bytes(self) -> int:
        disk = os.fstatvfs(self._root_fd)
        return disk.f_bavail * disk.f_frsize


@contextlib.contextmanager
def mounted(
    tree: Path,
    target: str,
    ledger: Ledger,
    hydration: Hydration,
    options: SessionOptions,
    *,
    frozen: Frozen | None = None,
) -> Iterator[Session]:
    """Mount ``tree`` at ``target``; on leaving, the connection to the kernel is closed.

    ``target`` is a mountpoint, or ``/dev/fd/N`` for a descriptor of /dev/fuse that somebody has mounted.
    ``hydration`` brings what is absent from the tree. What is ``frozen`` there stays as it is. Unmounting
    is the caller's: what is found at the path then may be somebody else's mount. Raises
    ``EnvironmentProblem`` when the kernel or fusermount3 refuses.
    """
    session = Session(tree, ledger, hydration, frozen or Frozen(), options)
    try:
        try:
            pyfuse3.init(session.operations, target, session.fuse_options())
        except RuntimeError as error:
            raise EnvironmentProblem(
                f"the kernel refused the mount at {target} ({error})",
                hint="mounting needs root (CAP_SYS_ADMIN) or fusermount3; see `agentfuse doctor`",
            ) from error
        try:
            yield session
        finally:
            session.disconnect()
    finally:
        session.close()


def widen_read_ahead(minor: int) -> None:
    """Let the kernel read ahead as much as one request carries; only root may, and nothing depends on it."""
    with contextlib.suppress(OSError):
        Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb").write_text(f"{_READ_AHEAD_KIB}\n")
