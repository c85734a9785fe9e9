"""The end of a mount: what is not in the store yet is brought there, and who waits is told how it goes."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict

import trio

from agentfuse.errors import AgentfuseError, IntegrityError, StoreError, UnflushedError
from agentfuse.progress import Progress, Reporter
from agentfuse.sync.keeper import HomeKeeper

_RETRY_S = (1.0, 2.0, 4.0, 8.0)
"""How long a flush waits after the first failure to reach the store, the second, and so on."""


_MAX_WAITING = 256
"""So many lines may wait for who does not read before it misses progress."""


class Watchers:
    """Those who wait for the end of a mount at its control socket."""

    def __init__(self) -> None:
        self._listeners: set[trio.MemorySendChannel[dict[str, object]]] = set()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncGenerator[trio.MemoryReceiveChannel[dict[str, object]], None]:
        """What is told from now on, to the end."""
        send, receive = trio.open_memory_channel[dict[str, object]](math.inf)
        self._listeners.add(send)
        try:
            yield receive
        finally:
            self._listeners.discard(send)

    def tell(self, line: dict[str, object]) -> None:
        """Tell everybody."""
        for listener in list(self._listeners):
            # Who does not read misses progress, of which there is much, but nothing else.
            if "progress" in line and listener.statistics().current_buffer_used >= _MAX_WAITING:
                continue
            with contextlib.suppress(trio.BrokenResourceError):
                listener.send_nowait(line)

    def tell_from_thread(self, line: dict[str, object]) -> None:
        """As :meth:`tell`, in a thread of trio's."""
        with contextlib.suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self.tell, line)

    def close(self) -> None:
        """That was all."""
        for listener in list(self._listeners):
            listener.close()


class FinalFlush:
    """Brings a home that is no longer mounted into the store; ``timeout_s`` is for how long that is tried.

    ``has_backlog``: whether there are events in the home that webhooks have not taken.
    """

    def __init__(
        self,
        keeper: HomeKeeper,
        reporter: Reporter,
        watchers: Watchers,
        *,
        agent: str,
        timeout_s: float,
        has_backlog: Callable[[], bool],
    ) -> None:
        self.timeout_s = timeout_s
        self._keeper = keeper
        self._reporter = reporter
        self._watchers = watchers
        self._agent = agent
        self._has_backlog = has_backlog
        self._running = trio.CancelScope()

    def interrupt(self) -> None:
        """Give up now."""
        self._running.cancel()

    async def run(self, *ready: trio.Event) -> None:
        """Flush once all these have happened. Raises ``UnflushedError``: the home stays on this host."""
        try:
            with self._running:
                for event in ready:
                    await event.wait()
                await self._until_done()
            if self._running.cancelled_caught:
                raise self._unflushed("the flush was interrupted")
            self._watchers.tell({"done": {"execution": self._keeper.home.execution}})
        except AgentfuseError as error:
            line = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
            self._watchers.tell({"error": line})
            raise
        finally:
            self._watchers.close()

    async def _until_done(self) -> None:
        reporter = _Listening(self._reporter, self._watchers)
        begun = trio.current_time()
        for wait_s in itertools.chain(_RETRY_S, itertools.repeat(_RETRY_S[-1])):
            try:
                await trio.to_thread.run_sync(self._finish, reporter, abandon_on_cancel=True)
            except (AgentfuseError, OSError) as error:
                left_s = begun + self.timeout_s - trio.current_time()
                if not isinstance(error, StoreError) or isinstance(error, IntegrityError) or left_s < wait_s:
                    raise self._unflushed(str(error)) from error
                say = (
                    f"not flushed yet: {error.message}; trying again in {wait_s:g} s, for {left_s:.0f} s more"
                )
                self._reporter.say(say)
                self._watchers.tell({"say": say})
            else:
                return
            await trio.sleep(wait_s)

    def _unflushed(self, why: str) -> UnflushedError:
        return UnflushedError(
            f"{why}: the memory of this run is not in the store yet, but whole in {self._keeper.home.tree}",
            hint=f"once the store works, run agentfuse recover, or mount agent {self._agent} again here",
        )

    def _finish(self, reporter: Reporter) -> None:
        self._keeper.flush(reporter)
        self._keeper.end(undelivered=self._has_backlog())


class _Listening:
    """Reports to the mount's own reporter, and to whoever waits for its end at the control socket."""

    def __init__(self, reporter: Reporter, watchers: Watchers) -> None:
        self._reporter = reporter
        self._watchers = watchers

    def say(self, text: str) -> None:
        self._reporter.say(text)
        self._watchers.tell_from_thread({"say": text})

    def progress(self, moment: Progress) -> None:
        self._reporter.progress(moment)
        self._watchers.tell_from_thread({"progress": asdict(moment)})
