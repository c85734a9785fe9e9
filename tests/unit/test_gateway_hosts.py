"""Who lives and who is lost, by one's own clock only; the lease; what is forwarded and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from agentfuse.errors import StoreError, UsageError
from agentfuse.gateway.edge import DeniedError, StatedError
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.records import Records
from agentfuse.gateway.hosts.headers import check_framing, end_to_end, without_ours
from agentfuse.gateway.hosts.identity import Identity
from agentfuse.gateway.hosts.lease import LEASE_FILE, Lease, Terms
from agentfuse.gateway.hosts.lost import FORGET_S, settle
from agentfuse.gateway.hosts.peers import Peers, watch
from agentfuse.gateway.hosts.proof import REQUEST_HEADER, WINDOW_S, Proofs
from agentfuse.gateway.hosts.roster import Host, Roster
from agentfuse.objectstore import ObjectStore, open_store

HERE, THERE, THIRD = (f"00000000-0000-4000-8000-00000000000{n}" for n in (1, 2, 3))
ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-000000000001"
DEADLINE_S = 60.0
SECRET = b"a secret of the cluster, long enough"


def host(id: str = THERE, **changes: object) -> Host:  # noqa: A002  # what it is called
    at_first = Host(
        id=id,
        epoch=1,
        incarnation="first",
        beat=1,
        url="http://10.0.0.2:8080",
        lease_s=30,
        on_host_lost="fail",
        executes=True,
        executions=0,
        at=0,
    )
    return msgspec.structs.replace(at_first, **changes)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(f"file://{tmp_path}/store")


# -- who is lost


def watched(peers: Peers, *looks: tuple[float, Host]) -> list[list[Host]]:
    return [peers.saw([found], asked_at=at, now=at) for at, found in looks]


async def test_who_is_silent_for_a_lease_is_lost_and_who_beats_is_not() -> None:
    peers = Peers(HERE, gap_s=15)
    silent, beating = host(), host(THIRD)
    for at in range(0, 60, 5):
        dead = peers.saw([silent, msgspec.structs.replace(beating, beat=at)], asked_at=at, now=at)
        assert dead == ([silent] if at >= 30 else [])
    assert peers.find(THERE) is None
    assert peers.find(THIRD) is not None


async def test_silence_counts_anew_when_nobody_looked_for_a_while() -> None:
    peers = Peers(HERE, gap_s=15)
    looks = [(0, host()), (5, host()), (100, host()), (110, host()), (120, host()), (130, host())]
    assert watched(peers, *looks) == [[], [], [], [], [], [host()]]


async def test_a_host_that_beats_again_is_back_whatever_its_clock_says() -> None:
    peers = Peers(HERE, gap_s=100)
    back = host(epoch=2, incarnation="second", beat=1, at=-1e9)
    assert watched(peers, (0, host()), (30, host()), (40, back), (69, back)) == [[], [host()], [], []]
    assert peers.find(THERE) == back


async def test_who_waits_for_a_host_hears_that_it_is_lost() -> None:
    peers = Peers(HERE, gap_s=100)
    watched(peers, (0, host()))
    lost = peers.lost(THERE)
    watched(peers, (10, host(beat=2)))
    assert not lost.is_set()
    watched(peers, (40, host(beat=2)))
    assert lost.is_set()


async def test_a_host_does_not_judge_itself_and_the_least_busy_one_is_chosen() -> None:
    peers = Peers(HERE, gap_s=100)
    idle, busy, other = host(HERE), host(executions=3), host(THIRD, executes=False)
    for at in (0, 50):
        assert idle not in peers.saw([idle, busy, other], asked_at=at, now=0)
    chosen = Peers(HERE, gap_s=100)
    chosen.saw([idle, busy, other], asked_at=0, now=0)
    assert chosen.least_busy() == busy


class Looked:
    """A roster of two hosts: one is silent, the other beats until a time. Each look takes five seconds."""

    def __init__(self, peers: Peers, beats_until: float) -> None:
        self.now = 0.0
        self._peers = peers
        self._beats_until = beats_until

    def clock(self) -> float:
        return self.now

    def all(self) -> list[Host]:
        self.now += 5.0
        self._peers.doubt()  # the next look is soon
        return [host(), host(THIRD, beat=int(min(self.now, self._beats_until)))]


async def test_others_are_watched_while_what_a_lost_one_had_is_settled() -> None:
    peers, settled = Peers(HERE, gap_s=15), trio.Event()
    looked = Looked(peers, beats_until=100.0)

    async def on_lost(lost: Host) -> None:
        if lost.id == THERE:
            await trio.sleep_forever()
        settled.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(watch, peers, looked, on_lost, every_s=0.05, now=looked.clock))
        with trio.fail_after(DEADLINE_S):
            await settled.wait()
        nursery.cancel_scope.cancel()
    assert peers.find(THIRD) is None


async def test_what_a_lost_one_had_is_settled_ever_more_seldom() -> None:
    peers = Peers(HERE, gap_s=15)
    looked, settled = Looked(peers, beats_until=1e9), []

    async def on_lost(lost: Host) -> None:
        settled.append(lost.id)
        if len(settled) == 1:
            raise StoreError("cut off")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(watch, peers, looked, on_lost, every_s=0.05, now=looked.clock))
        await until(lambda: looked.now > 600.0)
        nursery.cancel_scope.cancel()
    assert set(settled) == {THERE}
    assert 5 <= len(settled) <= 15


# -- what becomes of its executions


def execution(number: int, **changes: object) -> Execution:
    begun = Execution(
        id=f"10000000-0000-4000-8000-{number:012}",
        organization=ORGANIZATION,
        agent="a",
        tenant="t",
        user="u",
        host=THERE,
        epoch=1,
        created_at=1.0,
        status=Status.RUNNING,
    )
    return msgspec.structs.replace(begun, **changes)


def test_only_what_the_lost_host_left_unfinished_fails_and_many_may_say_so_at_once(
    store: ObjectStore,
) -> None:
    records, roster = Records(store), Roster(store)
    kept = [
        execution(1, host=HERE),
        execution(2, epoch=2),  # adopted since
        execution(3).with_status(Status.COMPLETED, at=2.0),
    ]
    for each in [*kept, execution(4), execution(5, epoch=0), execution(6, ends_as=Status.CANCELLED)]:
        records.create(each)
    threads = [threading.Thread(target=settle, args=(Records(store), roster, host())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {each.id: each for each in Records(store).list(ORGANIZATION)}
    assert [found[each.id] for each in kept] == kept
    assert [found[execution(n).id].status for n in (4, 5, 6)] == ["failed", "failed", "cancelled"]
    assert all(THERE in found[execution(n).id].reason for n in (4, 5, 6))
    assert all(len(found[execution(n).id].changes) == 1 for n in (4, 5, 6))  # by one of the four


def test_what_waits_for_its_host_waits_and_so_does_the_hosts_record(store: ObjectStore) -> None:
    records, roster = Records(store), Roster(store)
    waiting = host(on_host_lost="wait", at=-FORGET_S)
    roster.put(waiting)
    records.create(execution(1))
    settle(records, roster, waiting)
    assert records.read(ORGANIZATION, execution(1).id) == execution(1)
    assert roster.all() == [waiting]
    records.change(ORGANIZATION, execution(1).id, lambda found: found.with_status(Status.FAILED))
    settle(records, roster, waiting)
    assert roster.all() == []


# -- the lease


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Tenure:
    """Notes what it is told, and when."""

    def __init__(self, clock: Clock) -> None:
        self.told: list[tuple[str, float]] = []
        self._clock = clock

    def count(self) -> int:
        return 7

    async def fence(self) -> None:
        self.told.append(("fence", self._clock()))

    async def adopt(self) -> None:
        self.told.append(("adopt", self._clock()))


class Partitioned:
    """A store whose writes fail while it is cut off."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.is_cut = False
        self.tries = 0
        self.before_put: Callable[[], None] = lambda: None

    def put(self, key: str, body: bytes) -> None:
        self.tries += 1
        if self.is_cut:
            raise StoreError("cut off")
        self.before_put()
        self._store.put(key, body)

    def get(self, key: str) -> bytes:
        return self._store.get(key)


async def until(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not is_so():  # noqa: ASYNC110  # what is looked at sets no event
            await trio.sleep(0.01)


def lease_of(tmp_path: Path, store: object, clock: Clock, **terms: object) -> tuple[Lease, Identity]:
    directory = tmp_path / "gateway"
    directory.mkdir(exist_ok=True)
    identity = Identity(directory)
    said = {"url": "http://10.0.0.1:1", "lease_s": 0.3, "on_host_lost": "fail", "executes": True} | terms
    roster = Roster(store)  # type: ignore[arg-type]  # as much of a store as it takes
    return Lease(identity, roster, Terms(**said), directory=directory, now=clock), identity  # type: ignore[arg-type]


async def test_a_lease_counts_from_before_the_renewal_and_two_thirds_of_it_are_relied_upon(
    tmp_path: Path, store: ObjectStore
) -> None:
    clock, cut = Clock(), Partitioned(store)
    lease, identity = lease_of(tmp_path, cut, clock)
    tenure = Tenure(clock)
    cut.before_put = lambda: setattr(clock, "now", clock.now + 0.1)  # the request takes as long
    assert lease.problem()
    await lease.acquire(tenure)
    assert (identity.epoch, lease.problem()) == (1, None)
    clock.now = 1000.19
    assert lease.problem() is None
    clock.now = 1000.2
    assert lease.problem()
    assert float((tmp_path / "gateway" / LEASE_FILE).read_text()) == pytest.approx(1000.2)
    (seen,) = Roster(store).all()
    assert (seen.id, seen.epoch, seen.executions) == (identity.id, 1, 7)


async def test_who_cannot_renew_fences_itself_and_begins_another_epoch_later(
    tmp_path: Path, store: ObjectStore
) -> None:
    clock, cut = Clock(), Partitioned(store)
    lease, identity = lease_of(tmp_path, cut, clock)
    tenure = Tenure(clock)
    await lease.acquire(tenure)
    cut.is_cut = True
    async with trio.open_nursery() as nursery:
        await nursery.start(lease.keep, tenure)
        clock.now += 0.19
        tried = cut.tries
        await until(lambda: cut.tries > tried + 2)
        assert tenure.told == [("adopt", 1000.0)]
        clock.now += 0.01
        await until(lambda: len(tenure.told) == 2)
        assert tenure.told[1] == ("fence", 1000.2)
        assert lease.problem()
        cut.is_cut = False
        await until(lambda: len(tenure.told) == 3)
        assert tenure.told[2][0] == "adopt"
        assert identity.epoch > 1
        assert lease.problem() is None
        nursery.cancel_scope.cancel()


async def test_who_cannot_tell_launchers_of_a_renewal_has_none(tmp_path: Path, store: ObjectStore) -> None:
    clock, cut = Clock(), Partitioned(store)
    lease, _ = lease_of(tmp_path, cut, clock)
    tenure = Tenure(clock)
    await lease.acquire(tenure)
    file = tmp_path / "gateway" / LEASE_FILE
    file.unlink()
    file.mkdir()
    async with trio.open_nursery() as nursery:
        await nursery.start(lease.keep, tenure)
        clock.now += 0.19
        tried = cut.tries
        await until(lambda: cut.tries > tried + 2)
        clock.now += 0.01
        assert lease.problem()
        await until(lambda: len(tenure.told) == 2)
        file.rmdir()
        await until(lambda: len(tenure.told) == 3)
        assert float(file.read_text()) > clock.now
        nursery.cancel_scope.cancel()
    assert [what for what, _ in tenure.told] == ["adopt", "fence", "adopt"]


async def test_who_is_waited_for_never_fences_itself(tmp_path: Path, store: ObjectStore) -> None:
    clock = Clock()
    lease, _ = lease_of(tmp_path, store, clock, on_host_lost="wait")
    await lease.acquire(Tenure(clock))
    clock.now += 1e6
    assert lease.problem() is None


async def test_of_two_with_one_id_the_older_gives_up_for_good(tmp_path: Path, store: ObjectStore) -> None:
    clock = Clock()
    lease, identity = lease_of(tmp_path, store, clock)
    tenure = Tenure(clock)
    await lease.acquire(tenure)
    Roster(store).put(host(identity.id, epoch=2, incarnation="another's"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lease.keep, tenure)
        await until(lambda: len(tenure.told) == 2)
        assert "host.id" in (lease.problem() or "")
        nursery.cancel_scope.cancel()
    assert [what for what, _ in tenure.told] == ["adopt", "fence"]
    (seen,) = Roster(store).all()
    assert seen.incarnation == "another's"


def test_an_epoch_is_above_all_that_were_also_after_the_file_was_lost(tmp_path: Path) -> None:
    first = Identity(tmp_path)
    assert [first.begin_epoch(), first.begin_epoch()] == [1, 2]
    again = Identity(tmp_path)
    assert (again.id, again.begin_epoch()) == (first.id, 3)
    (tmp_path / "host.epoch").unlink()
    assert Identity(tmp_path).begin_epoch(beyond=3) == 4


# -- what hosts show each other


REQUEST = ("POST", b"/agents/v2/x?q=%2F", [(b"authorization", b"Bearer k"), (b"content-length", b"3")])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ours(clock: Clock) -> Proofs:
    return Proofs(SECRET, HERE, lambda: 1, clock)


@pytest.fixture
def theirs(clock: Clock) -> Proofs:
    return Proofs(SECRET, THERE, lambda: 5, clock)


def test_a_request_proves_itself_once_to_the_one_it_is_for(ours: Proofs, theirs: Proofs) -> None:
    nonce, (name, value) = ours.sign_request(*REQUEST, to=THERE, epoch=5)
    assert name == REQUEST_HEADER
    assert theirs.check_request(value, *REQUEST) == nonce
    with pytest.raises(DeniedError, match="before"):
        theirs.check_request(value, *REQUEST)
    with pytest.raises(DeniedError, match="not here"):
        ours.check_request(value, *REQUEST)


@pytest.mark.parametrize(
    "changed",
    [
        ("GET", *REQUEST[1:]),
        (REQUEST[0], b"/agents/v2/x?q=/", REQUEST[2]),
        (*REQUEST[:2], [(b"authorization", b"Bearer another"), REQUEST[2][1]]),
        (*REQUEST[:2], [*REQUEST[2], (b"range", b"bytes=0-1")]),
        (*REQUEST[:2], REQUEST[2][:1]),
    ],
)
def test_nothing_of_a_request_can_be_changed(
    ours: Proofs, theirs: Proofs, changed: tuple[str, bytes, list[tuple[bytes, bytes]]]
) -> None:
    _, (_, value) = ours.sign_request(*REQUEST, to=THERE, epoch=5)
    with pytest.raises(DeniedError):
        theirs.check_request(value, *changed)
    with pytest.raises(DeniedError):
        theirs.check_request(value.replace(b" 5 ", b" 6 "), *REQUEST)


def test_what_is_late_or_of_another_epoch_or_another_secret_is_refused(
    ours: Proofs, theirs: Proofs, clock: Clock
) -> None:
    _, (_, value) = ours.sign_request(*REQUEST, to=THERE, epoch=5)
    for away in (-WINDOW_S - 1, WINDOW_S + 1):
        clock.now += away
        with pytest.raises(StatedError, match="clocks"):
            theirs.check_request(value, *REQUEST)
        clock.now -= away
    _, (_, early) = ours.sign_request(*REQUEST, to=THERE, epoch=4)
    with pytest.raises(StatedError, match="anew"):
        theirs.check_request(early, *REQUEST)
    _, (_, forged) = Proofs(SECRET[::-1], HERE, lambda: 1, clock).sign_request(*REQUEST, to=THERE, epoch=5)
    for wrong in (forged, b"", b"x" * 5000, value + b"," + value):
        with pytest.raises(DeniedError):
            theirs.check_request(wrong, *REQUEST)


def test_an_answer_proves_that_it_answers_this_request(ours: Proofs, theirs: Proofs) -> None:
    nonce, _ = ours.sign_request(*REQUEST, to=THERE, epoch=5)
    headers = [(b"content-type", b"text/plain"), (b"etag", b'"1"')]
    _, proof = theirs.sign_answer(nonce, 200, headers)
    assert ours.is_answer(proof, nonce, 200, headers[::-1])
    assert not ours.is_answer(proof, nonce, 404, headers)
    assert not ours.is_answer(proof, nonce, 200, headers[:1])
    assert not ours.is_answer(proof, "0" * 32, 200, headers)
    assert not ours.is_answer(REQUEST_HEADER, nonce, 200, headers)


def test_headers_for_the_next_hop_and_ours_do_not_travel() -> None:
    sent = [
        (b"Connection", b"close, X-Api-Key"),
        (b"x-api-key", b"k"),
        (b"transfer-encoding", b"chunked"),
        (b"X-Agentfuse-Forward", b"x"),
        (b"te", b"trailers"),
        (b"content-type", b"text/plain"),
    ]
    assert end_to_end(sent) == [(b"content-type", b"text/plain")]
    assert (b"X-Agentfuse-Forward", b"x") not in without_ours(sent)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"3"), (b"content-length", b"3")],
        [(b"content-length", b"3, 3")],
        [(b"content-length", b"+3")],
        [(b"content-length", b"3"), (b"transfer-encoding", b"chunked")],
    ],
)
def test_a_request_that_two_servers_could_cut_differently_is_refused(
    headers: list[tuple[bytes, bytes]],
) -> None:
    with pytest.raises(UsageError):
        check_framing(headers)
