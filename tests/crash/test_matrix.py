"""The crash matrix on some seeds, and its judge, which must find what is wrong.

AGENTFUSE_CRASH_SEEDS says how many, AGENTFUSE_CRASH_SEED with which to begin; scripts/crash plays more.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.actor import Acknowledged, Began, Does, Done, Journal, read_journal
from crash.hosts import AGENT, Place
from crash.judge import Judge
from crash.plan import make_plan
from crash.steps import DATABASE, Step
from crash.story import Story

pytestmark = pytest.mark.mount

ROOT = Path(__file__).parent.parent.parent
SEEDS = os.environ.get("AGENTFUSE_CRASH_SEEDS", "100")
FIRST = os.environ.get("AGENTFUSE_CRASH_SEED", "1")


def crash(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/crash; what it keeps is in a directory."""
    environ = {**os.environ, "TMPDIR": str(directory)}
    command = [ROOT / "scripts" / "crash", *options]
    return subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.mark.timeout(900)
def test_nothing_is_lost_whatever_dies_and_whatever_fails(tmp_path: Path) -> None:
    done = crash(tmp_path, "--seed", FIRST, "--seeds", SEEDS)
    assert done.returncode == 0, done.stdout[-20_000:]


# The judge: one seed, played well, and then something is wrong with it.


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A seed of one execution and one life that ended in peace, of which nothing runs any more.

    It waited for two syncs, with changes around each: so there are three snapshots or more, on any machine.
    """

    def is_plain(seed: int) -> bool:
        lives = [life for actor in make_plan(seed).actors for life in actor.lives]
        if len(lives) > 1 or lives[0].actions < 60:
            return False
        life = lives[0]
        first, second = life.syncs if len(life.syncs) == 2 else (0, 0)
        waits = not life.background and 10 < first < second - 10 < 40
        return waits and life.kill is None and not life.faults

    seed = next(filter(is_plain, range(100_000)))
    directory = tmp_path_factory.mktemp("played")
    done = crash(directory, "--seed", str(seed), "--keep")
    assert done.returncode == 0, done.stdout
    (base,) = directory.iterdir()
    return Place(base, make_plan(seed))


def with_copy(place: Place, directory: Path) -> Place:
    subprocess.run(["cp", "-a", place.base, directory / "copy"], check=True)
    return Place(directory / "copy", place.plan)


def journal_of(place: Place) -> Path:
    return place.journal(place.plan.actors[0].execution)


def snapshots_of(place: Place) -> list[Path]:
    return sorted((place.store / "agents" / AGENT / "shared" / "snapshots").iterdir())


def lose_the_newest_snapshot(place: Place) -> None:
    snapshots_of(place)[-1].unlink()


def lose_a_snapshot_in_between(place: Place) -> None:
    snapshots_of(place)[-2].unlink()


def flip_a_bit_of_an_object(place: Place) -> None:
    objects = (place.store / "agents" / AGENT / "objects").rglob("*")
    largest = max((path for path in objects if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def claim_a_write_that_never_was(place: Place) -> None:
    journal, token = Journal(journal_of(place)), "e0.9999"
    for step in (
        Step("create", "common/more", handle=99, mode=0o644),
        Step("append", handle=99, size=5, token=token, is_text=True),
        Step("close", handle=99),
    ):
        journal.write(Does(step))
        journal.write(Done())


def claim_that_it_was_acknowledged(place: Place) -> None:
    claim_a_write_that_never_was(place)
    Journal(journal_of(place)).write(Acknowledged(0, len(snapshots_of(place))))


def claim_a_removal_that_never_was(place: Place) -> None:
    story = Story(place, place.plan.actors[0])
    files = story.sessions[-1].ends[-1].of_kind("file", story.own)
    journal = Journal(journal_of(place))
    journal.write(Does(Step("unlink", next(path for path in files if not DATABASE.search(path)))))
    journal.write(Done())


def claim_another_restored_tree(place: Place) -> None:
    records = list(read_journal(journal_of(place)))
    journal_of(place).unlink()
    journal = Journal(journal_of(place))
    for record in records:
        if isinstance(record, Began):
            record.tree.apply(Step("mkdir", "found-in-the-home", mode=0o755))
        journal.write(record)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lose_the_newest_snapshot, "is gone"),
        (lose_a_snapshot_in_between, "numbers with gaps"),
        (flip_a_bit_of_an_object, "holds other bytes"),
        (claim_a_write_that_never_was, "lost, left by"),
        (claim_that_it_was_acknowledged, "lost, acknowledged to"),
        (claim_a_removal_that_never_was, "not in the newest snapshot as it was left"),
        (claim_another_restored_tree, "was restored to what no snapshot"),
    ],
)
def test_the_judge_finds(played: Place, tmp_path: Path, damage: Callable[[Place], None], found: str) -> None:
    place = with_copy(played, tmp_path)
    assert Judge(place).wrong() == []
    damage(place)
    wrong = Judge(place).wrong()
    assert any(found in line for line in wrong), wrong
