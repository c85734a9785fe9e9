"""The examples of docs/semantics.md, run in a home: what they show is what happens."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.mount

PAGE = Path(__file__).parents[2] / "docs" / "semantics.md"
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL)


def steps(block: str) -> list[tuple[str, str]]:
    """The commands of a block, each with the output that the page shows."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("block", BLOCKS)
def test_example_of_the_semantics_page_is_true(work: Path, block: str) -> None:
    for command, expected in steps(block):
        done = subprocess.run(
            ["bash", "-c", command], cwd=work, env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        pattern = re.sub(r"([\[?*])", r"[\1]", expected).replace("...", "*")
        assert fnmatch.fnmatchcase(done.stdout, pattern), f"{command}\nprinted {done.stdout!r}"


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 3
