"""A file tree that is a region's snapshots in the store: of a tenant, an ended execution, an idle agent.

Reading takes the newest snapshot, so what any gateway has committed is seen by the next request. Changing is
an operation on the newest snapshot's listing, with the quota checked there, committed by put-if-absent; on a
lost race it is done anew upon the winner's. So neither a quota nor a name can be taken twice, by however many
gateways. What many requests want at a time becomes one snapshot.
"""

from __future__ import annotations

import datetime
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import trio

from agentfuse.admission import Quota
from agentfuse.door.doors import OnCollision
from agentfuse.errors import AgentfuseError, IntegrityError, NotFoundError, StoreError, WrongTypeError
from agentfuse.gateway.batches import Batches
from agentfuse.gateway.draft import Draft, children
from agentfuse.gateway.filetree import Body, NewFile, Node, Usage
from agentfuse.gateway.limits import Limits
from agentfuse.home.marks import LABELS
from agentfuse.objectstore.base import ObjectStore
from agentfuse.progress import Silent
from agentfuse.regions import Creator
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry, printable
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import object_key
from agentfuse.snapshots.rebase import by_path, is_changed
from agentfuse.sync.contents import StoredSource, stream_content
from agentfuse.sync.reports import Meter
from agentfuse.sync.upload import SMALL_BYTES, Place, Readable, Uploader, placed

MAX_RACES = 100
"""Each lost race means that another gateway, or an execution, got through."""


class _Listing:
    """A snapshot, as it is read from. Never changed."""

    def __init__(self, number: int, entries: Mapping[bytes, Entry]) -> None:
        self.number = number
        self.entries = entries

    @cached_property
    def children(self) -> dict[bytes, list[Entry]]:
        return children(self.entries.values())

    @cached_property
    def places(self) -> dict[str, Place]:
        return {e.sha256: Place(e.object, e.offset) for e in self.entries.values() if e.object}


@dataclass(frozen=True, slots=True)
class _Change:
    """An operation that waits for its commit. ``bodies``: by hash, the contents that it brings."""

    operation: Callable[[Draft], Any]
    creator: Creator
    bodies: Mapping[str, Body] = field(default_factory=dict)
    uploader: Uploader | None = None  # of those that are in the store already

    def places(self) -> dict[str, Place]:
        return {} if self.uploader is None else self.uploader.places()


class StoredTree:
    """One region of one owner (see ``snapshots.layout``); a ``FileTree``.

    ``committer`` names this process in its snapshots, as executions are named in theirs. ``nursery`` is
    where commits run; they are finished even when nobody waits for them any more.
    """

    def __init__(
        self,
        store: ObjectStore,
        owner: str,
        region: str,
        *,
        quota: Quota,
        committer: str,
        nursery: trio.Nursery,
        limits: Limits,
    ) -> None:
        self._store = store
        self._owner = owner
        self._region = region
        self._quota = quota
        self._committer = committer
        self._limits = limits
        self._reading = History(store, owner, region)
        self._history = History(store, owner, region)  # of commits: they must not wait for readers
        self._uploader = Uploader(store, owner, may_be_there=False)
        self._lock = threading.Lock()
        root = Entry(path=b"", type="dir", mode=0o755, mtime_ns=0)
        self._listing = _Listing(0, {b"": root})
        self._reads: Batches[None, _Listing] = Batches(nursery, limits.reads, self._read)
        self._commits: Batches[_Change, Any] = Batches(nursery, limits.commits, self._commit)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits for it."""
        return self._reads.is_idle and self._commits.is_idle

    @property
    def size(self) -> int:
        """How many entries it holds in memory."""
        return len(self._listing.entries)

    # -- the interface: see FileTree

    async def stat(self, path: bytes) -> Node:
        return _node(_find(await self._newest(), path))

    async def list(self, path: bytes, *, recursive: bool = False) -> Sequence[Node]:
        listing = await self._newest()
        if _find(listing, path).type != "dir":
            raise WrongTypeError(f"{printable(path)!r} is no directory")
        if not recursive:
            return [_node(entry) for entry in listing.children[path]]
        prefix = path + b"/" if path else b""
        return [_node(e) for e in listing.entries.values() if e.path and e.path.startswith(prefix)]

    async def open(self, path: bytes) -> StoredFile:
        entry = _find(await self._newest(), path)
        if entry.type != "file":
            raise WrongTypeError(f"{printable(path)!r} is no file")
        return StoredFile(self._store, self._owner, entry, self._limits.downloads)

    async def put(
        self,
        files: Sequence[NewFile],
        *,
        creator: Creator,
        on_collision: OnCollision = "replace",
        directories: Sequence[bytes] = (),
        if_match: str = "",
    ) -> Sequence[Node]:
        operation = partial(
            _put, files=files, on_collision=on_collision, directories=directories, if_match=if_match
        )
        hash_all = partial(_hash, [file.body for file in files])
        await trio.to_thread.run_sync(hash_all, limiter=self._limits.uploads)
        large = [file.body for file in files if file.body.size >= SMALL_BYTES]
        uploader = None
        if large:
            # Before anything travels: would it be taken? Then it travels on its own, holding up nobody.
            await self._check(operation)
            uploader = Uploader(self._store, self._owner, may_be_there=False)
            await trio.to_thread.run_sync(_send, uploader, large, limiter=self._limits.uploads)
        bodies = {file.body.sha256: file.body for file in files}
        made = await self._commits.submit(_Change(operation, creator, bodies, uploader))
        return [_node(entry) for entry in made]

    async def delete(self, path: bytes, *, creator: Creator, recursive: bool = False) -> None:
        await self._change(creator, lambda draft: draft.delete(path, recursive=recursive))

    async def delete_unchanged(self, nodes: Sequence[Node], *, creator: Creator) -> None:
        """Remove the first of some nodes, which holds the others, if it holds them still and nothing else.
        Raises ``ChangedError``."""
        known = {node.path: node.etag for node in nodes}
        await self._change(creator, lambda draft: draft.delete_unchanged(nodes[0].path, known))

    async def move(self, source: bytes, target: bytes, *, creator: Creator, overwrite: bool = False) -> None:
        await self._change(creator, lambda draft: draft.move(source, target, overwrite=overwrite))

    async def copy(self, source: bytes, target: bytes, *, creator: Creator, overwrite: bool = False) -> None:
        await self._change(creator, lambda draft: draft.copy(source, target, overwrite=overwrite))

    async def mkdir(
        self, path: bytes, *, creator: Creator, parents: bool = False, exist_ok: bool = False
    ) -> None:
        await self._change(creator, lambda draft: draft.mkdir(path, parents=parents, exist_ok=exist_ok))

    async def annotate(
        self, path: bytes, *, creator: Creator, mode: int | None = None, labels: bytes | None = None
    ) -> Node:
        operation = partial(Draft.annotate, path=path, mode=mode, labels=labels)
        return _node(await self._commits.submit(_Change(operation, creator)))

    async def set_frozen(self, path: bytes, frozen: bool, *, creator: Creator) -> Node:
        operation = partial(Draft.set_frozen, path=path, frozen=frozen)
        return _node(await self._commits.submit(_Change(operation, creator)))

    async def usage(self) -> Usage:
        listing = await self._newest()
        draft = await trio.to_thread.run_sync(self._draft, listing, limiter=self._limits.reads)
        return Usage(draft.bytes, draft.files, self._quota.bytes, self._quota.files)

    async def check(self, files: Sequence[NewFile], *, on_collision: OnCollision = "replace") -> None:
        """Raise what :meth:`put` would raise now; nothing is changed."""
        await self._check(partial(_put, files=files, on_collision=on_collision))

    async def _check(self, operation: Callable[[Draft], Any]) -> None:
        listing = await self._newest()
        await trio.to_thread.run_sync(
            lambda: self._draft(listing).attempt(operation, Creator.USER), limiter=self._limits.reads
        )

    # -- in threads

    async def _newest(self) -> _Listing:
        return await self._reads.submit(None)

    async def _change(self, creator: Creator, operation: Callable[[Draft], Any]) -> None:
        await self._commits.submit(_Change(operation, creator))

    def _draft(self, listing: _Listing) -> Draft:
        return Draft(listing.entries, self._quota, time.time_ns())

    def _read(self, asked: Sequence[None]) -> Sequence[_Listing]:
        listing = self._load(self._reading)
        _ = listing.children  # made here rather than in the thread of all requests
        return [listing] * len(asked)

    def _load(self, history: History) -> _Listing:
        """The newest snapshot's listing, read only if it is not known yet."""
        number = history.newest(at_least=self._listing.number)
        listing = self._listing
        if number <= listing.number:
            return listing
        return self._know(_Listing(number, by_path(history.read(number).entries)))

    def _know(self, listing: _Listing) -> _Listing:
        with self._lock:
            if listing.number > self._listing.number:
                self._listing = listing
        return listing

    def _commit(self, batch: Sequence[_Change]) -> Sequence[Any]:
        for _ in range(MAX_RACES):
            base = self._load(self._history)
            draft = self._draft(base)
            outcomes = [_attempted(draft, change) for change in batch]
            listing = draft.listing()
            if not draft.is_changed or not is_changed(base.entries, listing):
                return outcomes
            entries = self._place(listing, base, batch)
            if self._history.commit(self._snapshot(base.number, entries)):
                self._know(_Listing(base.number + 1, entries))
                self._uploader.forget()
                return outcomes
        raise StoreError(
            f"{self._owner}: lost {MAX_RACES} commits in a row to others", hint="ask again a little later"
        )

    def _snapshot(self, parent: int, entries: Mapping[bytes, Entry]) -> Snapshot:
        follows, resumes = self._history.stretch(parent, self._committer)
        return Snapshot(
            agent=self._owner,
            region=self._region,
            number=parent + 1,
            parent=parent,
            follows=follows,
            resumes=resumes,
            execution=self._committer,
            commit=str(uuid.uuid4()),
            reason="requests",
            time=datetime.datetime.now(datetime.UTC),
            entries=list(entries.values()),
        )

    def _place(
        self, listing: Mapping[bytes, Entry], base: _Listing, batch: Iterable[_Change]
    ) -> dict[bytes, Entry]:
        """The entries with the places of their contents, those that are missing having been sent."""
        places = self._uploader.places()
        bodies: dict[str, Body] = {}
        for change in batch:
            places.update(change.places())
            bodies.update(change.bodies)
        places.update(base.places)
        files = [entry for entry in listing.values() if entry.size and not entry.object]
        missing = {entry.sha256: bodies[entry.sha256] for entry in files if entry.sha256 not in places}
        if missing:
            _send(self._uploader, missing.values())
            places.update(self._uploader.places())
        made = {entry.path: placed(entry, places) for entry in files}
        return {path: made.get(path, entry) for path, entry in listing.items()}


class StoredFile:
    """A file of a snapshot: what it holds stays as it was."""

    def __init__(self, store: ObjectStore, owner: str, entry: Entry, limiter: trio.CapacityLimiter) -> None:
        self.entry = entry
        self.owner = owner
        self._store = store
        self._limiter = limiter

    @property
    def node(self) -> Node:
        """Its facts."""
        return _node(self.entry)

    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """See ``OpenedFile.stream``; of a wrong content the last piece never comes."""
        pieces = self._pieces(offset, length)
        while piece := await trio.to_thread.run_sync(next, pieces, b"", limiter=self._limiter):
            yield piece

    def presign(self, ttl_s: int, media_type: str) -> str | None:
        """The store's own URL of the content; None where it has none, or other contents are in the object."""
        entry = self.entry
        if entry.object != entry.sha256:  # whose name is the hash of all that it holds
            return None
        name = entry.path.rpartition(b"/")[2]
        key = object_key(self.owner, entry.object)
        return self._store.presign(key, ttl_s, media_type=media_type, file_name=name)

    def source(self) -> Readable:
        """The content as what an upload reads from."""
        return StoredSource(self._store, self.owner, self.entry)

    async def aclose(self) -> None:
        """Nothing is held."""

    def _pieces(self, offset: int, length: int | None) -> Iterator[bytes]:
        entry = self.entry
        end = entry.size if length is None else min(entry.size, offset + length)
        if offset == 0 and end == entry.size:
            yield from stream_content(self._store, self.owner, entry)
            return
        key, left = object_key(self.owner, entry.object), end - offset
        if left <= 0:
            return
        for piece in self._store.stream(key, offset=entry.offset + offset, length=left):
            left -= len(piece)
            yield piece
        if left:
            raise IntegrityError(f"object {key}: ends {left} bytes early")


def _put(
    draft: Draft,
    *,
    files: Sequence[NewFile],
    on_collision: OnCollision,
    directories: Sequence[bytes] = (),
    if_match: str = "",
) -> list[Entry]:
    for path in directories:
        draft.mkdir(path, parents=True, exist_ok=True)
    return [
        draft.put(file.path, file.body.size, file.body.sha256, file.mode, on_collision, if_match=if_match)
        for file in files
    ]


def _hash(bodies: Iterable[Body]) -> None:
    """Bodies remember their hashes, for which they must be read."""
    for body in bodies:
        _ = body.sha256


def _attempted(draft: Draft, change: _Change) -> Any:
    try:
        return draft.attempt(change.operation, change.creator)
    except AgentfuseError as error:
        return error


def _send(uploader: Uploader, bodies: Iterable[Body]) -> None:
    contents = {body.sha256: body for body in bodies}
    entries = [
        Entry(path=b"", type="file", mode=0, mtime_ns=0, size=body.size, sha256=body.sha256)
        for body in contents.values()
    ]
    uploader.send(entries, lambda entry: contents[entry.sha256].open(), Meter(Silent(), "flush"))


def _find(listing: _Listing, path: bytes) -> Entry:
    found = listing.entries.get(path)
    if found is None:
        raise NotFoundError(f"{printable(path)!r} does not exist")
    return found


def _node(entry: Entry) -> Node:
    return Node(
        entry.path,
        entry.type,
        entry.size,
        entry.mode,
        entry.mtime_ns,
        entry.created_by,
        entry.sha256,
        dict(entry.xattrs).get(LABELS, b""),
        entry.mtime_ns,
        entry.is_frozen,
    )
