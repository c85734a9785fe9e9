"""What the handlers count of themselves, in plain dictionaries and lists: nothing here may cost a request
anything to speak of.
"""

from __future__ import annotations

from agentfuse.timings import new_timing

OPERATIONS: tuple[str, ...] = (
    "lookup", "forget", "getattr", "setattr", "readlink", "symlink", "link", "mknod", "mkdir", "rmdir",
    "unlink", "rename", "create", "open", "read", "write", "flush", "release", "fsync", "fsyncdir",
    "opendir", "readdir", "releasedir", "statfs", "access",
    "getxattr", "setxattr", "listxattr", "removexattr",
)  # fmt: skip


class Tally:
    """Counts since the mount began, by the kernel's name of the operation.

    ``requests`` has those that came, ``errors`` those that were answered with an errno, by operation and
    errno, ``timings`` how long those that are done took (see ``agentfuse.timings``).
    """

    __slots__ = ("errors", "requests", "timings")

    def __init__(self) -> None:
        self.requests = dict.fromkeys(OPERATIONS, 0)
        self.errors: dict[tuple[str, int], int] = {}
        self.timings = {operation: new_timing() for operation in OPERATIONS}

    def failed(self, operation: str, errno: int) -> None:
        """An operation was answered with an errno."""
        self.errors[operation, errno] = self.errors.get((operation, errno), 0) + 1

    def took(self, operation: str, spent_ns: int) -> None:
        """An operation is done, well or not, after so long."""
        timing = self.timings[operation]
        timing[spent_ns.bit_length()] += 1
        timing[-1] += spent_ns
