"""What a kubelet does with a pod, done with podman: so that manifests can be tried without a cluster.

It starts sidecars one after the other, each when the startup probe of the one before succeeds, then the
other containers. It ends a pod as kubelet's killContainer does: every preStop hook at once; containers that
are no sidecars get SIGTERM, a sidecar when all after it have ended; at the end of the grace, which runs for
all of them together, SIGKILL, but nobody has less than 2 s. What is not played here is refused.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from containers import Engine
from mounts import eventually, mountpoints_below

_LEAST_GRACE_S = 2.0
_STARTED_S = 60.0
_PROPAGATION = {"Bidirectional": "rshared", "HostToContainer": "rslave"}
_PROBED_BY_NOBODY = {"readinessProbe", "livenessProbe", "resources", "ports", "terminationMessagePolicy"}
_GET = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
_numbers = itertools.count()

Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    """The objects of a manifest."""
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


def one(found: Iterable[Document], kind: str, name: str | None = None) -> Document:
    """The object of a kind, and of a name if there are more."""
    (only,) = (e for e in found if e["kind"] == kind and name in (None, e["metadata"]["name"]))
    return only


class Pod:
    """A pod of this spec on a host whose directory is ``host``.

    ``files``: what the volumes of ConfigMaps and Secrets hold, by name.
    """

    def __init__(
        self, engine: Engine, spec: Document, host: Path, files: Mapping[str, Mapping[str, str]]
    ) -> None:
        self.uid = str(uuid.uuid4())
        self.spec = spec
        self.mains = [Container(self, each) for each in spec["containers"]]
        self.inits = [Container(self, each) for each in spec.get("initContainers", [])]
        self.engine = engine
        self.address = "127.0.0.1"
        self._base = host / "pods" / self.uid
        self._volumes: dict[str, Path] = {}
        for volume in spec["volumes"]:
            self._volumes[volume["name"]] = self._volume(volume, host, files)

    def _volume(self, volume: Document, host: Path, files: Mapping[str, Mapping[str, str]]) -> Path:
        path = self._base / volume["name"]
        if "hostPath" in volume:
            path = host / volume["hostPath"]["path"].lstrip("/")
        path.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            path.chmod(0o777)
        for source, key in (("configMap", "name"), ("secret", "secretName")):
            if source in volume:
                for name, text in files[volume[source][key]].items():
                    (path / name).write_text(text)
        mounts = [m for c in (*self.mains, *self.inits) for m in c.spec.get("volumeMounts", [])]
        if any(m["name"] == volume["name"] and "mountPropagation" in m for m in mounts):
            subprocess.run(["mount", "--bind", path, path], check=True)  # as all of a host is: shared
            subprocess.run(["mount", "--make-shared", path], check=True)
        return path

    def volume(self, name: str) -> Path:
        """Where the host has a volume."""
        return self._volumes[name]

    def start(self) -> None:
        """Return when all containers run."""
        for each in self.inits:
            each.start()
            if each.is_sidecar:
                each.wait_started()
            else:
                assert each.process.wait(_STARTED_S) == 0, each.log()
        for each in self.mains:
            each.start()

    def end(self, grace_s: float | None = None) -> float:
        """End it, as when it is deleted or its main containers have ended; how long that took."""
        began = time.monotonic()
        deadline = began + (self.spec["terminationGracePeriodSeconds"] if grace_s is None else grace_s)
        sidecars = [each for each in self.inits if each.is_sidecar]
        order: list[tuple[Container, list[Container]]] = [(each, []) for each in self.mains]
        for number, each in enumerate(sidecars):
            order.append((each, [*self.mains, *sidecars[number + 1 :]]))
        threads = [threading.Thread(target=each.end, args=(began, deadline, after)) for each, after in order]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - began

    def discard(self) -> None:
        """Nothing of it stays but what is on the host."""
        for each in (*self.mains, *self.inits):
            each.kill("KILL")
        for volume in self._volumes.values():
            for path in reversed(mountpoints_below(volume.parent)):
                if path.is_relative_to(volume):
                    subprocess.run(["umount", "-l", path], check=True)
            subprocess.run(["chattr", "-R", "-i", volume], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self._base)


class Container:
    """One container of a pod. ``told``: what was done to end it, and when, in seconds from the begin;
    ``hook``: how its preStop ended."""

    def __init__(self, pod: Pod, spec: Document) -> None:
        self.pod = pod
        self.spec = spec
        self.is_sidecar = spec.get("restartPolicy") == "Always"
        self.told: dict[str, float] = {}
        self.hook = ""
        self._name = ""
        self._log: Path
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Run it; once more after its end, as a new container on the same volumes."""
        self._name = f"{self.spec['name']}-{next(_numbers)}"
        self._log = self.pod._base / f"{self._name}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._engine("run", *self._options(), *self._command()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.pod.engine.environment,
            )

    def wait_started(self) -> None:
        """Return when the startup probe succeeds."""
        probe = self.spec["startupProbe"]
        if "exec" in probe:
            command = probe["exec"]["command"]
        else:
            asked = probe["httpGet"]
            (port,) = (e["containerPort"] for e in self.spec["ports"] if e["name"] == asked["port"])
            command = ["python3", "-c", _GET, f"http://{self.pod.address}:{port}{asked['path']}"]

        def succeeds() -> bool:
            assert self.process.poll() is None, self.log()
            return self.execute(*command).returncode == 0

        eventually(succeeds, _STARTED_S)

    def execute(self, *command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as a probe or a hook does."""
        return subprocess.run(
            self._engine("exec", self._name, *command),
            env=self.pod.engine.environment, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def end(self, began: float, deadline: float, after: list[Container]) -> None:
        """What kubelet does with one container; its turn comes when those ``after`` it have ended."""
        self.told = {}
        hook = self.spec.get("lifecycle", {}).get("preStop")
        if hook is not None and self.process.poll() is None:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                done = self.execute(*self._expanded(hook["exec"]["command"]), timeout_s=left_s)
                self.hook = f"exit code {done.returncode}: {done.stdout}{done.stderr}"
            except subprocess.TimeoutExpired:
                self.hook = "took all of the grace"
            self.told["preStop"] = time.monotonic() - began
        for each in after:
            each.wait(deadline)
        deadline = max(deadline, time.monotonic() + _LEAST_GRACE_S)
        self.told["SIGTERM"] = time.monotonic() - began
        self.kill("TERM")
        if not self.wait(deadline):
            self.told["SIGKILL"] = time.monotonic() - began
            self.kill("KILL")
            self.process.wait()
        self.told["ended"] = time.monotonic() - began

    def wait(self, deadline: float) -> bool:
        """Whether it ends before then."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, number: str) -> None:
        """Send its first process a signal; nothing if it has ended."""
        if self._name and self.process.poll() is None:
            subprocess.run(
                self._engine("kill", "--signal", number, self._name),
                env=self.pod.engine.environment, capture_output=True, check=False,
            )  # fmt: skip
            if number == "KILL":
                self.process.wait()

    def log(self) -> str:
        """What its last run said."""
        return self._log.read_text(errors="replace")

    def _engine(self, *words: str) -> list[str]:
        return [self.pod.engine.environment["ENGINE"], *words]

    def _options(self) -> list[str]:
        said = dict(self.spec)
        security = dict(said.pop("securityContext", {}))
        options = ["--rm", "--name", self._name]
        if security.pop("privileged", False):
            options.append("--privileged")
        if not security.pop("allowPrivilegeEscalation", True):
            options.append("--security-opt=no-new-privileges")
        if security.pop("readOnlyRootFilesystem", False):
            options += ["--read-only", "--read-only-tmpfs=false"]
        else:
            options.append("--tmpfs=/run")  # each container's own, as all of its filesystem should be
        for each in security.pop("capabilities", {}).get("drop", []):
            options.append(f"--cap-drop={each.lower()}")
        uid, gid = security.pop("runAsUser", 0), security.pop("runAsGroup", 0)
        options.append(f"--user={uid}:{gid}")
        assert not security.pop("runAsNonRoot", False) or uid
        assert security.pop("seccompProfile", {"type": "RuntimeDefault"}) == {"type": "RuntimeDefault"}
        assert not security, f"not played: {security}"
        for name, value in self._environment().items():
            options.append(f"--env={name}={value}")
        for mount in said.pop("volumeMounts"):
            flags = _PROPAGATION.get(mount.get("mountPropagation", ""), "rprivate")
            flags += ",ro" if mount.get("readOnly") else ""
            assert not mount.keys() - {"name", "mountPath", "mountPropagation", "readOnly"}, mount
            options.append(f"--volume={self.pod.volume(mount['name'])}:{mount['mountPath']}:{flags}")
        options.append(f"--workdir={said.pop('workingDir', '/')}")
        known = {"name", "image", "command", "args", "env", "restartPolicy", "startupProbe", "lifecycle"}
        assert not said.keys() - known - _PROBED_BY_NOBODY, f"not played: {said}"
        return [*options, *self.pod.engine.environment["IMAGE"].split()]

    def _environment(self) -> dict[str, str]:
        fields = {"metadata.uid": self.pod.uid, "status.podIP": self.pod.address}
        values: dict[str, str] = {}
        for each in self.spec.get("env", []):
            if "valueFrom" in each:
                values[each["name"]] = fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
            else:
                values[each["name"]] = each["value"]
        return values

    def _command(self) -> list[str]:
        return self._expanded([*self.spec.get("command", []), *self.spec.get("args", [])])

    def _expanded(self, words: list[str]) -> list[str]:
        """With ``$(NAME)`` of its environment replaced, as Kubernetes does."""
        known = self._environment()
        return [re.sub(r"\$\((\w+)\)", lambda match: known.get(match[1], match[0]), word) for word in words]
