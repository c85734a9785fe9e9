"""What one execution does in its home: a random sequence of steps, each chosen by what is there already.

``mine-EXECUTION/`` is written by this execution alone, so it is known exactly; ``common/`` by all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from crash.steps import DATABASE, Step, Tree

COMMON = "common"
_NAMES = ("a", "b", "notes.txt", "ümlaut", "caf\udce9", "data.bin")
_DIRECTORIES = ("d", "e")
_SIZES = (0, 7, 300, 5000, 40_000)
_MAX_FILES = 40


def mine(execution: str) -> str:
    """The directory of an execution's own."""
    return f"mine-{execution}"


class Workload:
    """Makes up steps upon ``tree``, which the caller keeps true. ``number`` makes tokens unique."""

    def __init__(self, rng: random.Random, tree: Tree, execution: str, number: int, first_token: int) -> None:
        self._rng = rng
        self._tree = tree
        self._own = mine(execution)
        self._tag = f"e{number}"
        self._tokens = first_token
        self._next_handle = 1 + max(tree.handles, default=0)
        self._logs: dict[str, int] = {}  # the handle of each file that is kept open and appended to
        self._open_databases: set[str] = set()

    @property
    def tokens_used(self) -> int:
        return self._tokens

    def beginning(self) -> Iterator[Step]:
        """The directories that everything happens in."""
        for directory in (self._own, COMMON):
            if directory not in self._tree.names:
                yield Step("mkdir", directory, mode=0o755)

    def action(self) -> Iterator[Step]:
        """The steps of one thing that a program might do. Draw them one by one, applying each."""
        area = self._rng.choice((self._own, self._own, COMMON))
        actions: list[tuple[Callable[[str], Iterator[Step]], int]] = [
            (self._new, 5), (self._append, 5), (self._rewrite, 3), (self._replace, 4), (self._patch, 3),
            (self._truncate, 2), (self._rename, 4), (self._unlink, 3), (self._mkdir, 3), (self._rmdir, 1),
            (self._link, 2), (self._symlink, 1), (self._chmod, 1), (self._log, 6), (self._insert, 6),
            (self._close_something, 2), (self._change_kind, 1), (self._large, 1),
        ]  # fmt: skip
        choose, weights = zip(*actions, strict=True)
        yield from self._rng.choices(choose, weights)[0](area)

    def ending(self) -> Iterator[Step]:
        """Close what is open, as a program that ends in peace does."""
        for handle in list(self._tree.handles):
            yield Step("close", handle=handle)
        self._logs.clear()
        for path in sorted(self._open_databases):
            yield Step("part", path)
        self._open_databases.clear()

    # -- what there is to choose from

    def _token(self) -> str:
        self._tokens += 1
        return f"{self._tag}.{self._tokens}"

    def _handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def _files(self, area: str) -> list[str]:
        return [path for path in self._tree.of_kind("file", area) if not DATABASE.search(path)]

    def _idle_files(self, area: str) -> list[str]:
        """Files that are not open: what is renamed or removed while open is an action of its own."""
        held = set(map(id, self._tree.handles.values()))
        return [path for path in self._files(area) if id(self._tree.names[path]) not in held]

    def _free_name(self, area: str) -> str | None:
        directory = self._rng.choice([area, *self._tree.of_kind("dir", area)])
        path = f"{directory}/{self._rng.choice(_NAMES)}"
        is_full = len(self._tree.below(area)) >= _MAX_FILES
        return None if path in self._tree.names or is_full else path

    def _one(self, paths: list[str]) -> str | None:
        return self._rng.choice(paths) if paths else None

    def _written(self, path: str, handle: int, *, is_append: bool = False) -> Step:
        is_text = path.endswith(".txt") or self._rng.random() < 0.5
        size = self._rng.choice(_SIZES)
        op = "append" if is_append else "write"
        return Step(op, path, handle=handle, size=size, token=self._token(), is_text=is_text)

    # -- actions

    def _new(self, area: str) -> Iterator[Step]:
        path = self._free_name(area)
        if path is not None:
            yield from self._made(path)

    def _made(self, path: str) -> Iterator[Step]:
        handle = self._handle()
        yield Step("create", path, handle=handle, mode=self._rng.choice((0o644, 0o600, 0o755)))
        for _ in range(self._rng.choice((0, 1, 1, 2))):
            yield self._written(path, handle, is_append=True)
        yield Step("close", handle=handle)

    def _append(self, area: str) -> Iterator[Step]:
        path = self._one(self._files(area))
        if path is not None:
            handle = self._handle()
            yield Step("open", path, handle=handle)
            yield self._written(path, handle, is_append=True)
            yield Step("close", handle=handle)

    def _rewrite(self, area: str) -> Iterator[Step]:
        path = self._one(self._idle_files(area))
        if path is not None:
            handle = self._handle()
            yield Step("wipe", path, handle=handle)
            yield self._written(path, handle)
            yield Step("close", handle=handle)

    def _replace(self, area: str) -> Iterator[Step]:
        path = self._one(self._files(area))
        if path is not None and path + ".tmp" not in self._tree.names:
            yield from self._made(path + ".tmp")
            yield Step("rename", path + ".tmp", path)

    def _patch(self, area: str) -> Iterator[Step]:
        path = self._one(self._files(area))
        if path is not None:
            handle = self._handle()
            offset = self._rng.randrange(len(self._tree.names[path].content) + 100)
            yield Step("open", path, handle=handle)
            yield Step("write", path, handle=handle, offset=offset, size=self._rng.randrange(200),
                       token=self._token())  # fmt: skip
            yield Step("close", handle=handle)

    def _truncate(self, area: str) -> Iterator[Step]:
        path = self._one(self._files(area))
        if path is not None:
            yield Step("truncate", path, size=self._rng.randrange(6000))

    def _rename(self, area: str) -> Iterator[Step]:
        path = self._one([*self._files(area), *self._tree.of_kind("dir", area)])
        target = self._free_name(area)
        if path is None or target is None or target.startswith(path + "/"):
            return
        yield Step("rename", path, target)

    def _unlink(self, area: str) -> Iterator[Step]:
        path = self._one([*self._files(area), *self._tree.of_kind("symlink", area)])
        if path is not None:
            yield Step("unlink", path)

    def _mkdir(self, area: str) -> Iterator[Step]:
        parent = self._rng.choice([area, *self._tree.of_kind("dir", area)])
        path = f"{parent}/{self._rng.choice(_DIRECTORIES)}"
        if path not in self._tree.names and parent.count("/") < 3:
            yield Step("mkdir", path, mode=self._rng.choice((0o755, 0o700)))

    def _rmdir(self, area: str) -> Iterator[Step]:
        path = self._one([path for path in self._tree.of_kind("dir", area) if not self._tree.below(path)])
        if path is not None:
            yield Step("rmdir", path)

    def _link(self, area: str) -> Iterator[Step]:
        path, target = self._one(self._files(area)), self._free_name(area)
        if path is not None and target is not None:
            yield Step("link", path, target)

    def _symlink(self, area: str) -> Iterator[Step]:
        path = self._free_name(area)
        if path is not None:
            yield Step("symlink", path, self._rng.choice(("a", "../elsewhere", "/etc/hostname")))

    def _chmod(self, area: str) -> Iterator[Step]:
        path = self._one(self._files(area))
        if path is not None:
            yield Step("chmod", path, mode=self._rng.choice((0o644, 0o600, 0o400, 0o755)))

    def _log(self, area: str) -> Iterator[Step]:
        """A file that stays open and is appended to."""
        path = self._one(list(self._logs)) if len(self._logs) > 1 else None
        if path is None:
            path = f"{self._own}/log-{self._token()}"
            self._logs[path] = self._handle()
            yield Step("create", path, handle=self._logs[path], mode=0o644)
        for _ in range(self._rng.randrange(1, 4)):
            yield Step("append", path, handle=self._logs[path], size=self._rng.choice((10, 200, 3000)),
                       token=self._token(), is_text=True)  # fmt: skip

    def _insert(self, area: str) -> Iterator[Step]:
        path = f"{area}/memory.db"
        if path in self._tree.names and self._tree.names[path].kind != "file":
            return
        self._open_databases.add(path)
        for _ in range(self._rng.randrange(1, 4)):
            yield Step("insert", path, size=self._rng.choice((1, 100, 2000)), token=self._token())

    def _close_something(self, area: str) -> Iterator[Step]:
        path = self._one([*self._logs, *sorted(self._open_databases)])
        if path in self._logs:
            yield Step("close", handle=self._logs.pop(path))
        elif path is not None:
            self._open_databases.remove(path)
            yield Step("part", path)

    def _change_kind(self, area: str) -> Iterator[Step]:
        """A file becomes a directory, with something in it."""
        path = self._one(self._idle_files(COMMON))
        if path is not None:
            yield Step("unlink", path)
            yield Step("mkdir", path, mode=0o755)
            yield from self._made(path + "/inside")

    def _large(self, area: str) -> Iterator[Step]:
        """Large enough to be an object of its own."""
        path = self._free_name(self._own)
        if path is not None:
            handle = self._handle()
            yield Step("create", path, handle=handle, mode=0o644)
            yield Step("append", path, handle=handle, size=1_100_000, token=self._token())
            yield Step("close", handle=handle)
