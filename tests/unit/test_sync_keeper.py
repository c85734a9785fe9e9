"""A home's life beside its mount: opened, flushed, finished by a later run, and what must stop it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hydrating import bring_all

from agentfuse.config import Config, load_config
from agentfuse.errors import StoreError, UsageError
from agentfuse.home.tree import Home
from agentfuse.progress import Silent
from agentfuse.sync import keeper as keeper_module
from agentfuse.sync.keeper import HomeKeeper
from agentfuse.sync.recovery import held

Open = Callable[..., HomeKeeper]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, environ={}, overrides={"state": str(tmp_path / "state"), "keep_ended": "24h"})


@pytest.fixture
def open_home(config: Config) -> Open:
    def open_home(execution: str, agent: str = "a", state: Config = config) -> HomeKeeper:
        home = Home(state.state, execution)
        home.path.mkdir(parents=True, exist_ok=True)
        keeper = HomeKeeper(
            state, home, agent=agent, mountpoint=Path("/nowhere"), ephemeral=False, reporter=Silent()
        )
        keeper.open()
        return keeper

    return open_home


def note_of(keeper: HomeKeeper) -> str:
    bring_all(keeper.absent)
    return (keeper.home.tree / "shared" / "note").read_text()


def test_the_next_execution_remembers_shared_and_nothing_else(open_home: Open) -> None:
    first = open_home("one")
    (first.home.tree / "shared" / "note").write_text("remember")
    (first.home.tree / "workspace" / "scratch").write_text("forget")
    first.flush(Silent())
    first.end()
    second = open_home("two")
    assert note_of(second) == "remember"
    assert os.listdir(second.home.tree / "workspace") == []


def test_an_execution_that_ended_cleanly_finds_its_workspace_again(open_home: Open) -> None:
    first = open_home("one")
    (first.home.tree / "workspace" / "scratch").write_text("mine")
    first.flush(Silent())
    first.end()
    assert (open_home("one").home.tree / "workspace" / "scratch").read_text() == "mine"


def test_what_a_run_could_not_flush_the_next_one_finishes(open_home: Open) -> None:
    crashed = open_home("one")
    (crashed.home.tree / "shared" / "note").write_text("unflushed")
    assert note_of(open_home("two")) == "unflushed"
    record = crashed.home.record()
    assert record is not None
    assert record.status == "clean"


def test_only_unfinished_homes_of_the_agent_itself_are_tried(
    open_home: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(keeper_module, "held", lambda home: tried.append(home.execution) or held(home))
    with open_home("of another", agent="b").home.locked():
        open_home("one", agent="a")
        assert tried == []  # each would take a quarter of a second, while a daemon holds it
    open_home("two", agent="a")
    assert tried[0] == "one"


def test_an_ended_home_stays_while_webhooks_have_not_taken_its_events(
    open_home: Open, config: Config, tmp_path: Path
) -> None:
    table = '[[webhooks]]\nurl = "https://x.example"\nsecret_env = "X"\n'
    (tmp_path / "config.toml").write_text(table)
    overrides = {"state": str(config.state), "keep_ended": "0s"}
    hooked = load_config(tmp_path / "config.toml", environ={}, overrides=overrides)
    open_home("told", state=hooked).end()
    open_home("untold", state=hooked).end(undelivered=True)
    open_home("killed", state=hooked).home.events.touch()
    open_home("next", state=hooked)
    assert sorted(os.listdir(config.state / "homes")) == ["killed", "next", "untold"]
    open_home("later", state=hooked)
    assert sorted(os.listdir(config.state / "homes")) == ["killed", "later", "next", "untold"]


def test_a_run_that_did_not_end_is_resumed_as_it_was(open_home: Open) -> None:
    crashed = open_home("one")
    (crashed.home.tree / "shared" / "note").write_text("unflushed")
    resumed = open_home("one")
    assert resumed.resumed
    assert (resumed.home.tree / "shared" / "note").read_text() == "unflushed"


def test_a_store_that_vanished_is_not_taken_for_an_empty_one(open_home: Open, config: Config) -> None:
    store = config.state / "store"
    first = open_home("one")
    (first.home.tree / "shared" / "note").write_text("v1")
    store.rename(config.state / "elsewhere")
    with pytest.raises(StoreError, match="it was there and is gone"):
        first.flush(Silent())
    with pytest.raises(StoreError, match="it was there and is gone"):
        open_home("two")
    (config.state / "elsewhere").rename(store)
    assert note_of(open_home("two")) == "v1"


def test_a_new_store_in_place_of_a_vanished_one_is_made_only_on_purpose(
    open_home: Open, config: Config
) -> None:
    open_home("one").end()
    shutil.rmtree(config.state / "store")
    with pytest.raises(StoreError, match="remove stores/"):
        open_home("two")
    shutil.rmtree(config.state / "stores")
    open_home("two")


def test_strangers_among_the_homes_are_passed_over(open_home: Open, config: Config) -> None:
    (config.state / "homes").mkdir(parents=True)
    (config.state / "homes" / "a-file").touch()
    (config.state / "homes" / "a-link").symlink_to("/etc")
    (config.state / "homes" / "empty").mkdir()
    open_home("one")


def test_an_execution_belongs_to_one_agent(open_home: Open) -> None:
    open_home("one")
    with pytest.raises(UsageError, match="belongs to agent a"):
        open_home("one", agent="b")


def test_times_that_no_document_can_hold_are_kept_as_far_as_it_can(open_home: Open) -> None:
    # Only some filesystems keep such times: tmpfs does.
    base = Path("/dev/shm") / f"agentfuse-test-{os.getpid()}"
    overrides = {"state": str(base / "state"), "store": f"file://{base}/store"}
    config = load_config(None, environ={}, overrides=overrides)
    try:
        first = open_home("one", state=config)
        note = first.home.tree / "shared" / "note"
        note.touch()
        os.utime(note, (99_999_999_999_999, 99_999_999_999_999))
        first.flush(Silent())
        first.end()
        second = open_home("two", state=config)
        assert (second.home.tree / "shared" / "note").stat().st_mtime_ns // 10**9 == 999_999_999_999
    finally:
        shutil.rmtree(base)
