"""What operators are told of a mount, without one."""

from __future__ import annotations

from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from agentfuse import operators
from agentfuse.flush import Watchers
from agentfuse.operators import Life, Operators


class Detached:
    """A mount that is off its path as soon as that is asked for; its session ends then, or does not."""

    def __init__(self, *, is_held: bool) -> None:
        self.session = SimpleNamespace(ended=trio.Event())
        self.watchers = Watchers()
        self._is_held = is_held

    async def detach(self, *, lazy: bool) -> None:
        if not self._is_held:
            self.session.ended.set()
        self.watchers.tell({"say": "the next line"})

    async def first_line(self) -> str:
        """What an unmount tells first, while the mount's own tasks take long to end."""
        parts: dict[str, Any] = dict.fromkeys(
            (
                "record",
                "keeper",
                "feed",
                "webhooks",
                "inboxes",
                "backfill",
                "syncs",
                "flush",
                "files",
                "doors",
            )
        )
        mount = Operators(
            **parts,
            life=Life(state="live"),
            session=cast(Any, self.session),
            detach=self.detach,
            watchers=self.watchers,
        )
        async with aclosing(mount.unmount(lazy=False, timeout_s=None)) as lines:
            return str((await anext(lines))["say"])


async def test_somebody_else_holds_the_mount_only_while_the_kernel_goes_on_asking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operators, "HELD_ELSEWHERE_S", 0.0)
    assert await Detached(is_held=False).first_line() == "the next line"
    assert "another mount namespace" in await Detached(is_held=True).first_line()
