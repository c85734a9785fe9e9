"""The daemon's side of ``agentfuse-mount-helper``: it asks for its mount and gets its descriptor."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentfuse.control.mountinfo import mounts_at
from agentfuse.control.registry import socket_address
from agentfuse.errors import EnvironmentProblem, MountError
from agentfuse.mountpoint import Mounter, OwnMounter, detach_stale, require_directory, unmount_error

_ANSWER_BYTES = 16 * 1024


def mounter_of(helper: Path | None, mountpoint: Path) -> Mounter:
    """Who mounts at this resolved path: a helper, or we ourselves."""
    if helper is not None:
        return HelpedMounter(helper, mountpoint)
    return OwnMounter(mountpoint)


class HelpedMounter:
    """A ``Mounter`` without any privilege; ``helper`` is the socket of agentfuse-mount-helper.

    What it mounted is taken away by the helper when this process ends, however that happens.
    """

    allow_other = True

    def __init__(self, helper: Path, mountpoint: Path) -> None:
        self._helper = helper
        self._mountpoint = mountpoint

    def require(self) -> None:
        """Raise EnvironmentProblem unless the helper listens to us."""
        self._channel().close()

    def prepare(self) -> bool:
        """As ``Mounter`` says."""
        replaced = detach_stale(self._mountpoint, self)
        require_directory(self._mountpoint)
        return replaced

    @contextlib.contextmanager
    def mounting(self, *, noexec: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        """As ``Mounter`` says. The descriptor of /dev/fuse is libfuse's."""
        with contextlib.ExitStack() as until_here:
            pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            until_here.callback(os.close, pid_namespace)
            channel = self._channel()
            until_here.callback(channel.close)
            request = {"do": "mount", "path": str(self._mountpoint), "noexec": noexec}
            answer, fds = self._ask(channel, request, [pid_namespace])
            if "errno" in answer:
                raise MountError(
                    f"{self._helper} does not mount {self._mountpoint}: {answer['what']}", hint=answer["hint"]
                )
            try:
                self._require_ours(answer["user_namespace"])
            except BaseException:
                os.close(fds[0])
                raise
            yield f"/dev/fd/{fds[0]}", lambda: None

    def reopen(self) -> None:
        """As ``Mounter`` says; the helper makes nothing immutable, for its daemons' agents are not root."""

    def detach(self, *, lazy: bool) -> None:
        """As ``Mounter`` says. The connection is its own: the helper may be another one by now."""
        with self._channel() as channel:
            answer, _ = self._ask(channel, {"do": "unmount", "path": str(self._mountpoint), "lazy": lazy}, [])
        if "errno" in answer:
            raise unmount_error(self._mountpoint, answer["errno"])

    def _require_ours(self, user_namespace: list[int]) -> None:
        """Raise EnvironmentProblem unless the mount is seen here, and its users have the same numbers."""
        ours = os.stat("/proc/self/ns/user")
        if user_namespace != [ours.st_dev, ours.st_ino]:
            raise EnvironmentProblem(
                f"{self._helper} is in another user namespace: the users of the home would be mixed up",
                hint="run the daemon without a user namespace, or without the helper (unshare -Urm)",
            )
        found = mounts_at(self._mountpoint)
        if not found or not found[-1].is_ours:
            raise EnvironmentProblem(
                f"the mount that {self._helper} made at {self._mountpoint} is not seen here",
                hint="give the daemon the directory above it under the same path and with mount propagation "
                "(rslave, HostToContainer)",
            )

    def _channel(self) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with socket_address(self._helper) as address:
                channel.connect(address)
        except OSError as error:
            channel.close()
            raise self._unanswered(os.strerror(error.errno or errno.EIO)) from error
        return channel

    def _ask(
        self, channel: socket.socket, request: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        try:
            socket.send_fds(channel, [json.dumps(request).encode()], fds)
            data, got, _, _ = socket.recv_fds(channel, _ANSWER_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            answer: dict[str, Any] = json.loads(data)
        except (OSError, ValueError) as error:
            raise self._unanswered("no answer") from error
        return answer, got

    def _unanswered(self, why: str) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"the mount helper at {self._helper} cannot be asked: {why}",
            hint=f"start agentfuse-mount-helper with --socket {self._helper} --user {os.geteuid()}, "
            "or correct mount_helper",
        )
