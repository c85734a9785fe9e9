"""The manifests of docs/examples/kubernetes: right for Kubernetes, for our own programs, and for security."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ordinary import CHECKOUT
from pods import Document, documents

from agentfuse.cli import VERBS, application
from agentfuse.config import load_config

MANIFESTS = sorted((Path(CHECKOUT) / "docs/examples/kubernetes").glob("*.yaml"))
OBJECTS = [(path.stem, each) for path in MANIFESTS for each in documents(path)]
VERSIONS = ("1.29", kubernetes_validate.latest_version())  # the first with native sidecars, and the newest
PROGRAMS = {"agentfuse", "agentfuse-mount-helper", "agentfuse-sidecar"}


def validate(found: Document) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(found, version, strict=True)


def pod_specs() -> Iterator[tuple[str, Document]]:
    for _, found in OBJECTS:
        if found["kind"] == "Pod":
            yield found["metadata"]["name"], found["spec"]
        elif "template" in found.get("spec", {}):
            yield found["metadata"]["name"], found["spec"]["template"]["spec"]


def containers() -> Iterator[tuple[str, Document, Document]]:
    for name, spec in pod_specs():
        for each in (*spec.get("initContainers", []), *spec["containers"]):
            yield f"{name}-{each['name']}", spec, each


def command_lines(container: Document) -> Iterator[list[str]]:
    """Everything that a container, its probes and its hooks run, a shell's script by its lines."""
    hooks = container.get("lifecycle", {}).values()
    probes = [value for key, value in container.items() if key.endswith("Probe")]
    words = [container.get("command", []) + container.get("args", [])]
    words += [each["exec"]["command"] for each in (*hooks, *probes) if "exec" in each]
    for each in words:
        yield each
        if each[:1] == ["sh"]:
            for line in re.split(r"[\n;&|]+", each[-1]):
                yield shlex.split(line, comments=True)


EACH_OBJECT = pytest.mark.parametrize(
    "found", [e for _, e in OBJECTS], ids=[f"{e['kind']}-{e['metadata']['name']}" for _, e in OBJECTS]
)
EACH_CONTAINER = pytest.mark.parametrize(
    ("spec", "container"), [each[1:] for each in containers()], ids=[each[0] for each in containers()]
)


def test_there_are_manifests() -> None:
    assert {each["kind"] for _, each in OBJECTS} >= {"Pod", "ConfigMap", "DaemonSet", "Service"}


@EACH_OBJECT
def test_a_manifest_is_what_kubernetes_takes(found: Document) -> None:
    validate(found)
    wrong = copy.deepcopy(found)
    wrong["metadata"]["lables"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="lables"):
        validate(wrong)
    assert "namespace" not in found["metadata"]  # it is the reader's to choose


def test_mistakes_deep_in_a_manifest_are_noticed() -> None:
    pod = next(found for _, found in OBJECTS if found["kind"] == "Pod")
    for key, value in (("mountPropagtion", "None"), ("readOnly", "yes")):
        wrong = copy.deepcopy(pod)
        wrong["spec"]["initContainers"][0]["volumeMounts"][0][key] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(wrong)


@EACH_CONTAINER
def test_a_container_refers_to_what_is_there(spec: Document, container: Document) -> None:
    volumes = {each["name"] for each in spec["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} <= volumes
    made = {each["metadata"]["name"] for _, each in OBJECTS if each["kind"] == "ConfigMap"}
    comments = "".join(path.read_text() for path in MANIFESTS)
    made |= set(re.findall(r"^#   kubectl create secret generic (\S+) --from-", comments, re.MULTILINE))
    for volume in spec["volumes"]:
        for source, key in (("configMap", "name"), ("secret", "secretName")):
            assert source not in volume or volume[source][key] in made
    known = {each["name"] for each in container.get("env", [])}
    for words in command_lines(container):
        assert set(re.findall(r"\$\((\w+)\)", " ".join(words))) <= known
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}


@EACH_CONTAINER
def test_only_what_must_be_is_privileged(spec: Document, container: Document) -> None:
    security = container["securityContext"]
    propagation = {each.get("mountPropagation") for each in container["volumeMounts"]}
    if "Bidirectional" in propagation:  # which Kubernetes gives to nobody else
        assert security["privileged"] is True
        return
    assert security == {
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@pytest.mark.parametrize("spec", [s for _, s in pod_specs()], ids=[name for name, _ in pod_specs()])
def test_a_pod_gives_nothing_of_the_cluster_or_the_node(spec: Document) -> None:
    assert spec["automountServiceAccountToken"] is False
    assert not spec.keys() & {
        "hostNetwork",
        "hostPID",
        "hostIPC",
        "shareProcessNamespace",
        "serviceAccountName",
    }


def test_the_agents_container_sees_neither_credentials_nor_state() -> None:
    (spec,) = (found["spec"] for _, found in OBJECTS if found["kind"] == "Pod")
    (agent,) = spec["containers"]
    kinds = {each["name"]: set(each) - {"name"} for each in spec["volumes"]}
    assert {kind for each in agent["volumeMounts"] for kind in kinds[each["name"]]} == {"emptyDir"}
    assert all("valueFrom" not in each for each in agent["env"]) and "envFrom" not in agent
    assert agent["volumeMounts"][0]["readOnly"] is True
    for each in agent["command"]:
        assert "agentfuse" not in each


@EACH_CONTAINER
def test_our_command_lines_are_understood(spec: Document, container: Document) -> None:
    command: Any = application(dict.fromkeys(VERBS.values()))
    for words in command_lines(container):
        if not PROGRAMS & set(words):
            continue
        at = next(number for number, word in enumerate(words) if word in PROGRAMS)
        arguments = [re.sub(r"\$\(?\w+\)?", "x", word) for word in words[at + 1 :]]
        if words[at] == "agentfuse":
            verb = command.commands[arguments[0]]
            verb.make_context(arguments[0], arguments[1:])
        else:
            assert words[at] == "agentfuse-sidecar" and len(arguments) == 2


@pytest.mark.parametrize(
    "found", [e for _, e in OBJECTS if e["kind"] == "ConfigMap"], ids=lambda found: found["metadata"]["name"]
)
def test_a_configuration_has_no_mistake(found: Document, tmp_path: Path) -> None:
    assert set(found["data"]) == {"config.toml"}
    path = tmp_path / "config.toml"
    path.write_text(found["data"]["config.toml"].replace("POD_IP", "10.0.0.5"))
    load_config(path, environ={}, overrides={"state": "/var/lib/agentfuse"})
