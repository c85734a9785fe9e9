"""The daemon's side of its doors: it asks them to write into its own mount, and waits on trio.

A thread of the daemon that waited for its own mount could not be killed, nor the daemon with it. What a
door makes is seen by inotify and held by quotas like everybody's. Knows no FUSE.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from array import array
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import trio

from agentfuse.door import worker
from agentfuse.errors import (
    AgentfuseError,
    BusyError,
    EnvironmentProblem,
    ExistsError,
    FrozenError,
    NotEmptyError,
    NotFoundError,
    QuotaExceededError,
    UsageError,
    WrongTypeError,
)
from agentfuse.home.creators import Creator
from agentfuse.home.quota import Account, Ledger
from agentfuse.home.walk import require_names

MAX_DOORS = 4
_PATH_MAX = 4096
_ANSWER_BYTES = 64 * 1024
_BREAK_OFF_S = 1.0
_TOGETHER_BYTES = 8 * 1024 * 1024
_RESTS_S = 5.0
"""So long is a door kept that nobody needs: a home at rest is one process."""

_Content = AsyncIterable[bytes] | int
"""What comes in pieces, or the descriptor of a file."""

OnCollision = Literal["replace", "refuse", "number"]
"""When the name is taken: what has it is replaced, or stays and the new one is refused, or gets a number."""


class Put(NamedTuple):
    """A file that was put: its path in the region, and its length."""

    path: bytes
    size_bytes: int


class Part(NamedTuple):
    """A file to be made of so many bytes of a descriptor: its path in the region, and its mode."""

    path: bytes
    offset: int
    size_bytes: int
    mode: int


class _Door:
    """One process, that does one thing at a time."""

    def __init__(self, process: subprocess.Popen[bytes], channel: trio.socket.SocketType) -> None:
        self.process = process
        self.channel = channel

    async def ask(self, command: dict[str, Any], content: _Content | None) -> dict[str, Any]:
        """Have a command done; ``content`` comes in pieces, or is a file's descriptor."""
        packet = json.dumps(command).encode()
        if isinstance(content, int):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [content]).tobytes())]
            await self.channel.sendmsg([packet], rights)
        else:
            await self.channel.send(packet)
        if content is not None and not isinstance(content, int):
            await self._send(content)
        answer = await self.channel.recv(_ANSWER_BYTES)
        if not answer:
            raise ConnectionResetError
        done: dict[str, Any] = json.loads(answer)
        return done

    async def _send(self, content: AsyncIterable[bytes]) -> None:
        try:
            async for piece in content:
                for begin in range(0, len(piece), worker.PACKET):
                    await self.channel.send(b"D" + piece[begin : begin + worker.PACKET])
            await self.channel.send(b"E")
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _BREAK_OFF_S), _left():
                await self.channel.send(b"A")
                await self.channel.recv(_ANSWER_BYTES)
            raise

    def close(self) -> None:
        """It ends by itself when the channel is closed; but then it may wait for us, who are ending."""
        self.channel.close()
        self.process.kill()


class Doors:
    """All doors of one mount, made when they are needed. The trio thread's.

    ``device``: the mount's, to be set once it is mounted: a door goes nowhere else. ``owner``: uid and gid of
    whom it makes things for, None: ourselves. Every method raises an AgentfuseError; paths are relative to
    the region, and no name in them is empty, ``.`` or ``..``.
    """

    def __init__(self, mountpoint: Path, owner: tuple[int, int] | None, ledger: Ledger) -> None:
        self.device = 0
        self._mountpoint = mountpoint
        self._owner = None if owner is None else list(owner)
        self._ledger = ledger
        self._idle: list[_Door] = []
        self._working: dict[int, Creator] = {}
        self._open = trio.CapacityLimiter(MAX_DOORS)
        self._processes = trio.CapacityLimiter(2 * MAX_DOORS)  # that begin or end just now
        self._closers = 0
        self._under_way: set[trio.CancelScope] = set()
        self._none_under_way = trio.Event()
        self._left: set[int] = set()
        self._used = trio.Event()

    async def run(self) -> None:
        """End the door that nobody needs any more, each time, until cancelled."""
        while True:
            await self._used.wait()
            self._used = trio.Event()
            with trio.move_on_after(_RESTS_S) as resting:
                await self._used.wait()
            if resting.cancelled_caught and self._idle:
                await self._end(self._idle.pop())

    def creator_of(self, pid: int) -> Creator | None:
        """For whom a process works now, if it is a door."""
        return self._working.get(pid)

    async def put(
        self,
        region: str,
        path: bytes,
        content: AsyncIterable[bytes],
        *,
        creator: Creator,
        size: int | None = None,
        on_collision: OnCollision = "replace",
        mode: int = 0o644,
    ) -> Put:
        """Make a file of what comes; it appears whole, under its name, or not at all.

        ``size``: its length in bytes, when it is known: too much is then refused at once, and any other
        length is a ``UsageError``. The directories on the way are made. It is on the local disk then.
        """
        account = self.account(region)
        if on_collision != "replace":
            account.require(size or 0, 0)
        elif size is not None and size > account.bytes_quota:
            raise account.refuse(f"{size} bytes")  # whatever it replaces
        details: dict[str, object] = {"collision": on_collision, "mode": mode, "durable": True}
        return await self._put(region, path, creator, _checked(content, size, account, on_collision), details)

    async def put_fd(
        self,
        region: str,
        path: bytes,
        fd: int,
        *,
        creator: Creator,
        on_collision: OnCollision = "number",
        mode: int = 0o644,
    ) -> Put:
        """Make a file, durably, of one that is open for reading and not in the mount.

        ``BusyError`` when that one changes meanwhile. The descriptor stays the caller's.
        """
        self.account(region).require(os.fstat(fd).st_size, 0)
        details: dict[str, object] = {"collision": on_collision, "mode": mode, "durable": True}
        return await self._put(region, path, creator, fd, details)

    async def put_parts(
        self, region: str, fd: int, parts: Sequence[Part], *, creator: Creator, on_collision: OnCollision
    ) -> AsyncGenerator[list[Put], None]:
        """Make files of parts of one that is open for reading and not in the mount, in their order.

        Each appears whole or not at all, and is on the local disk when it is yielded. What fails leaves those
        before it, and ends it. The descriptor stays the caller's, who has to see that its bytes stay.
        """
        account = self.account(region)
        if on_collision != "replace":
            account.require(sum(part.size_bytes for part in parts), 0)
        for part in parts:
            if part.size_bytes > account.bytes_quota:
                raise account.refuse(f"{part.size_bytes} bytes")  # whatever it replaces
        items = [[self._joined(region, part.path), *part[1:]] for part in parts]
        at = 0
        while at < len(parts):
            some = _together(items, at)
            details = {"files": some, "collision": on_collision, "left": list(self._left)}
            command = {"do": "put parts", "path": some[0][0], "owner": self._owner, **details}
            done = await self._done(command, creator, fd)
            yield [
                Put(_beside(part.path, {"name": name}), size)
                for part, (name, size) in zip(parts[at:], done["files"], strict=False)
            ]
            if "stopped" in done:
                raise _error(done["stopped"], done["at"])
            at += len(some)

    async def append(self, region: str, path: bytes, data: bytes, *, mode: int = 0o644) -> None:
        """Add to the end of a file of the platform's own, which is made when it is missing."""
        await self._ask("append", region, path, Creator.SYSTEM, _once(data), mode=mode)

    async def replace(self, region: str, path: bytes, data: bytes, *, mode: int = 0o644) -> None:
        """Make a file of the platform's own, which is not worth waiting for the disk."""
        details: dict[str, object] = {"collision": "replace", "mode": mode, "durable": False}
        await self._put(region, path, Creator.SYSTEM, _once(data), details)

    async def remove(self, region: str, path: bytes, *, creator: Creator, recursive: bool = False) -> None:
        """Remove a file or a directory, which is empty unless ``recursive``."""
        await self._ask("remove", region, path, creator, recursive=recursive)

    async def move(
        self,
        old: tuple[str, bytes],
        new: tuple[str, bytes],
        *,
        creator: Creator,
        on_collision: OnCollision = "refuse",
    ) -> bytes:
        """Give a file or directory, a (region, path), another name; return the path that it got."""
        to = self._joined(*new)
        done = await self._ask("move", *old, creator, to=to, collision=on_collision)
        return _beside(new[1], done)

    async def copy(
        self,
        old: tuple[str, bytes],
        new: tuple[str, bytes],
        *,
        creator: Creator,
        on_collision: OnCollision = "refuse",
    ) -> bytes:
        """Copy a file, or a directory with all that is in it, to a (region, path); return the path it got.

        It appears whole or not at all; modes are kept, times are not, and each link is a file of its own.
        ``BusyError`` when a file changes meanwhile.
        """
        to = self._joined(*new)
        done = await self._ask("copy", *old, creator, to=to, collision=on_collision)
        return _beside(new[1], done)

    async def mkdir(
        self, region: str, path: bytes, *, creator: Creator, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Make a directory; ``parents``: those that it is in as well."""
        await self._ask("mkdir", region, path, creator, parents=parents, exist_ok=exist_ok)

    async def set_mode(self, region: str, path: bytes, mode: int, *, creator: Creator) -> None:
        """Change the permissions of a file or directory."""
        await self._ask("set mode", region, path, creator, mode=mode)

    async def ping(self) -> None:
        """Return when the mount has answered a request of another process, however many doors are busy."""
        await self._done({"do": "ping", "path": "."}, Creator.SYSTEM, turn=contextlib.nullcontext())

    async def write_back(self, paths: Iterable[bytes]) -> None:
        """Have the kernel send what was changed through mappings of these files, given from the home's root.

        By a door of its own, however many are busy or closed: nothing else may have to wait for that.
        """
        joined = b"\0".join(paths)
        if not joined:
            return
        door = await self._make()
        try:
            done = await door.ask({"do": "write back"}, _once(joined))
        except (OSError, ValueError) as error:
            raise _died("mapped pages") from error
        finally:
            with trio.CancelScope(shield=True):
                await self._end(door)
        if "errno" in done:
            raise _error(done["errno"], "mapped pages")

    @contextlib.asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Break off what is under way and end all doors; nobody gets through until this is left."""
        self._closers += 1
        try:
            while self._under_way:
                for scope in self._under_way:
                    scope.cancel()
                await self._none_under_way.wait()
            while self._idle:
                await self._end(self._idle.pop())
            yield
        finally:
            self._closers -= 1

    async def _put(
        self, region: str, path: bytes, creator: Creator, content: _Content, details: dict[str, object]
    ) -> Put:
        is_fd = isinstance(content, int)
        details = {**details, "from_fd": is_fd, "left": list(self._left)}
        done = await self._ask("put", region, path, creator, content, **details)
        return Put(_beside(path, done), done["size"])

    async def _ask(
        self,
        what: str,
        region: str,
        path: bytes,
        creator: Creator,
        content: _Content | None = None,
        **details: object,
    ) -> dict[str, Any]:
        command = {"do": what, "path": self._joined(region, path), "owner": self._owner, **details}
        return await self._done(command, creator, content)

    async def _done(
        self,
        command: dict[str, Any],
        creator: Creator,
        content: _Content | None = None,
        *,
        turn: contextlib.AbstractAsyncContextManager[None] | None = None,
    ) -> dict[str, Any]:
        with trio.CancelScope() as scope:
            if self._closers:
                raise _unmounting()
            if not self._under_way:
                self._none_under_way = trio.Event()
            self._under_way.add(scope)
            try:
                async with turn or self._open:
                    done = await self._through_a_door(command, creator, content)
                    if "errno" in done:
                        raise _error(done["errno"], command["path"])
                    return done
            finally:
                self._under_way.discard(scope)
                if not self._under_way:
                    self._none_under_way.set()
        raise _unmounting()

    async def _through_a_door(
        self, command: dict[str, Any], creator: Creator, content: _Content | None
    ) -> dict[str, Any]:
        door = await self._idle_one() or await self._make()
        self._working[door.process.pid] = creator
        is_whole = False
        try:
            done = await door.ask(command, content)
            is_whole = True
            if "errno" not in done:
                self._left.difference_update(command.get("left", ()))
        except (OSError, ValueError) as error:
            raise _died(command["path"]) from error
        finally:
            del self._working[door.process.pid]
            if is_whole and not self._idle:
                self._idle.append(door)
                self._used.set()
            else:
                if not is_whole:
                    self._left.add(door.process.pid)
                with trio.CancelScope(shield=True):
                    await self._end(door)
        return done

    async def _idle_one(self) -> _Door | None:
        """One that waits for work, unless it was killed meanwhile."""
        while self._idle:
            door = self._idle.pop()
            if door.process.poll() is None:
                return door
            await self._end(door)
        return None

    def account(self, region: str) -> Account:
        """What a region holds and may hold. Raises ``NotFoundError``."""
        for account in (*self._ledger.accounts(), self._ledger.platform):
            if account.name == region:
                return account
        names = ", ".join(account.name for account in self._ledger.accounts())
        raise NotFoundError(f"there is no region {region!r}", hint=f"there are {names}")

    def _joined(self, region: str, path: bytes) -> str:
        """The path from the home's root."""
        require_names(path)
        if not path:
            raise UsageError("a region's own directory stays where it is", hint="write it like reports/a.csv")
        names = path.split(b"/")
        if self.account(region) is not self._ledger.loose:
            names.insert(0, region.encode())
        elif self._ledger.is_root(names[0]):
            raise UsageError(f"{os.fsdecode(path)!r} is not loose in the home", hint="name its region")
        joined = b"/".join(names)
        if len(joined) >= _PATH_MAX:
            raise UsageError(f"the path has {len(joined)} bytes", hint=f"a path has less than {_PATH_MAX}")
        return joined.decode("utf-8", "surrogateescape")

    async def _make(self) -> _Door:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, contextlib.ExitStack() as undo:
                undo.callback(ours.close)
                command = [
                    *(sys.executable, "-I", "-S", worker.__file__),
                    *(str(theirs.fileno()), str(self._mountpoint), str(self.device)),
                ]
                process = await trio.to_thread.run_sync(
                    _start, command, theirs.fileno(), limiter=self._processes
                )
                undo.pop_all()
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot start a process that writes into the mount: {error.strerror}", hint="try again"
            ) from error
        self._left.discard(process.pid)
        return _Door(process, trio.socket.from_stdlib_socket(ours))

    async def _end(self, door: _Door) -> None:
        door.close()
        await trio.to_thread.run_sync(door.process.wait, abandon_on_cancel=True, limiter=self._processes)


def _start(command: list[str], channel: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[channel],
        cwd="/",
        start_new_session=True,
    )


def _together(items: Sequence[list[Any]], at: int) -> list[list[Any]]:
    """What is made at a time, from there on: one, or a few small ones, whose command fits into a packet."""
    count, size, length = 0, 0, 0
    for item in items[at : at + worker.MOST_PARTS]:
        size += item[2]
        length += len(json.dumps(item))
        if count and (size > _TOGETHER_BYTES or length > worker.PACKET // 2):
            break
        count += 1
    return list(items[at : at + count])


@contextlib.contextmanager
def _left() -> Iterator[None]:
    with contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        yield


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _checked(
    content: AsyncIterable[bytes], size: int | None, account: Account, on_collision: OnCollision
) -> AsyncIterator[bytes]:
    """The content, as long as it is what was announced and the region has room for it."""
    sent = 0
    async for piece in content:
        sent += len(piece)
        if size is not None and sent > size:
            break
        if size is None and on_collision != "replace":
            account.require(sent, 0)
        elif sent > account.bytes_quota:
            raise account.refuse(f"{sent} bytes")
        yield piece
    if size is not None and sent != size:
        than = "more" if sent > size else "fewer"
        raise UsageError(f"the content has {than} bytes than the {size} that were announced")


def _beside(path: bytes, done: dict[str, Any]) -> bytes:
    """The path with the name that it really got."""
    directory, slash, _ = path.rpartition(b"/")
    name: str = done["name"]
    return directory + slash + name.encode("utf-8", "surrogateescape")


def _died(what: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"{what}: the process that writes into the mount has died", hint="try again")


def _unmounting() -> BusyError:
    return BusyError("the home is being unmounted", hint="mount it again")


_MAKE_ROOM = "remove what is not needed, or raise it: agentfuse quota"
_LOOK = "agentfuse ls shows what there is"
_ERRORS: dict[int, tuple[type[AgentfuseError], str, str]] = {
    errno.EDQUOT: (QuotaExceededError, "the quota of its region has no room for it", _MAKE_ROOM),
    errno.ENOENT: (NotFoundError, "there is no such file", _LOOK),
    errno.EEXIST: (
        ExistsError,
        "there is one already",
        "choose another name, or have it replaced or numbered",
    ),
    errno.ENOTCONN: (BusyError, "the home is being unmounted", "mount it again"),
    errno.EBUSY: (
        BusyError,
        "it is in use: still being written, a region's own directory, or a place where something is mounted",
        "wait, or name a file",
    ),
    errno.EPERM: (FrozenError, "it is frozen, or holds what is", "have it thawed first"),
    errno.ENOTDIR: (WrongTypeError, "a directory on the way is not one", _LOOK),
    errno.ELOOP: (WrongTypeError, "a directory on the way is a symbolic link", "name the directory itself"),
    errno.EISDIR: (WrongTypeError, "it is a directory", "name a file in it"),
    errno.ENXIO: (WrongTypeError, "it is neither a file nor a directory", "name one of these"),
    errno.ENOTEMPTY: (NotEmptyError, "the directory is not empty", "remove it with all that is in it"),
    errno.EINVAL: (UsageError, "it cannot be put into itself", "choose another directory"),
    errno.EACCES: (UsageError, "its permissions do not let the daemon at it", "change its mode first"),
    errno.ENOTSUP: (UsageError, "something else is mounted there", "what is mounted there is not the home's"),
    errno.EXDEV: (UsageError, "it has hard links, which do not cross regions", "copy it instead"),
    errno.ENAMETOOLONG: (
        UsageError,
        "a name is longer than 255 bytes, or directories are nested too deeply",
        "choose shorter names",
    ),
}


def _error(code: int, where: str) -> AgentfuseError:
    kind, what, hint = _ERRORS.get(code, (EnvironmentProblem, os.strerror(code), ""))
    return kind(f"{ascii(where)[1:-1]}: {what}", hint=hint)
