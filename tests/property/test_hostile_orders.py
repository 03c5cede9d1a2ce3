"""Valid messages in any order, from clients and workers that keep to nothing: tables agree, nothing is raised, nothing is
left, and those who keep to the protocol get what they would have got alone."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.broker import CANCELLED, Bench, FakeClient, FakeWorker, Peer, carried_of, claim_of, model_of
from zfabric.errors import FAILOVER_CODES
from zfabric.limits import CLAIM_MS
from zfabric.wire.flow import Credit, CreditLine
from zfabric.wire.load import Load
from zfabric.wire.locks import lock_of
from zfabric.wire.messages import Beat, Carried, Goodbye

#: Few names, so that everybody meets everybody.
numbers = st.integers(0, 3)
attempts = st.integers(0, 2)
instances = st.sampled_from([11, 12, 13])
secrets = st.sampled_from([b"", b"one", b"two"])
names = st.sampled_from(["w1", "w2"])
steps = st.one_of(
    st.tuples(st.just("client"), instances, secrets, st.lists(st.tuples(numbers, attempts), max_size=3)),
    st.tuples(
        st.just("worker"), names, st.integers(1, 2), st.lists(st.tuples(instances, numbers, attempts), max_size=3)
    ),
    st.tuples(st.sampled_from(["submit", "claim", "credit"]), st.integers(0, 5), numbers, attempts),
    st.tuples(st.sampled_from(["cancel", "leave", "cut", "beat", "again"]), st.integers(0, 5), numbers, attempts),
    st.tuples(
        st.sampled_from(["end", "fail", "say", "carry"]), st.integers(0, 5), instances, st.tuples(numbers, attempts)
    ),
    st.tuples(st.just("load"), st.integers(0, 5), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("sleep"), st.sampled_from([1, 400, 2_000])),
)


class Crowd:
    """Peers that do what they are told, in whatever order."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.peers: list[FakeClient | FakeWorker] = []

    def do(self, step: tuple[object, ...]) -> None:
        what, *arguments = step
        if what == "sleep":
            self.bench.sleep(arguments[0])  # type: ignore[arg-type]
        elif what in ("client", "worker"):
            peer: FakeClient | FakeWorker = FakeClient(self.bench) if what == "client" else FakeWorker(self.bench)
            self.peers.append(peer)
            getattr(self, f"_{what}")(peer, *arguments)
        elif self.peers:
            peer = self.peers[arguments[0] % len(self.peers)]  # type: ignore[operator]
            if peer.id in self.bench.peers:
                getattr(self, f"_{what}")(peer, *arguments[1:])

    def _client(self, peer: FakeClient, instance: int, secret: bytes, claims: list[tuple[int, int]]) -> None:
        peer.hello(instance, secret=secret, claims=[claim_of(number, attempt, 0) for number, attempt in claims])

    def _worker(self, peer: FakeWorker, name: str, instance: int, carried: list[tuple[int, int, int]]) -> None:
        peer.slow = instance == 2
        peer.hello(name, instance=instance, slots=2, carried=[_carried(*line) for line in carried])

    # Each of these may come from a peer of the other kind: valid bytes, and no business of its.

    def _submit(self, peer: Peer, number: int, attempt: int) -> None:
        FakeClient.submit(peer, number, attempt, deadline_ms=[None, 50, 5_000, None][number])  # type: ignore[arg-type]

    def _claim(self, peer: Peer, number: int, attempt: int) -> None:
        FakeClient.claim(peer, (number, attempt, 0), (number, attempt, 0))  # type: ignore[arg-type]

    def _credit(self, peer: Peer, number: int, attempt: int) -> None:
        peer.send(Credit([CreditLine(request=number, attempt=attempt, next=2**32 - 1, window=0, again=True)]))

    def _cancel(self, peer: Peer, number: int, attempt: int) -> None:
        FakeClient.cancel(peer, number, number)  # type: ignore[arg-type]

    def _leave(self, peer: Peer, number: int, attempt: int) -> None:
        peer.send(Goodbye())

    def _cut(self, peer: Peer, number: int, attempt: int) -> None:
        peer.cut()

    def _beat(self, peer: Peer, number: int, attempt: int) -> None:
        peer.send(Beat(number))

    def _again(self, peer: FakeClient | FakeWorker, number: int, attempt: int) -> None:
        """The last HELLO of a connection once more, or one under another name."""
        if isinstance(peer, FakeClient):
            peer.hello(peer.instance if number else 13, secret=peer.secret, claims=[claim_of(number, attempt, 0)])
        else:
            peer.hello(peer.name if number else "w2", instance=peer.instance, carried=[_carried(11, number, attempt)])

    def _end(self, peer: Peer, instance: int, key: tuple[int, int]) -> None:
        FakeWorker.end(peer, instance, key, (99, 0), texts=[(*key, "t")])  # type: ignore[arg-type]

    def _fail(self, peer: Peer, instance: int, key: tuple[int, int]) -> None:
        FakeWorker.end(peer, instance, key, code=50001, client=key[0])  # type: ignore[arg-type]

    def _say(self, peer: Peer, instance: int, key: tuple[int, int]) -> None:
        known = self.bench.broker.registry.clients.get(instance)
        FakeWorker.say(peer, known.number if known else 5, *key, "t")  # type: ignore[arg-type]

    def _carry(self, peer: Peer, instance: int, key: tuple[int, int]) -> None:
        FakeWorker.carry(peer, _carried(instance, *key), _carried(instance, *key))  # type: ignore[arg-type]

    def _load(self, peer: Peer, slots: int, draining: bool) -> None:
        peer.send(Load(slots=slots, draining=draining, engines=[5]))


def _carried(instance: int, number: int, attempt: int) -> Carried:
    lock = [b"", lock_of(b"one"), lock_of(b"two")][(instance + number) % 3]
    return carried_of(instance, number, attempt, lock=lock, finished=attempt == 2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=40), st.sampled_from([0, 1_000]))
def test_nothing_is_raised_and_nothing_is_left(script: list[tuple[object, ...]], recovery_ms: int) -> None:
    bench = Bench(recovery_ms=recovery_ms, stall_ms=1_000, client_requests_max=5)
    crowd = Crowd(bench)
    for step in script:
        crowd.do(step)
    for peer in crowd.peers:
        if peer.id in bench.peers:
            peer.cut()
    bench.sleep(2 * CLAIM_MS + 40_000)
    bench.check_rest()
    assert not bench.broker.registry.clients
    assert not bench.broker.routes.table
    assert len(bench.broker.timers) == 0


class Honest:
    """A client and a worker that keep to the protocol, with an answer of ten parts."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.worker = bench.worker("honest", instance=77, models=[model_of("own")], slots=2)
        self.client = bench.client(99, secret=b"honest")
        self.client.submit(1, model="own")
        self.said = 0
        self.got: list[str] = []
        self.codes: dict[tuple[int, int], int] = {}

    def go_on(self) -> None:
        if self.said < 10:
            self.worker.say(self.client.number, 1, 0, str(self.said))
            self.said += 1
        self.got += self.client.texts()
        self.codes |= self.client.codes()

    def lose(self) -> None:
        """The client loses its connection and is back at once."""
        self.client.cut()
        self.client = self.client.back((1, 0, self.said))
        assert self.worker.grants() == [(1, 0, self.said, True, self.client.number)]

    def end(self) -> None:
        while self.said < 10:
            self.go_on()
        self.worker.end(99, (1, 0), client=self.client.number)
        self.go_on()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=30), st.integers(0, 30))
def test_nobody_else_is_touched(script: list[tuple[object, ...]], lost_at: int) -> None:
    bench = Bench(recovery_ms=0, client_requests_max=5)
    honest, crowd = Honest(bench), Crowd(bench)
    for position, step in enumerate(script):
        crowd.do(step)
        honest.go_on()
        if position == lost_at:
            honest.lose()
    honest.end()
    assert honest.got == [str(part) for part in range(10)]
    assert honest.codes == {(1, 0): 0}
    assert honest.worker.aborted() == []
    assert [line.request for line in honest.worker.dispatched()] == [1]


class Lone:
    """One request of one client at one worker, both of which keep to the protocol, whatever becomes of their connections.

    Args:
        insists: The client claims what it is told it may; else it submits the next attempt at once.
    """

    def __init__(self, *, insists: bool) -> None:
        self.bench = Bench()
        self.insists = insists
        self.worker, self.client = self.bench.worker(), self.bench.client(secret=b"s")
        self.client.submit(1)
        self.attempt = 0
        self.running: set[int] = set()
        self.done = False

    def settle(self) -> None:
        """Both do what they were told to."""
        for _ in range(3):
            self.running |= {line.attempt for line in self.worker.dispatched()}
            self.running -= {attempt for _, attempt in self.worker.aborted()}
            for end in self.client.terminals():
                if end.attempt == self.attempt and not self.done and end.code != CANCELLED:
                    self.ended(end.code, claimable="claim_ms" in end.details)

    def ended(self, code: int, *, claimable: bool) -> None:
        if code not in FAILOVER_CODES:
            self.done = True
        elif self.insists and claimable:
            self.client.claim((1, self.attempt, 0))
        else:
            self.attempt += 1
            self.client.submit(1, self.attempt)

    def lose_worker(self) -> None:
        self.worker.cut()
        self.settle()
        carried = [carried_of(11, 1, attempt, lock=lock_of(b"s")) for attempt in sorted(self.running)]
        self.worker = self.worker.back(*carried)

    def lose_client(self) -> None:
        self.client.cut()
        self.client = self.client.back(*[] if self.done else [(1, self.attempt, 0)])

    def lose_both(self) -> None:
        self.worker.cut()
        self.lose_client()
        carried = [carried_of(11, 1, attempt, lock=lock_of(b"s")) for attempt in sorted(self.running)]
        self.worker = self.worker.back(*carried)

    def end(self) -> None:
        for attempt in sorted(self.running):
            self.worker.end(11, (1, attempt), client=self.client.number)
        self.running.clear()

    def sleep(self) -> None:
        self.bench.sleep(400)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["lose_worker", "lose_client", "lose_both", "end", "sleep"]), max_size=14), st.booleans()
)
def test_a_request_ends_whatever_is_lost(script: list[str], insists: bool) -> None:
    lone = Lone(insists=insists)
    for act in [*script, "end"]:
        getattr(lone, act)()
        lone.settle()
    for _ in range(3):
        lone.bench.sleep(CLAIM_MS + 100)
        lone.settle()
        lone.end()
        lone.settle()
    assert lone.done
    lone.bench.check_rest()
