"""Doors behind which something is remembered: the controller, a client and a worker, each with words in any order."""

from __future__ import annotations

import contextlib
import random
from typing import Any, Final

from tests.broker import Bench, FakeClient, FakeWorker, Peer, model_of
from tests.fuzz import script
from tests.unit.worker_side import WorkerSide
from zfabric.core.client.pending import Resume
from zfabric.core.client.session import ClientSession
from zfabric.core.worker.orders import Begin
from zfabric.errors import FabricError
from zfabric.wire import codec, kinds
from zfabric.wire.answers import ChunkExtra, Outcome
from zfabric.wire.messages import Welcome
from zfabric.wire.payloads import Delta, TextRequest

#: Of each peer, what a whole script may make the controller keep of it: messages that wait for it are the transport's.
_INBOX_MAX: Final = 2_000
#: What the workers can do with the names that the grammar asks for.
_ABLE: Final = ("generate", "embed", "count_tokens", "resume")
#: Steps that are no message, by the rest of `who` by 16.
_CUT, _WAIT = 14, 15


class _Deaf(Peer):
    """Gets messages, and looks at none."""


class _Bench(Bench):
    """A broker whose peers are told whatever a worker sent, unread."""

    def _deliver(self) -> None:
        while self.broker.outbox.pending:
            for to, header, body in self.broker.outbox.take():
                peer = self.peers.get(to)
                if peer is None:
                    self.broker.disconnected(to, self.now_ns)
                    continue
                peer.inbox.append((header[0], None, body))
                assert len(peer.inbox) < _INBOX_MAX
        self.check()


def controller(data: bytes) -> None:
    """Two clients, two workers and a stranger say what stands in a script. The tables must agree after each message."""
    bench = _Bench()
    asker = FakeClient(bench).hello(11)
    asker.submit(1, model="alpha")
    peers: list[Peer] = [
        asker,
        FakeClient(bench).hello(12),
        FakeWorker(bench).hello("w", models=[model_of("alpha", *_ABLE, aliases=["chat"])], slots=2),
        FakeWorker(bench).hello("v", instance=2, models=[model_of("beta", *_ABLE), model_of("alpha", "generate")]),
        _Deaf(bench),
    ]
    bench.broker.on_bug = _raise
    for step in script.read(data):
        what = step.who % 16
        if what == _WAIT:
            bench.sleep(len(step.header))
            continue
        place = what % len(peers)
        if what == _CUT:
            place = step.who // 16 % len(peers)
            peers[place].cut()
            peers[place] = _Deaf(bench)
        elif step.header:
            bench.receive(peers[place].id, step.header, step.body if step.header[0] in kinds.WITH_BODY else b"")
    # Whoever is left goes, and with them all that they held.
    for peer in list(bench.peers.values()):
        peer.cut()
    bench.sleep(60_000)
    bench.check_rest()


def _raise(error: Exception, kind: int) -> None:
    raise AssertionError(f"{kinds.NAMES.get(kind, kind)} made the controller fail") from error


class _Sink:
    """Reads an answer, which has one end and nothing after it."""

    def __init__(self) -> None:
        self.over = False

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        assert not self.over
        assert index >= 0
        text.encode()

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        assert not self.over
        self.over = True

    def answered(self, error: FabricError | None, results: list[Any]) -> None:
        self.ended(error, None)


def client(data: bytes) -> None:
    """A controller says what stands in a script to a client with three requests. Each of them ends, once."""
    session = ClientSession(instance=7, rng=random.Random(1), secret=b"s" * 16, on_fault=lambda _: None)
    now_ns = 10**12
    sinks = [_Sink() for _ in range(4)]
    ways: tuple[Resume, ...] = ("exact", "any", "never")
    for sink, resume in zip(sinks, ways, strict=False):
        session.submit("generate", TextRequest(prompt="p"), sink, now_ns, model="m", resume=resume, deadline_ms=50_000)
    session.ask("status", {}, sinks[3], now_ns, timeout_ms=50_000)
    session.connected(now_ns)
    now_ns += 10**9
    session.tick(now_ns)
    session.receive(*codec.pack(welcome()), now_ns)
    for step in script.read(data):
        if step.who % 16 == _WAIT:
            now_ns += len(step.header) * 10**6
            session.tick(now_ns)
        elif step.who % 16 == _CUT:
            session.disconnected()
            session.connected(now_ns)
        elif step.header:
            with contextlib.suppress(FabricError):
                session.receive(step.header, step.body, now_ns)
        session.flush()
        session.outbox.clear()
    now_ns += 100 * 10**9
    for _ in range(50):
        session.tick(now_ns)
        now_ns += 10**9
    assert all(sink.over for sink in sinks), "a request waits without end"


def worker(data: bytes) -> None:
    """A controller says what stands in a script to a worker whose engine makes a token now and then."""
    side = WorkerSide()
    session = side.session
    running: list[str] = []
    for step in script.read(data):
        if step.who % 16 == _WAIT:
            session.emit([(name, Delta(text="t ", token_ids=[1])) for name in running], 0)
        elif step.who % 16 == _CUT:
            side.reconnect(len(step.header) * 10**6)
        elif step.header:
            with contextlib.suppress(FabricError):
                orders = session.receive(step.header, step.body, 0)
                running += [order.request_id for order in orders if isinstance(order, Begin)]
        session.flush()
        for header, body in session.outbox:
            assert len(header) <= side.frame_bytes_max
            assert len(body) <= side.frame_bytes_max
        session.outbox.clear()


def welcome() -> Welcome:
    return Welcome(
        version=kinds.PROTOCOL_VERSION, build="", epoch=1, session=3, token=b"t", beat_ms=1_000, lease_ms=3_000,
        frame_bytes_max=4 * 2**20,
    )  # fmt: skip
