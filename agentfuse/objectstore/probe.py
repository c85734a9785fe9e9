"""Does a store keep the promises that commits rest on: put-if-absent with one winner, lists that are true?

Some S3 look-alikes take the condition and ignore it; on those two executions would overwrite each other.
"""

from __future__ import annotations

import uuid
from contextlib import suppress

from agentfuse.errors import ObjectNotFoundError, StoreError
from agentfuse.objectstore.base import ObjectStore

PROBE_PREFIX = "probe/"


def probe(store: ObjectStore) -> None:
    """Write, write again if absent, read back, list, remove. Costs 5 requests; initialises a new local store.

    Raises ``StoreError`` when the store cannot be reached, refuses what a mount will ask of it, does not
    keep what it is given, or ignores the condition; the message says which.
    """
    key = f"{PROBE_PREFIX}{uuid.uuid4()}"
    first, second = b"first " + key.encode(), b"second " + key.encode()
    if not store.put_if_absent(key, first) and not _holds(store, key, first):
        raise StoreError(
            f"object store {store.url}: answers 'exists' to a key that it never had",
            hint="its put-if-absent (If-None-Match: *) is broken; choose another store",
        )
    try:
        won_again = store.put_if_absent(key, second)
        kept = store.get(key)
        listed = [found.size_bytes for found in store.list(key)]
    except StoreError:
        with suppress(StoreError):  # what failed before says more
            store.delete(key)
        raise
    store.delete(key)
    if won_again or kept == second:
        raise StoreError(
            f"object store {store.url}: ignores put-if-absent (If-None-Match: *)",
            hint="two executions would overwrite each other there; choose another store",
        )
    if kept != first:
        raise StoreError(f"object store {store.url}: gave back other bytes than were put")
    if listed != [len(first)]:
        raise StoreError(
            f"object store {store.url}: does not list what was just written to it",
            hint="the newest snapshot would be overlooked there; choose a store whose lists are consistent",
        )


def _holds(store: ObjectStore, key: str, body: bytes) -> bool:
    try:
        return store.get(key) == body  # then only the answer was lost
    except ObjectNotFoundError:
        return False
