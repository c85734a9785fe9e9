"""What a door does: one command after another, on the mount, in a process of its own.

Run as a script with ``-I -S``, so it knows the standard library only, and starts in some ten milliseconds.
Its socket (SOCK_SEQPACKET) brings JSON, or content behind ``D``, its end ``E``, or ``A`` to break off; it
answers each command with one packet of JSON. Keeps no descriptor of the mount between two commands, so it
is never in the way of an unmount. Never follows a symlink below the mountpoint.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

PACKET = 64 * 1024
"""Most content in one packet."""

INCOMING = (b".agentfuse", b"incoming")
"""Where contents grow until they are whole: the agent cannot get there, and no region pays."""

MOST_PARTS = 16
"""So many files are made of one descriptor at a time: their contents are synced together."""

_MOST_NUMBERS = 10_000
_MOST_LEVELS = 100
_COPIES = 3
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class _At(NamedTuple):
    """A name in an open directory."""

    fd: int
    name: bytes


class _BrokenOff(Exception):  # noqa: N818  # not an error: whoever sent the content gave up
    pass


class Worker:
    """One door. ``mountpoint`` is followed to the mount with the number ``device``, or not at all."""

    def __init__(self, channel: socket.socket, mountpoint: bytes, device: int) -> None:
        self._channel = channel
        self._mountpoint = mountpoint
        self._device = device
        self._fds: list[int] = []

    def serve(self) -> None:
        """Do what is asked until the daemon is gone."""
        while True:
            data, ancillary, _, _ = self._channel.recvmsg(PACKET + 1, socket.CMSG_SPACE(4))
            if not data:
                return
            self._fds = [fd for _, _, each in ancillary for fd in array.array("i", each)]
            if data[:1] in {b"D", b"E", b"A"}:
                continue  # the rest of what was broken off here
            try:
                answer = self._do(json.loads(data))
            except OSError as error:
                answer = {"errno": error.errno or errno.EIO}
            except _BrokenOff:
                answer = {"errno": errno.ECANCELED}
            except (RecursionError, ValueError):
                answer = {"errno": errno.ENAMETOOLONG}
            finally:
                for fd in self._fds:
                    os.close(fd)
            self._channel.send(json.dumps(answer).encode())

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        owner: list[int] | None = command.get("owner")
        with self._root() as root:
            match command["do"]:
                case "put":
                    return self._put(root, command, owner)
                case "put parts":
                    return self._put_parts(root, command, owner)
                case "append":
                    return self._append(root, command)
                case "move":
                    with (
                        _source(root, command) as (old_fd, old),
                        _parent(root, command["to"], owner=owner, makes=True) as (new_fd, new),
                    ):
                        return {"name": _text(_place(old_fd, old, new_fd, new, command["collision"]))}
                case "copy":
                    return self._copy(root, command, owner)
                case "mkdir":
                    with _parent(root, command["path"], owner=owner, makes=command["parents"]) as (fd, name):
                        _make_directory(fd, name, owner, exist_ok=command["exist_ok"])
                case "set mode":
                    with _source(root, command) as (fd, name):
                        _set_mode(fd, name, command["mode"])
                case "ping":
                    os.fstatvfs(root)  # the kernel keeps no answer to it
                case "write back":
                    self._write_back(root)
                case "remove":
                    path = command["path"].encode("utf-8", "surrogateescape")
                    with _source(root, command) as (fd, name), _directory(root, INCOMING) as incoming:
                        if command["recursive"]:
                            _require_no_mount(os.path.join(os.path.realpath(self._mountpoint), path))
                        _remove(fd, name, incoming if command["recursive"] else None)
        return {}

    @contextlib.contextmanager
    def _root(self) -> Iterator[int]:
        fd = os.open(self._mountpoint, _DIRECTORY)
        try:
            if os.fstat(fd).st_dev != self._device:
                raise OSError(errno.ENOTCONN, "not mounted any more")
            yield fd
        finally:
            os.close(fd)

    def _put(self, root: int, command: dict[str, Any], owner: list[int] | None) -> dict[str, Any]:
        with contextlib.ExitStack() as closing:
            incoming = closing.enter_context(_directory(root, INCOMING))
            _remove_left(incoming, command["left"])
            fd, name = closing.enter_context(_parent(root, command["path"], owner=owner, makes=True))
            own = b"%d" % os.getpid()
            content = os.open(own, _NEW, 0o600, dir_fd=incoming)
            try:
                try:
                    self._receive(content, from_fd=command["from_fd"])
                    if owner:
                        os.fchown(content, *owner)
                    os.fchmod(content, command["mode"])
                    if command["durable"]:
                        os.fsync(content)
                    size_bytes = os.fstat(content).st_size
                finally:
                    os.close(content)  # before it gets its name: nobody writes it any more
                placed = _place(incoming, own, fd, name, command["collision"])
            except BaseException:
                os.unlink(own, dir_fd=incoming)
                raise
            if command["durable"]:
                os.fsync(fd)
        return {"name": _text(placed), "size": size_bytes}

    def _put_parts(self, root: int, command: dict[str, Any], owner: list[int] | None) -> dict[str, Any]:
        """Make files of parts of the descriptor that came along, in their order, up to the first that fails.

        All contents are on the disk before any of them gets its name.
        """
        done: list[tuple[str, int]] = []
        with _directory(root, INCOMING) as incoming, contextlib.ExitStack() as undo:
            _remove_left(incoming, command["left"])
            contents = self._contents(incoming, command["files"], owner, undo)
            parents: dict[str, int] = {}
            for own, (path, _, size, _) in zip(contents, command["files"], strict=True):
                directory, slash, name = path.rpartition("/")
                try:
                    if directory not in parents:
                        parent = _parent(root, directory + slash + name, owner=owner, makes=True)
                        parents[directory] = undo.enter_context(parent)[0]
                    placed = _place(
                        incoming, own, parents[directory], os.fsencode(name), command["collision"]
                    )
                except OSError as error:
                    for fd in parents.values():
                        os.fsync(fd)
                    return {"files": done, "stopped": error.errno or errno.EIO, "at": path}
                done.append((_text(placed), size))
            for fd in parents.values():
                os.fsync(fd)
        return {"files": done}

    def _contents(
        self, incoming: int, files: list[Any], owner: list[int] | None, undo: contextlib.ExitStack
    ) -> list[bytes]:
        """What the contents are called, which ``undo`` removes unless they have another name by then."""
        names = [b"%d-%d" % (os.getpid(), number) for number in range(len(files))]
        fds: list[int] = []
        try:
            for name, (_, offset, size, mode) in zip(names, files, strict=True):
                undo.callback(_remove_own, incoming, name)
                _remove_own(incoming, name)  # of a door that had our pid
                fds.append(os.open(name, _NEW, 0o600, dir_fd=incoming))
                _copy_part(self._fds[0], fds[-1], offset, size)
                if owner:
                    os.fchown(fds[-1], *owner)
                os.fchmod(fds[-1], mode)
            _sync(fds)
        finally:
            for fd in fds:
                os.close(fd)
        return names

    def _copy(self, root: int, command: dict[str, Any], owner: list[int] | None) -> dict[str, Any]:
        own = b"%d-%d" % (os.getpid(), time.monotonic_ns())
        with (
            _source(root, command) as (old_fd, old),
            _parent(root, command["to"], owner=owner, makes=True) as (fd, name),
            _directory(root, INCOMING) as incoming,
        ):
            if command["collision"] == "refuse":  # before anything is read
                with contextlib.suppress(FileNotFoundError):
                    os.stat(name, dir_fd=fd, follow_symlinks=False)
                    raise OSError(errno.EEXIST, "the name is taken")
            try:
                _copy_into(_At(old_fd, old), _At(incoming, own), owner)
                placed = _place(incoming, own, fd, name, command["collision"])
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    _remove_whole(incoming, own)
                raise
            os.fsync(fd)
        return {"name": _text(placed)}

    def _append(self, root: int, command: dict[str, Any]) -> dict[str, Any]:
        with _parent(root, command["path"]) as (directory, name):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, command["mode"], dir_fd=directory)
            before = os.fstat(fd).st_size
            try:
                self._receive(fd, from_fd=False)
            except BaseException:
                os.ftruncate(fd, before)  # whole lines or none
                raise
            finally:
                os.close(fd)
        return {}

    def _receive(self, fd: int, *, from_fd: bool) -> None:
        if from_fd:
            _copy(self._fds[0], fd)
            return
        for piece in self._pieces():
            _write(fd, piece)

    def _pieces(self) -> Iterator[memoryview]:
        while (data := self._channel.recv(PACKET + 1))[:1] == b"D":
            yield memoryview(data)[1:]
        if data != b"E":
            raise _BrokenOff

    def _write_back(self, root: int) -> None:
        """Have the kernel send what was changed through mappings of the files whose paths come.

        syncfs would send it, too, but of FUSE it does not wait until it has arrived; fsync of each file does.
        """
        problem: OSError | None = None
        for path in b"".join(self._pieces()).split(b"\0"):
            try:
                fd = _regular_file(root, path)
            except OSError:
                continue  # it is gone, or something else by now
            try:
                os.fsync(fd)
            except OSError as error:
                problem = error
            finally:
                os.close(fd)
        if problem is not None:
            raise problem


@contextlib.contextmanager
def _directory(
    root: int, names: tuple[bytes, ...], *, owner: list[int] | None = None, makes: bool = False
) -> Iterator[int]:
    """The descriptor of a directory; ``makes``: what is missing on the way is made, and given away."""
    fd = os.open(b".", _DIRECTORY, dir_fd=root)
    try:
        for name in names:
            try:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            except FileNotFoundError:
                if not makes:
                    raise
                with contextlib.suppress(FileExistsError):
                    _mkdir(fd, name, owner)
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
            if os.fstat(fd).st_dev != os.fstat(root).st_dev:
                raise OSError(errno.ENOTSUP, "something else is mounted there")
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _parent(
    root: int, path: str, *, owner: list[int] | None = None, makes: bool = False
) -> Iterator[tuple[int, bytes]]:
    *names, name = path.encode("utf-8", "surrogateescape").split(b"/")
    with _directory(root, tuple(names), owner=owner, makes=makes) as fd:
        yield fd, name


@contextlib.contextmanager
def _source(root: int, command: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
    """Where what a command is about is, and its name there. ``OSError``: there is none, or it is its target's
    directory; then nothing has been made yet.
    """
    path: str = command["path"]
    with contextlib.ExitStack() as stack:
        try:
            fd, name = stack.enter_context(_parent(root, path))
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise FileNotFoundError(errno.ENOENT, "nothing can be there") from error
            raise
        os.stat(name, dir_fd=fd, follow_symlinks=False)
        if command.get("to", "").startswith(path + "/"):
            raise OSError(errno.EINVAL, "it would be in itself")
        yield fd, name


def _regular_file(root: int, path: bytes) -> int:
    """Open a file to read; ``OSError`` for what is none: opening a pipe could wait, a device act."""
    with _parent(root, _text(path)) as (directory, name):
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        st = os.fstat(found)
        if not stat.S_ISREG(st.st_mode) or st.st_dev != os.fstat(root).st_dev:
            raise OSError(errno.EINVAL, "no file of the home's")
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(found)


def _mkdir(fd: int, name: bytes, owner: list[int] | None) -> None:
    os.mkdir(name, 0o755, dir_fd=fd)
    if owner:
        os.chown(name, *owner, dir_fd=fd, follow_symlinks=False)


def _make_directory(fd: int, name: bytes, owner: list[int] | None, *, exist_ok: bool) -> None:
    try:
        _mkdir(fd, name, owner)
    except FileExistsError:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if not exist_ok or not stat.S_ISDIR(found.st_mode):
            raise


def _set_mode(fd: int, name: bytes, mode: int) -> None:
    with _opened(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, fd) as found:
        if stat.S_IFMT(os.fstat(found).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(errno.ENXIO, "neither a file nor a directory")
        os.chmod(f"/proc/self/fd/{found}", mode)


def _copy_into(source: _At, target: _At, owner: list[int] | None, depth: int = 0) -> None:
    """Copy a file, or a directory with all that is in it but sockets and devices; never through a link."""
    found = os.stat(source.name, dir_fd=source.fd, follow_symlinks=False)
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFREG:
        _copy_file(source, target)
    elif kind == stat.S_IFDIR:
        _copy_directory(source, target, owner, depth)
    elif kind == stat.S_IFLNK:
        os.symlink(os.readlink(source.name, dir_fd=source.fd), target.name, dir_fd=target.fd)
    elif kind == stat.S_IFIFO:
        os.mkfifo(target.name, 0o600, dir_fd=target.fd)
    elif depth == 0:
        raise OSError(errno.ENXIO, "neither a file nor a directory")
    else:
        return
    if owner:
        os.chown(target.name, *owner, dir_fd=target.fd, follow_symlinks=False)
    if kind != stat.S_IFLNK:
        mode = stat.S_IMODE(found.st_mode)
        os.chmod(target.name, mode, dir_fd=target.fd)  # after chown, which takes set-id bits


def _copy_directory(source: _At, target: _At, owner: list[int] | None, depth: int) -> None:
    if depth == _MOST_LEVELS:
        raise OSError(errno.ENAMETOOLONG, "directories are nested too deeply")
    os.mkdir(target.name, 0o700, dir_fd=target.fd)
    with (
        _opened(source.name, _DIRECTORY, source.fd) as old,
        _opened(target.name, _DIRECTORY, target.fd) as new,
    ):
        _require_same_mount(old, new)
        for name in map(os.fsencode, os.listdir(old)):
            with contextlib.suppress(FileNotFoundError):  # it is gone again
                _copy_into(_At(old, name), _At(new, name), owner, depth + 1)


def _copy_file(from_: _At, to: _At) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _opened(from_.name, flags, from_.fd) as source, _opened(to.name, _NEW, to.fd, 0o600) as target:
        _require_same_mount(source, target)
        for attempt in range(_COPIES):
            os.ftruncate(target, 0)
            os.lseek(target, 0, os.SEEK_SET)
            try:
                _copy(source, target)
                break
            except OSError as error:
                if error.errno != errno.EBUSY or attempt == _COPIES - 1:
                    raise
        with contextlib.suppress(OSError):  # the home may have none
            for each in os.listxattr(source):
                os.setxattr(target, each, os.getxattr(source, each))
        os.fsync(target)


@contextlib.contextmanager
def _opened(name: bytes, flags: int, directory_fd: int, mode: int = 0) -> Iterator[int]:
    fd = os.open(name, flags, mode, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _require_same_mount(one: int, other: int) -> None:
    if os.fstat(one).st_dev != os.fstat(other).st_dev:
        raise OSError(errno.ENOTSUP, "something else is mounted there")


def _place(old_fd: int, old: bytes, new_fd: int, new: bytes, collision: str) -> bytes:
    """Give what is ``old`` its name, or on ``number`` the first of ``name (1).ext``, ... that is free."""
    if collision == "replace":
        try:
            os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        except NotADirectoryError:  # a directory in place of a file
            _rename(old_fd, old, new_fd, new, _RENAME_EXCHANGE)
            os.unlink(old, dir_fd=old_fd)
        return new
    for number in range(_MOST_NUMBERS if collision == "number" else 1):
        name = numbered(new, number) if number else new
        with contextlib.suppress(FileExistsError):
            _rename(old_fd, old, new_fd, name, _RENAME_NOREPLACE)
            return name
    raise OSError(errno.EEXIST, "the name is taken")


def _rename(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    if _libc.renameat2(old_fd, old, new_fd, new, flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def numbered(name: bytes, number: int) -> bytes:
    """``name (1).ext`` of ``name.ext``, within the 255 bytes of a name."""
    stem, dot, suffix = name.rpartition(b".")
    if not stem or len(suffix) > 16:
        stem, dot, suffix = name, b"", b""
    tail = b" (%d)%s%s" % (number, dot, suffix)
    stem = stem[: 255 - len(tail)]
    # A character is not cut in half.
    with contextlib.suppress(UnicodeDecodeError):
        name.decode()
        stem = stem.decode(errors="ignore").encode()
    return stem + tail


def _remove(fd: int, name: bytes, incoming: int | None) -> None:
    """Remove a file or a directory, which is empty unless there is ``incoming`` to take it apart in."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=fd)
    elif incoming is None:
        os.rmdir(name, dir_fd=fd)
    else:
        own = b"%d-%d" % (os.getpid(), time.monotonic_ns())  # another one may have been given up halfway
        try:
            os.rename(name, own, src_dir_fd=fd, dst_dir_fd=incoming)  # it is gone at once, with its charge
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            import shutil  # noqa: PLC0415  # takes as long to import as all the rest

            shutil.rmtree(name, dir_fd=fd)  # it has hard links outside, so it cannot leave its region
        else:
            _take_apart(incoming, own)


def _remove_whole(incoming: int, name: bytes) -> None:
    """Remove a file, or a tree, of our own."""
    if stat.S_ISDIR(os.stat(name, dir_fd=incoming, follow_symlinks=False).st_mode):
        _take_apart(incoming, name)
    else:
        os.unlink(name, dir_fd=incoming)


def _take_apart(incoming: int, name: bytes) -> None:
    """Remove a tree where nobody else can get at it, however deep it is."""
    pending, count = [name], 0
    while pending:
        directory = pending.pop()
        below = os.open(directory, _DIRECTORY, dir_fd=incoming)
        try:
            for each in map(os.fsencode, os.listdir(below)):
                if stat.S_ISDIR(os.stat(each, dir_fd=below, follow_symlinks=False).st_mode):
                    count += 1
                    pending.append(b"%s-%d" % (name, count))
                    os.rename(each, pending[-1], src_dir_fd=below, dst_dir_fd=incoming)
                else:
                    os.unlink(each, dir_fd=below)
        finally:
            os.close(below)
        os.rmdir(directory, dir_fd=incoming)


def _require_no_mount(path: bytes) -> None:
    """Raise ``OSError(EBUSY)`` when something is mounted at a path or below it: that is not the home's."""
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            at = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), line.split()[4])
            if at == path or at.startswith(path + b"/"):
                raise OSError(errno.EBUSY, "something is mounted there")


def _copy(source: int, target: int) -> None:
    """The whole file ``source``; ``OSError(EBUSY)`` when it changes meanwhile."""
    before = os.fstat(source)
    offset = 0
    while data := os.pread(source, 1024 * 1024, offset):
        _write(target, memoryview(data))
        offset += len(data)
    after = os.fstat(source)
    # Of the two times the one can be set back.
    if offset != before.st_size or any(
        getattr(before, each) != getattr(after, each) for each in ("st_size", "st_mtime_ns", "st_ctime_ns")
    ):
        raise OSError(errno.EBUSY, "it is still being written")


def _copy_part(source: int, target: int, offset: int, size: int) -> None:
    """A part of an open file, all of it; ``OSError(EINVAL)`` when it is not that long."""
    buffer = memoryview(bytearray(min(size, 1024 * 1024)))
    end = offset + size
    while offset < end:
        count = os.preadv(source, [buffer[: end - offset]], offset)
        if not count:
            raise OSError(errno.EINVAL, "the descriptor has no such part")
        _write(target, buffer[:count])
        offset += count


def _sync(fds: list[int]) -> None:
    """Wait until files are on the disk: all at the same time, so that the disk has them in one go."""
    if len(fds) == 1:
        os.fsync(fds[0])
        return
    import threading  # noqa: PLC0415  # most doors need none

    failures: list[OSError] = []

    def sync(fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=sync, args=(fd,)) for fd in fds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _remove_left(incoming: int, pids: list[int]) -> None:
    """Remove contents that doors have left which were killed, and one that had our pid."""
    for pid in (os.getpid(), *pids):
        _remove_own(incoming, b"%d" % pid)
    for pid in pids:
        for number in range(MOST_PARTS):
            _remove_own(incoming, b"%d-%d" % (pid, number))


def _remove_own(incoming: int, name: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=incoming)


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def main() -> None:
    """``worker.py FD MOUNTPOINT DEVICE``"""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the daemon, which ends us when it is done
        signal.signal(number, signal.SIG_IGN)
    os.umask(0)
    channel = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(ConnectionError):
        Worker(channel, os.fsencode(sys.argv[2]), int(sys.argv[3])).serve()


if __name__ == "__main__":
    main()
