"""Whether the daemons of this host's homes answer, so that requests for one that hangs do not wait for it."""

from __future__ import annotations

import math
from pathlib import Path

import trio

from agentfuse.control import asks
from agentfuse.control.client import AsyncControlClient
from agentfuse.control.registry import Registry
from agentfuse.errors import AgentfuseError, NotFoundError, UnflushedError

TRUSTED_S = 1.0
"""A daemon that has answered is not asked again for so long."""

_KEPT_S = 3600.0
"""What is known of a home that nobody asks for is forgotten after so long."""

_AGAIN_S = 1.0
_DEADLINE_S = 5.0


class Pulse:
    """Asks daemons how they are, each of them once at a time, whoever wants to know."""

    def __init__(self, registry: Registry, *, deadline_s: float = _DEADLINE_S) -> None:
        self._registry = registry
        self._deadline_s = deadline_s
        self._homes: dict[Path, _Home] = {}

    async def require(self, mountpoint: Path) -> None:
        """Return when the daemon of a home answers, or there is none: that is for others to say.

        Raises ``UnflushedError`` when it does not; at once while it is known to hang. One request a second
        then waits to see whether it still does.
        """
        now = trio.current_time()
        home = self._homes.get(mountpoint) or self._begin(mountpoint, now)
        if home.is_silent and (now < home.looked_at + _AGAIN_S or home.looking.locked()):
            raise _silent()
        async with home.looking:
            if trio.current_time() >= home.looked_at + (_AGAIN_S if home.is_silent else TRUSTED_S):
                await self._look(mountpoint, home)
            if home.is_silent:
                raise _silent()

    def forget(self, mountpoint: Path) -> None:
        """It is no home any more."""
        self._homes.pop(mountpoint, None)

    def _begin(self, mountpoint: Path, now: float) -> _Home:
        kept = {
            path: each
            for path, each in self._homes.items()
            if each.looking.locked() or each.looked_at > now - _KEPT_S
        }
        home = _Home()
        self._homes = {**kept, mountpoint: home}
        return home

    async def _look(self, mountpoint: Path, home: _Home) -> None:
        try:
            socket = self._registry.find_live(mountpoint).socket
            client = AsyncControlClient(socket, deadline_s=self._deadline_s)
            with trio.fail_after(self._deadline_s):
                await client.ask(asks.status())
        except (trio.TooSlowError, asks.SilentError):
            home.is_silent = True
        except NotFoundError:
            self.forget(mountpoint)
            home.is_silent = False
        except AgentfuseError:
            home.is_silent = False  # it answers, though not what was asked
        else:
            home.is_silent = False
        home.looked_at = trio.current_time()


class _Home:
    def __init__(self) -> None:
        self.is_silent = False
        self.looked_at = -math.inf
        self.looking = trio.Lock()


def _silent() -> UnflushedError:
    return UnflushedError(
        "the daemon of the execution's home does not answer", hint="ask again a little later"
    )
