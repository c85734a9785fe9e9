"""Pages point to what there is: files, headings, tests, verbs and their options."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from agentfuse import killpoints
from agentfuse.cli import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
PROSE = {"itself", "snapshot", "daemons"}  # what follows the name in code and is no verb
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
CODE = re.compile(r"^```.*?^```|`[^`]+`", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    words = (re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in headings)
    return {re.sub(r"[^\w -]", "", each).replace(" ", "-") for each in words}


def links(page: Path) -> list[tuple[Path, str]]:
    """Where a page's relative links lead: a file, and an anchor or nothing."""
    found = [each.partition("#") for each in LINK.findall(FENCE.sub("", page.read_text())) if ":" not in each]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {target.name}#{anchor}"


def test_every_page_can_be_reached_from_the_first() -> None:
    reached, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        left += [target for target, _ in links(page) if target in PAGES and target not in reached]
    assert [page.name for page in PAGES if page not in reached] == [], "link it from the README"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_and_module_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"(?<![\w/.-])((?:tests|agentfuse|scripts|systemd)/[\w./@-]*\w)", page.read_text())
    assert [each for each in named if not (ROOT / each).exists() and not list(ROOT.glob(f"{each}*"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_verb_and_option_that_a_page_mentions_is_there(page: Path) -> None:
    helps = re.split(r"^### ", (ROOT / "docs/cli.md").read_text(), flags=re.MULTILINE)
    options: dict[str, set[str]] = {}
    for each in helps[1:]:
        options.setdefault(each.split()[0], set()).update(OPTION.findall(each))
    code = "\n".join(CODE.findall(page.read_text().replace("\\\n", " ")))
    for verb, rest in re.findall(r"\bagentfuse ([a-z][a-z-]+)\b([^\n|;&`#]*)", code):
        if verb in PROSE:
            continue
        assert verb in VERBS, f"{page.name}: agentfuse {verb}"
        own = rest.partition(" -- ")[0]
        unknown = set(OPTION.findall(own)) - options[verb]
        assert not unknown, f"{page.name}: agentfuse {verb} {unknown}"


def test_every_proof_that_the_security_page_names_is_there() -> None:
    page = (ROOT / "docs/security.md").read_text()
    files = set(re.findall(r"`(\w+/test_\w+\.py)`", page))
    assert len(files) > 30
    assert [each for each in files if not (ROOT / "tests" / each).is_file()] == []
    for file, test in re.findall(r"`(\w+/test_\w+\.py)` \(`(test_\w+)`\)", page):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}: {test}"


def test_the_layers_of_the_architecture_are_those_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    _, _, block = (ROOT / "docs/architecture.md").read_text().partition("\n```\n")
    shown = [re.split(r"  +", line)[0] for line in block.partition("\n```")[0].splitlines()]
    assert shown == [each.replace("agentfuse.", "") for each in layers]


def test_every_step_to_be_killed_at_is_on_the_page_of_the_architecture() -> None:
    named = re.findall(r"`([a-z]+)\.([a-z…-]+)`", (ROOT / "docs/architecture.md").read_text())
    known = {f"{group}.{step}" for group, step in named} | {group for group, step in named if step == "…"}
    steps = get_args(killpoints.Step)
    assert [each for each in steps if each not in known and each.partition(".")[0] not in known] == []
