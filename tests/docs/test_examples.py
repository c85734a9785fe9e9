"""What the pages show is what happens: their examples are played, as they are, by ``manuals.py``."""

from __future__ import annotations

from pathlib import Path

import manuals
import pytest
from mounts import base_directory, remove_base

pytestmark = pytest.mark.mount

PAGES = (
    "README",
    "docs/quickstart",
    "docs/concepts",
    "docs/control",
    "docs/events",
    "docs/history",
    "docs/gateway",
)


@pytest.mark.parametrize("name", PAGES)
def test_examples_of_a_page_do_what_it_shows(name: str) -> None:
    page = manuals.ROOT / f"{name}.md"
    base = base_directory()
    try:
        with manuals.machine(base) as shell:
            for step in manuals.steps(page):
                wrong = shell.play(step)
                assert not wrong, wrong
    finally:
        remove_base(base)


def test_every_page_with_examples_is_played() -> None:
    pages = [manuals.ROOT / "README.md", *(manuals.ROOT / "docs").glob("*.md")]
    having = {
        str(page.relative_to(manuals.ROOT).with_suffix("")) for page in pages if list(manuals.steps(page))
    }
    assert having == {*PAGES, "docs/semantics"}  # that one by fuse/test_docs.py


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ("a file\n", "no file\n"),
        ("one\n", "one\ntwo\n"),
        ("one\n…\ntwo\n", "one\nthree\n"),
        ("3 files\n", "4 files\n"),
        ("", "something\n"),
    ],
)
def test_another_output_is_noticed(shown: str, said: str) -> None:
    assert not manuals.matches(shown, said)
    assert manuals.matches(said, said)


def test_what_varies_may_vary() -> None:
    shown = "ready: 0c1d8f2a-0000-4000-8000-123456789abc, pid 7\n…\nsent in 2.1 s  at 2026-03-02 10:15:30\n"
    said = (
        "ready: 8ef0ce8d-2964-4947-b1c0-b7b8544e21ab, pid 812\na\nb\nsent in 11.52 s at 2027-01-12 23:59:59\n"
    )
    assert manuals.matches(shown, said)
    assert manuals.matches("done\n", "restoring: 1 of 2 files, 3 B of 9 B\ndone\n")


def test_a_command_that_fails_unseen_is_noticed(tmp_path: Path) -> None:
    with manuals.machine(tmp_path) as shell:
        assert shell.play(manuals.Step("echo fine; false", "fine\n"))
        assert not shell.play(
            manuals.Step("ls /none", "ls: cannot access '/none': No such file or directory\n")
        )
        assert shell.play(manuals.Step("exit 3", ""))
