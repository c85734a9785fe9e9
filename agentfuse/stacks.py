"""What every thread and every trio task of this process does, as text for people."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator

import trio


def stacks() -> str:
    """The stacks of all threads, then the tree of trio's tasks, each with where it waits."""
    return "\n".join([*_threads(), "", *_tasks()]) + "\n"


def _threads() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"thread {names.get(ident, 'unknown')} ({ident:#x})"
        yield from _indented("".join(traceback.format_stack(frame)), "  ")


def _tasks() -> Iterator[str]:
    root = trio.lowlevel.current_root_task()
    pending = [(root, "")] if root is not None else []
    while pending:
        task, indent = pending.pop()
        yield f"{indent}task {task.name}"
        where = [(frame, line) for frame, line in task.iter_await_frames()]
        yield from _indented("".join(traceback.StackSummary.extract(iter(where)).format()), indent + "  ")
        for nursery in task.child_nurseries:
            pending += [(child, indent + "    ") for child in nursery.child_tasks]


def _indented(text: str, indent: str) -> Iterator[str]:
    for line in text.splitlines():
        yield indent + line
