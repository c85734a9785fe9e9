"""Does a store keep the promise that commits rest on: put-if-absent with one winner?

Some S3 look-alikes take the condition and ignore it; on those two executions would overwrite each other.
"""

from __future__ import annotations

import uuid

from agentfuse.errors import StoreError
from agentfuse.objectstore.base import ObjectStore

PROBE_PREFIX = "probe/"


def probe(store: ObjectStore) -> None:
    """Write, write again if absent, read back, remove. Costs 4 requests; initialises a new local store.

    Raises ``StoreError`` when the store cannot be reached, does not keep what it is given, or ignores
    the condition; the message says which.
    """
    key = f"{PROBE_PREFIX}{uuid.uuid4()}"
    first, second = b"first " + key.encode(), b"second " + key.encode()
    if not store.put_if_absent(key, first):
        raise StoreError(
            f"object store {store.url}: answers 'exists' to a key that it never had",
            hint="its put-if-absent (If-None-Match: *) is broken; choose another store",
        )
    try:
        won_again = store.put_if_absent(key, second)
        kept = store.get(key)
    finally:
        store.delete(key)
    if won_again or kept == second:
        raise StoreError(
            f"object store {store.url}: ignores put-if-absent (If-None-Match: *)",
            hint="two executions would overwrite each other there; choose another store",
        )
    if kept != first:
        raise StoreError(f"object store {store.url}: gave back other bytes than were put")
