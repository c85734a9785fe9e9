"""Alerts ask for metrics that there are, and the runbook has each."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from agentfuse.errors import AgentfuseError
from agentfuse.gateway.executions.life import PHASES
from agentfuse.gateway.metrics import Metrics
from agentfuse.metrics.families import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "operate.md").read_text()
OTHERS = {"node_textfile_mtime_seconds", "up"}  # node_exporter's, and Prometheus' own


def gateway_families() -> dict[str, tuple[str, list[str]]]:
    """What a gateway exports: of each family the kind, and the labels."""
    metrics = Metrics()
    metrics.begun()
    metrics.ended("shinzo", 200, 0.1)
    metrics.watch_executions(lambda _: 0, PHASES)
    found = {}
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = family.type, sorted(labels)
    return found


def alerts() -> dict[str, str]:
    """The expression of each alert."""
    groups = yaml.safe_load((DOCS / "examples/prometheus/alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def test_the_gateways_documented_metrics_are_what_there_is() -> None:
    rows = re.findall(r"^\| `(agentfuse_gateway_\w+)` \| (\w+) \| (.*?) \|", PAGE, re.MULTILINE)
    told = {name: (kind, sorted(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert told == gateway_families()


def test_alerts_ask_for_metrics_and_labels_that_there_are() -> None:
    known = {family.name: {"agent", "execution", *family.labels} for family in FAMILIES}
    known |= {name: set(labels) for name, (_, labels) in gateway_families().items()}
    for alert, expression in alerts().items():
        asked = re.findall(r"\b(agentfuse_\w+|node_\w+|up)\b(?:\{([^}]*)\})?", expression)
        assert asked, alert
        for name, conditions in asked:
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert family in known or family in OTHERS, f"{alert}: {name}"
            labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", conditions))
            assert labels <= known.get(family, {"file", "job"}), f"{alert}: {labels}"


def test_the_runbook_has_every_alert_and_no_other() -> None:
    assert re.findall(r"^### (Agentfuse\w+)$", PAGE, re.MULTILINE) == list(alerts())


def test_the_runbook_has_every_exit_code() -> None:
    codes = {kind.exit_code for kind in AgentfuseError.kinds()} | {0}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == codes
