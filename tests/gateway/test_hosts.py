"""Two hosts in network namespaces of their own, over one radosgw, which are cut off, stopped and killed.

What runs on them notes that it ran, so that nothing runs twice unseen; and what was closed in a home must be
found in the agent's memory, whatever became of the host.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import mounts
import networks
import pytest
import s3_servers
from gateways import ACME, DEADLINE_S, OTHER, SECRET, Gateway
from networks import CLIENTS, STORE, Namespace, is_alive

from agentfuse.gateway.hosts.proof import ANSWER_HEADER, Proofs
from agentfuse.gateway.hosts.roster import Roster
from agentfuse.objectstore import open_store

PORT = 8080
LEASE_S = 9
MIB = 1024 * 1024
CLUSTER_SECRET = "the-secret-of-this-cluster-0123456789abcdef"


@dataclass
class Member:
    """A host, with its gateway, which may be another one by and by."""

    base: Path
    place: Namespace
    store: str
    runs: Path
    said: str = ""
    gateway: Gateway = None  # type: ignore[assignment]  # until it is started

    @property
    def url(self) -> str:
        return f"http://{self.address}:{PORT}"

    @property
    def address(self) -> str:
        return self.place.address

    def start(self) -> None:
        """Start its gateway, or another one after it was killed."""
        secret = self.base / "cluster.secret"
        self.base.mkdir(exist_ok=True)
        secret.write_text(CLUSTER_SECRET)
        # It notes that it runs, closes a file that must not be lost, and goes on for ever.
        script = (
            f'echo "$AGENTFUSE_EXECUTION $$" >> {self.runs}; echo kept > shared/$1; echo; exec sleep 10000'
        )
        said = (
            f'advertise = "{self.url}"\ncluster_secret_file = "{secret}"\n'
            f'lease = "{LEASE_S}s"\nlauncher = ["/bin/sh", "-c", {script!r}, "sh", "{{execution}}.txt"]\n'
        )
        self.gateway = Gateway(
            self.base,
            self.store,
            gateway=self.said + said,
            listen=f"{self.address}:{PORT}",
            prefix=self.place.prefix,
        )
        assert self.gateway.url, (self.gateway.process.returncode, "".join(self.gateway.log))

    def client(self, key: str = ACME) -> httpx.Client:
        return self.gateway.client(key, transport=httpx.HTTPTransport(local_address=CLIENTS))

    def kill(self) -> None:
        self.gateway.process.kill()
        self.gateway.wait()


@dataclass
class Cluster:
    """Two hosts, and a desk that has them execute."""

    one: Member
    two: Member
    desk: Member
    runs: Path
    store: str

    def ran(self, execution: str) -> list[int]:
        """The pids of each time that an execution's launcher was begun."""
        lines = [line.split() for line in self.runs.read_text().splitlines()]
        return [int(pid) for found, pid in lines if found == execution]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("hosts")
    runs = base / "runs"
    runs.touch()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in s3_servers.ENVIRON.items():
            patch.setenv(name, value)
        middle, places = stack.enter_context(networks.network(hosts=3))
        stack.enter_context(middle.inside())
        server = stack.enter_context(s3_servers.radosgw(base, address="0.0.0.0"))
        server.make_bucket("hosts")
        seen = replace(server, endpoint=f"http://{STORE}:{server.endpoint.rpartition(':')[2]}")
        members = [
            Member(base / f"host{n}", place, seen.url("hosts"), runs) for n, place in enumerate(places)
        ]
        members[2].said = "executes = false\n"
        stack.callback(_clear, base, members)
        for member in members:
            member.start()
        yield Cluster(*members, runs, seen.url("hosts"))


def _clear(base: Path, members: list[Member]) -> None:
    """No process and no mount of these hosts remains."""
    for member in members:
        if member.gateway is not None:
            member.gateway.process.kill()
            member.gateway.wait()
    ours = f"\0{base}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            whose = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if ours in whose or f"={base}".encode() in whose:
            os.kill(int(process.name), signal.SIGKILL)
    for mountpoint in mounts.mountpoints_below(base):
        mounts.detach(mountpoint)


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def execute(member: Member, agent: str) -> str:
    """Begin an execution; returns when its launcher has run, and the file that it closed is there."""
    with member.client() as client:
        begun = client.post(f"/agents/v2/agents/{agent}/execute", json={})
        assert begun.status_code == 202, begun.text
        execution = str(begun.json()["executionId"])
        until(lambda: f"shared/{execution}.txt" in paths(client, execution), "the launcher's file")
    return execution


def status(member: Member, execution: str) -> str:
    with member.client() as client:
        answer = client.get(f"/agents/v2/executions/{execution}")
        assert answer.status_code == 200, answer.text
        return str(answer.json()["status"])


def paths(client: httpx.Client, execution: str) -> list[str]:
    answer = client.get(f"/agents/v2/executions/{execution}/files")
    if answer.status_code != 200:
        return []
    return [file["filePath"] for files in answer.json()["directories"].values() for file in files]


def kept(member: Member, agent: str) -> list[str]:
    """What the agent's memory holds."""
    with member.client() as client:
        answer = client.get(f"/agents/v2/agents/{agent}/shared-files")
        return [file["fileName"] for file in answer.json()["files"]] if answer.status_code == 200 else []


def test_a_request_for_another_hosts_execution_is_forwarded(cluster: Cluster) -> None:
    execution = execute(cluster.one, "agent-forward")
    there = f"/agents/v2/executions/{execution}"
    content = os.urandom(64 * MIB)
    with cluster.two.client() as client:
        before = rss_bytes(cluster.two)
        sent = client.post(f"{there}/context-files", files={"files": ("large.bin", content)})
        assert sent.status_code == 200, sent.text
        listed = client.get(f"{there}/files").json()
        (file,) = (file for file in listed["directories"]["uploads"] if file["fileName"] == "large.bin")
        asked = client.get(f"{there}/files/{file['id']}/download")
        assert asked.status_code == 303
        with httpx.Client(transport=httpx.HTTPTransport(local_address=CLIENTS), trust_env=False) as anybody:
            link = httpx.URL(cluster.two.gateway.url).join(asked.headers["location"])
            assert link.host == cluster.two.address
            got = anybody.get(link, timeout=DEADLINE_S)
            assert (got.status_code, got.headers["content-length"]) == (200, str(len(content)))
            assert got.content == content
            part = anybody.get(link, headers={"Range": "bytes=100-199"}, timeout=DEADLINE_S)
            assert (part.status_code, part.content) == (206, content[100:200])
            assert ANSWER_HEADER.decode() not in part.headers
        assert rss_bytes(cluster.two) - before < 40 * MIB
        assert [answer_to(client, there, change) for change in ("pause", "resume")] == ["paused", "running"]
        assert client.post(f"{there}/context-files", files={}).status_code == 400
    with cluster.two.client(OTHER) as stranger:
        assert stranger.get(f"{there}/files").status_code == 404
    with cluster.two.client("") as nobody:
        assert nobody.get(f"{there}/files").status_code == 401
    with cluster.two.client() as client:
        assert client.post(f"{there}/cancel").status_code == 200
    until(lambda: status(cluster.one, execution) == "cancelled", "the end")
    assert f"{execution}.txt" in kept(cluster.two, "agent-forward")
    assert len(cluster.ran(execution)) == 1


def test_the_page_of_any_host_shows_what_is_on_another_one(cluster: Cluster) -> None:
    execution = execute(cluster.one, "agent-page")
    there = f"/ui/executions/{execution}"
    with cluster.one.client("") as client:
        signed = client.post("/ui/sign-in", data={"key": ACME}, headers={"Origin": cluster.one.gateway.url})
        session = signed.headers["set-cookie"].partition(";")[0]
    with cluster.two.client("") as client:
        client.headers.update({"Cookie": session, "Origin": cluster.two.gateway.url})
        assert f'data-fragment="{there}/space"' in client.get("/ui/executions").text
        assert "50 MiB" in client.get(f"{there}/space").text
        sent = client.post(f"{there}/files?path=uploads", files={"files": ("given.txt", b"given")})
        assert sent.headers["location"] == f"{there}/files?path=uploads", sent.text
        assert "given.txt" in client.get(sent.headers["location"]).text
        assert client.get(f"{there}/content?path=uploads/given.txt").content == b"given"
        with client.stream("GET", f"{there}/arrivals") as answer:
            assert any(line.startswith("data: ") and "given.txt" in line for line in answer.iter_lines())
        elsewhere = {"Origin": "http://elsewhere.example"}
        assert client.post(f"{there}/cancel", headers=elsewhere).status_code == 403
        assert client.post(f"{there}/cancel").status_code == 303
        until(lambda: status(cluster.one, execution) == "cancelled", "the end")
        assert "given.txt" in client.get(f"{there}/files?path=uploads").text


def answer_to(client: httpx.Client, there: str, change: str) -> str:
    answer = client.post(f"{there}/{change}")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["status"])


def rss_bytes(member: Member) -> int:
    text = Path(f"/proc/{member.gateway.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found
    return int(found[1]) * 1024


def test_what_pretends_to_be_forwarded_is_refused_and_what_was_forwarded_goes_no_further(
    cluster: Cluster,
) -> None:
    execution = execute(cluster.one, "agent-smuggle")
    host, other = (ids(cluster, member) for member in (cluster.one, cluster.two))
    target = f"/agents/v2/executions/{execution}/files"
    proofs = Proofs(CLUSTER_SECRET.encode(), other[0], lambda: other[1])
    headers = [(b"host", b"x"), (b"authorization", f"Bearer {ACME}".encode())]
    _, proof = proofs.sign_request("GET", target.encode(), headers, to=host[0], epoch=host[1])

    first = raw(cluster.one, "GET", target, [*headers, proof])
    assert first.startswith(b"HTTP/1.1 200")
    assert ANSWER_HEADER in first.lower()
    assert raw(cluster.one, "GET", target, [*headers, proof]).startswith(b"HTTP/1.1 403")  # a replay
    assert raw(cluster.two, "GET", target, [*headers, proof]).startswith(b"HTTP/1.1 403")  # to another
    forged = Proofs(SECRET.encode(), other[0], lambda: 1)
    _, wrong = forged.sign_request("GET", target.encode(), headers, to=host[0], epoch=host[1])
    refused = raw(cluster.one, "GET", target, [*headers, wrong])
    assert refused.startswith(b"HTTP/1.1 403")
    assert ANSWER_HEADER not in refused.lower()
    # Two hosts that take each other for its owner do not send it to and fro.
    looping = Proofs(CLUSTER_SECRET.encode(), host[0], lambda: host[1])
    _, proof = looping.sign_request("GET", target.encode(), headers, to=other[0], epoch=other[1])
    assert raw(cluster.two, "GET", target, [*headers, proof]).startswith(b"HTTP/1.1 503")
    # What a client calls so goes nowhere, and who has no key has none on the other host.
    pretended = (b"x-agentfuse-proof", b"x")
    answer = raw(cluster.two, "GET", target, [*headers, pretended])
    assert answer.startswith(b"HTTP/1.1 200")
    assert raw(cluster.two, "GET", target, [headers[0], pretended]).startswith(b"HTTP/1.1 401")
    for framing in (
        [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"5"), (b"content-length", b"6")],
        [(b"transfer-encoding", b"identity, chunked")],
        [(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")],
    ):
        body = b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        answer = raw(cluster.two, "POST", target.replace("/files", "/pause"), [*headers, *framing], body)
        # What follows is not taken for another request; the server may hang up as soon as it sees it.
        assert answer.partition(b"\r\n")[0].strip() in (b"", b"HTTP/1.1 400", b"HTTP/1.1 501"), answer
        assert answer.count(b"HTTP/1.1") <= 1, answer
    # A header that the connection's end names for itself is for this hop only.
    hop = [*headers, (b"connection", b"authorization")]
    assert raw(cluster.two, "GET", target, hop).startswith(b"HTTP/1.1 401")
    assert status(cluster.two, execution) == "running"


def ids(cluster: Cluster, member: Member) -> tuple[str, int]:
    (host,) = (host for host in Roster(open_store(cluster.store)).all() if host.url == member.url)
    return host.id, host.epoch


def raw(
    member: Member, method: str, target: str, headers: list[tuple[bytes, bytes]], body: bytes = b""
) -> bytes:
    """The bytes of an answer."""
    url = urlsplit(member.gateway.url)
    address = (url.hostname, url.port)
    with socket.create_connection(address, DEADLINE_S, source_address=(CLIENTS, 0)) as connection:
        head = f"{method} {target} HTTP/1.1\r\n".encode()
        named = {name for name, _ in headers}
        if b"connection" not in named and not body:
            headers = [*headers, (b"connection", b"close")]
        connection.sendall(head + b"".join(b"%s: %s\r\n" % each for each in headers) + b"\r\n" + body)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if b"connection" in named:
                break
        return answer


def test_a_host_that_cannot_be_reached_keeps_its_execution_and_what_is_sent_there_waits(
    cluster: Cluster,
) -> None:
    execution = execute(cluster.one, "agent-reach")
    there = f"/agents/v2/executions/{execution}"
    with cut(cluster.two, cluster.one.address), cluster.two.client() as client:
        answer = client.get(f"{there}/files")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.text
        assert client.get(there).json()["status"] == "running"
    with cluster.two.client() as client:
        until(lambda: f"shared/{execution}.txt" in paths(client, execution), "the way to the other host")
        # A client that leaves in the middle leaves nothing behind.
        url = urlsplit(cluster.two.gateway.url)
        with socket.create_connection((url.hostname, url.port), DEADLINE_S, (CLIENTS, 0)) as leaving:
            leaving.sendall(
                f"POST {there}/context-files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n"
                "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 5000000\r\n\r\n--b\r\n"
                'Content-Disposition: form-data; name="files"; filename="half"\r\n\r\n'.encode()
                + bytes(MIB)
            )
        whole = client.post(f"{there}/context-files", files={"files": ("whole", b"1")})
        assert whole.status_code == 200
        assert "uploads/whole" in paths(client, execution)
        assert "uploads/half" not in paths(client, execution)
    (pid,) = cluster.ran(execution)
    assert is_alive(pid)


@contextmanager
def cut(member: Member, other: str) -> Iterator[None]:
    member.place.cut(other)
    try:
        yield
    finally:
        member.place.heal(other)


def test_hosts_that_are_cut_from_the_store_or_stopped_lose_what_runs_there_and_nothing_that_was_closed(
    cluster: Cluster,
) -> None:
    one, two, desk = cluster.one, cluster.two, cluster.desk
    lost = [(one, "agent-cut", execute(one, "agent-cut")), (two, "agent-stop", execute(two, "agent-stop"))]
    with cut(one, STORE):
        two.gateway.process.send_signal(signal.SIGSTOP)
        try:
            for _, _, execution in lost:
                until_status(desk, execution, "failed")
                (pid,) = cluster.ran(execution)
                assert not is_alive(pid)  # since before the others said so
            with one.client() as client:
                assert client.get("/readyz").status_code == 503
                begun = client.post("/agents/v2/agents/agent-cut/execute", json={})
                assert begun.status_code in (502, 503)
        finally:
            two.gateway.process.send_signal(signal.SIGCONT)
    for member, agent, execution in lost:
        until_ready(member)
        until_kept(desk, agent, execution)
        assert status(member, execution) == "failed"
        assert len(cluster.ran(execution)) == 1
        again = execute(member, agent)  # it begins others
        assert len(cluster.ran(again)) == 1
        assert not [path for path in mounts.mountpoints_below(member.base) if path.name == execution]


def until_status(member: Member, execution: str, wanted: str) -> None:
    until(lambda: status(member, execution) == wanted, f"the status {wanted}")


def until_ready(member: Member) -> None:
    with member.client() as client:
        until(lambda: client.get("/readyz").status_code == 200, "a lease again")


def until_kept(member: Member, agent: str, execution: str) -> None:
    until(lambda: f"{execution}.txt" in kept(member, agent), "what was closed, in the agent's memory")


def test_a_gateway_that_is_killed_keeps_its_execution_if_it_is_back_soon_and_loses_it_otherwise(
    cluster: Cluster,
) -> None:
    one, two = cluster.one, cluster.two
    execution = execute(two, "agent-killed")
    there = f"/agents/v2/executions/{execution}"
    (pid,) = cluster.ran(execution)
    before = ids(cluster, two)
    two.kill()
    two.start()
    assert ids(cluster, two)[0] == before[0]
    assert ids(cluster, two)[1] > before[1]
    assert status(one, execution) == "running"
    assert is_alive(pid)
    with one.client() as client:
        until(lambda: f"shared/{execution}.txt" in paths(client, execution), "the host in its new epoch")
        sent = client.post(f"{there}/context-files", files={"files": ("large", bytes(64 * MIB))})
        assert sent.status_code == 200
        (file,) = client.get(f"{there}/context-files").json()
        link = client.get(file["downloadUrl"]).headers["location"]
        with pytest.raises(httpx.RemoteProtocolError), client.stream("GET", link) as answer:
            assert answer.status_code == 200
            for number, _ in enumerate(answer.iter_bytes()):
                if number == 0:
                    two.kill()  # what broke off is not taken for whole
    until_status(one, execution, "failed")
    assert not is_alive(pid)
    with one.client() as client:
        assert client.get(f"{there}/files").status_code == 200  # an ended one is everybody's
    two.start()
    until_kept(one, "agent-killed", execution)
    assert status(two, execution) == "failed"
    assert cluster.ran(execution) == [pid]


def test_a_host_that_executes_nothing_has_another_one_do_it(cluster: Cluster) -> None:
    execution = execute(cluster.desk, "agent-elsewhere")
    with cluster.desk.client() as client:
        assert client.post(f"/agents/v2/executions/{execution}/cancel").status_code == 200
    until_status(cluster.desk, execution, "cancelled")
    assert len(cluster.ran(execution)) == 1
    assert not mounts.mountpoints_below(cluster.desk.base)
