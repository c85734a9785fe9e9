"""The pages that are made from the code say what the code says now, and so do man pages and completions."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from agentfuse import admission, config
from agentfuse.cli import VERBS, completion

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("generate_docs", str(ROOT / "scripts/generate-docs"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli", "configuration"])
def test_a_generated_page_is_up_to_date(generator: ModuleType, page: str) -> None:
    assert (ROOT / f"docs/{page}.md").read_text() == getattr(generator, page)(), "run scripts/generate-docs"


def test_every_key_of_the_configuration_is_on_its_page() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    keys = {*config._TOP, *config._GATEWAY, *config._QUOTA, *admission.KEY_KEYS, *config._REGION}
    assert keys - set(re.findall(r"^\| \*?`(\w+)`", page, re.MULTILINE)) == set()


def test_every_verb_has_a_man_page_without_a_mistake(generator: ModuleType, tmp_path: Path) -> None:
    generator.man(tmp_path)
    pages = {path.name: path for path in tmp_path.glob("man?/*")}
    assert {f"agentfuse-{verb}.1" for verb in VERBS} <= set(pages)
    command = ["groff", "-man", "-Tutf8", "-ww", *sorted(pages.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(f"AGENTFUSE-{verb.upper()}(1)" in done.stdout for verb in VERBS)
    assert done.stderr == ""
    assert pages["agentfuse.toml.5"].parent.name == "man5"
    assert "checkpoint_interval" in pages["agentfuse.toml.5"].read_text()
    assert "owner=..." in pages["mount.agentfuse.8"].read_text()


def test_a_shell_completes_verbs_and_their_options(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    verbs = dict(completion._verbs())
    assert set(verbs) == set(VERBS)
    script.write_text(completion._bash(verbs))
    code = "source {}; COMP_WORDS=(agentfuse {}); COMP_CWORD={}; _agentfuse; echo ${{COMPREPLY[@]}}"
    for words, expected in (("umo", "umount"), ("mount --ow", "--owner"), ("gc --keep-d", "--keep-daily")):
        filled = code.format(script, words, len(words.split()))
        assert subprocess.check_output(["bash", "-c", filled], text=True).split() == [expected]
    for shell in ("zsh", "fish"):
        said = subprocess.check_output([sys.executable, "-m", "agentfuse", "completion", shell], text=True)
        assert all(verb in said for verb in VERBS)
