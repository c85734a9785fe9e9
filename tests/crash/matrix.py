"""Plays seeds: real daemons and mounts, kills, faults and races, and then the judge. See scripts/crash.

Every seed is played by a process of its own, forked from one that has imported everything; it forks the
actors, which fork the daemons. Nothing of a seed outlives its player, and no mount does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import pickle
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mounts
from crash.actor import Performance
from crash.hosts import CONFIG, Daemon, Place, call_in_child, die_with_parent, recover_in_child
from crash.judge import Judge
from crash.plan import Sweep, make_plan

from agentfuse.home.tree import list_homes
from agentfuse.killpoints import STEPS

SEED_DEADLINE_S = 90.0
CLEAN_S = 15.0
_COMPLAINT = re.compile(r" ERROR | CRITICAL |Traceback")
_HARMLESS = re.compile(r"pyfuse3: .*fuse_reply_.* No such file or directory")  # the asker is gone


@dataclass
class Verdict:
    """How a seed went."""

    seed: int
    wrong: list[str]
    seconds: float = 0.0
    killed_at: list[str] = field(default_factory=list)
    snapshots: int = 0


class Player:
    """Plays one seed, in a process that has no threads yet. Everything of it is below ``base``."""

    def __init__(self, base: Path, seed: int) -> None:
        self._place = Place(base, make_plan(seed))
        self._killed_at: list[str] = []
        self._until = time.monotonic() + SEED_DEADLINE_S

    def play(self) -> Verdict:
        began = time.monotonic()
        plan = self._place.plan
        (self._place.base / "config.toml").write_text(CONFIG)
        for execution in (
            *(actor.execution for actor in plan.actors),
            *map("sweep{}".format, range(plan.hosts)),
        ):
            self._place.mountpoint(execution).mkdir()
        try:
            wrong = self._act()
            self._sweep()
            judge = Judge(self._place)
            wrong += judge.wrong()
        except Exception:  # noqa: BLE001  whatever it is, it is reported with its seed
            return Verdict(plan.seed, [traceback.format_exc()], time.monotonic() - began)
        finally:
            clean(self._place.base)
        wrong += self._complaints()
        self._killed_at += [step for story in judge.stories for step in story.killed_at]
        return Verdict(plan.seed, wrong, time.monotonic() - began, self._killed_at, judge.snapshots)

    def _act(self) -> list[str]:
        """Let all actors play at once; what went wrong with them themselves."""
        pids = [
            call_in_child(Performance(self._place, number, actor).play, self._place.log(actor.execution))
            for number, actor in enumerate(self._place.plan.actors)
        ]
        codes = [self._wait(pid) for pid in pids]
        # An actor has a database's shared memory mapped, which is gone when the daemon is.
        return [
            f"actor {n} ended with {code}" for n, code in enumerate(codes) if code not in (0, -signal.SIGBUS)
        ]

    def _sweep(self) -> None:
        """Have what is unfinished on each host finished, some dying at it first."""
        for host in range(self._place.plan.hosts):
            for sweep in (*self._place.plan.sweeps, Sweep("mount", None)):
                code = self._finish(host, sweep)
                if code != 0:
                    assert sweep.kill and code == -signal.SIGKILL, f"{sweep} of host {host} ended with {code}"
                    self._killed_at.append(sweep.kill.step)
            for home in list_homes(self._place.state(host)):
                record = home.record()
                assert record is None or record.status != "live", f"{home.execution} is unfinished after all"

    def _finish(self, host: int, sweep: Sweep) -> int:
        if sweep.by == "recover":
            return self._wait(recover_in_child(self._place, host, sweep.kill))
        daemon = Daemon(self._place, host, f"sweep{host}")
        return daemon.umount() if daemon.start(sweep.kill) else daemon.wait()

    def _wait(self, pid: int) -> int:
        pidfd = os.pidfd_open(pid)
        with contextlib.closing(os.fdopen(pidfd, closefd=True)):
            if not select.select([pidfd], [], [], max(0, self._until - time.monotonic()))[0]:
                os.killpg(0, signal.SIGUSR1)
                time.sleep(1)  # for all to write down where they are
                raise TimeoutError(f"process {pid} hangs; the logs hold all stacks")
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)

    def _complaints(self) -> list[str]:
        """What no healthy daemon writes into its log."""
        lines = [
            line
            for path in self._place.base.glob("log-*")
            for line in path.read_text(errors="replace").splitlines()
        ]
        return [line for line in lines if _COMPLAINT.search(line) and not _HARMLESS.search(line)]


def clean(base: Path) -> None:
    """End every process of this player's group but itself, and take away every mount below ``base``."""
    for path in mounts.mountpoints_below(base):
        mounts.abort_connections(path)  # who waits for a daemon that cannot answer could not be killed
    for pid in _others_of_this_group():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in mounts.mountpoints_below(base):
        mounts.detach(path)
    until = time.monotonic() + CLEAN_S
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] or time.monotonic() < until:
            time.sleep(0.01)


def _others_of_this_group() -> Iterator[int]:
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdecimal() and int(name) != os.getpid() and os.getpgid(int(name)) == os.getpgrp():
                yield int(name)


class Players:
    """Some players at a time. ``hear`` is called with each verdict and where its seed was played."""

    def __init__(self, directory: Path, jobs: int, hear: Callable[[Verdict, Path], None]) -> None:
        self._directory = directory
        self._jobs = jobs
        self._hear = hear
        self._running: dict[int, tuple[int, int, Path]] = {}  # by pipe

    def play(self, seeds: Iterator[int]) -> None:
        """Returns when all are played. Leaves no player behind, however it ends."""
        try:
            for seed in seeds:
                while len(self._running) >= self._jobs:
                    self._gather()
                self._start(seed)
            while self._running:
                self._gather()
        finally:
            for pid, *_ in self._running.values():
                os.kill(pid, signal.SIGTERM)
            for pid, *_ in self._running.values():
                os.waitpid(pid, 0)

    def _start(self, seed: int) -> None:
        base = Path(tempfile.mkdtemp(prefix=f"agentfuse-crash-{seed}-", dir=self._directory))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _be_player(base, seed, writer)
        os.close(writer)
        self._running[reader] = (pid, seed, base)

    def _gather(self) -> None:
        for reader in select.select(list(self._running), [], [])[0]:
            pid, seed, base = self._running.pop(reader)
            with os.fdopen(reader, "rb") as pipe:
                data = pipe.read()
            _, status = os.waitpid(pid, 0)
            died = Verdict(seed, [f"the player ended with status {status}"])
            self._hear(pickle.loads(data) if data else died, base)


def _be_player(base: Path, seed: int, pipe: int) -> None:
    try:
        os.setpgid(0, 0)
        die_with_parent(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        gc.freeze()
        data = pickle.dumps(Player(base, seed).play())
        while data:
            data = data[os.write(pipe, data) :]
    finally:
        os._exit(0)


class Account:
    """What the verdicts add up to, told as they come."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self.played = 0
        self.failed: list[int] = []
        self._seconds = 0.0
        self._snapshots = 0
        self._killed_at: Counter[str] = Counter()

    def hear(self, verdict: Verdict, base: Path) -> None:
        self.played += 1
        self._seconds += verdict.seconds
        self._snapshots += verdict.snapshots
        self._killed_at.update(verdict.killed_at)
        if verdict.wrong:
            self.failed.append(verdict.seed)
            say("", "FAILED", str(make_plan(verdict.seed)))
            say(*(f"- {line}" for line in verdict.wrong[:20]))
            say(f"kept: {base}", f"again: scripts/crash --seed {verdict.seed}", "")
            return
        say(f"seed {verdict.seed}: {verdict.seconds:.1f} s, {verdict.snapshots} snapshots")
        if not self._keep:
            mounts.remove_base(base)

    def tell(self) -> None:
        say(
            f"{self.played} seeds, {len(self.failed)} failed {self.failed or ''}; {self._snapshots} "
            f"snapshots, {self._seconds / max(1, self.played):.1f} s a seed",
            "killed at: " + ", ".join(f"{step} {self._killed_at[step]}" for step in STEPS),
        )


def say(*lines: str) -> None:
    """Lines for people, at once. What is not UTF-8 is shown escaped."""
    for line in lines:
        sys.stdout.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/crash", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="the first (default: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="J", help="how many at a time")
    parser.add_argument("--keep", action="store_true", help="keep the directories of good seeds, too")
    parser.add_argument("--plan", action="store_true", help="only print what would happen")
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    if options.plan:
        say(*map(str, map(make_plan, seeds)))
        return 0
    account = Account(keep=options.keep)
    try:
        Players(Path(tempfile.gettempdir()), options.jobs, account.hear).play(iter(seeds))
    except KeyboardInterrupt:
        say("interrupted")
    account.tell()
    return 1 if account.failed or account.played < options.seeds else 0
