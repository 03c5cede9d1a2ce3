"""A conversation of client, controller and worker, and how one of them is replaced by what it said in a former version.

`python -m tests.recorded.wire NAME` writes what is said today to NAME; do it when a minor version is released, and never
again for that version. The three are the real cores, without sockets, clocks or chance, so that they say the same each time:
what differs from a recording differs in the code.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from zfabric.core.client.pending import Pending
from zfabric.core.client.session import ClientSession
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.worker.session import Begin, Order, WorkerSession
from zfabric.errors import FabricError
from zfabric.ids import RoutingId
from zfabric.wire import codec, kinds
from zfabric.wire.answers import ChunkExtra, Outcome
from zfabric.wire.fields import Operation
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import AnyRequest, CountRequest, Delta, TextRequest, Usage
from zfabric.wire.sampling import SamplingOptions

#: What version 2.0 says, which has no minor versions yet.
FIRST: Final = Path(__file__).with_name("wire-2.0.json")
ROLES: Final = ("client", "controller", "worker")
_MILLISECOND: Final = 1_000_000


class Said(NamedTuple):
    """One message: who said it to whom, and its frames."""

    sender: str
    receiver: str
    header: bytes
    body: bytes


def recorded(path: Path = FIRST) -> list[Said]:
    """A recording."""
    return [
        Said(sender, receiver, bytes.fromhex(header), bytes.fromhex(body))
        for sender, receiver, header, body in json.loads(path.read_text())
    ]


class Reader:
    """Keeps what arrives of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends: list[FabricError | None] = []

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        self.tokens += token_ids

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        self.ends.append(error)


class Asker:
    """Keeps what is answered to questions."""

    def __init__(self) -> None:
        self.answers: list[tuple[FabricError | None, int]] = []

    def answered(self, error: FabricError | None, results: Sequence[object]) -> None:
        self.answers.append((error, len(results)))


class Talk:
    """The three, and what they say.

    Args:
        former: What was said in another version; None to hear only what is said today.
        replaced: Whose messages are those of `former` instead of their own.
    """

    def __init__(self, former: list[Said] | None = None, replaced: Collection[str] = ()) -> None:
        self.former = former
        self.replaced = frozenset(replaced)
        self.said: list[Said] = []
        self.now_ns = 0
        self.broker = self._controller()
        self.client = ClientSession(
            instance=1_001, rng=random.Random(2), build="a", label="a label", secret=b"a secret"
        )
        self.worker = WorkerSession(name="w1", instance=2_002, rng=random.Random(3), build="b")
        self.worker.load.slots = 4
        self.running: list[str] = []
        self.orders: list[Order] = []
        self.asker = Asker()
        self._connections = 0
        self._ids: dict[str, RoutingId] = {}

    def _controller(self) -> Broker:
        config = BrokerConfig(recovery_ms=0 if not self.said else 3_000)
        return Broker(config, random.Random(1 + bool(self.said)), self.now_ns, build="c", make_token=lambda: b"token")

    # ── connections ─────────────────────────────────────────────────────────────────────────────────────────────────

    def connect(self, role: str) -> None:
        """A new connection of a client or worker."""
        self._connections += 1
        self._ids[role] = RoutingId(self._connections.to_bytes(5, "big"))
        (self.client if role == "client" else self.worker).connected(self.now_ns)
        self.settle()

    def cut(self, role: str) -> None:
        """Its connection is lost."""
        (self.client if role == "client" else self.worker).disconnected()
        self.broker.disconnected(self._ids.pop(role), self.now_ns)
        self.settle()

    def restart(self) -> None:
        """The controller dies, and another one comes."""
        for role in list(self._ids):
            self.cut(role)
        self.broker = self._controller()

    def sleep(self, milliseconds: int) -> None:
        """Let time pass."""
        until_ns = self.now_ns + milliseconds * _MILLISECOND
        while self.now_ns < until_ns:
            self.now_ns = min(until_ns, self.now_ns + 10 * _MILLISECOND)
            self.broker.tick(self.now_ns)
            self.client.tick(self.now_ns)
            self.worker.tick(self.now_ns)
            self.settle()

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self) -> None:
        """Deliver what was sent, until nobody has anything to say."""
        moved = True
        while moved:
            moved = False
            for role, session in (("worker", self.worker), ("client", self.client)):
                session.flush()
                sent, session.outbox = session.outbox, []
                for header, body in sent:
                    if role in self._ids:
                        moved = True
                        self._to_controller(role, header, body)
            for receiver, header, body in self.broker.outbox.take():
                moved = True
                self._to_peer(receiver, header, body)

    def _say(self, sender: str, receiver: str, header: bytes, body: bytes) -> tuple[bytes, bytes]:
        """What is said here, or what was said in the former version."""
        self.said.append(Said(sender, receiver, header, body))
        if self.former is None or sender not in self.replaced:
            return header, body
        position = len(self.said) - 1
        assert position < len(self.former), f"message {position}, {kinds.NAMES[header[0]]}, was never said"
        before = self.former[position]
        assert (before.sender, before.receiver, before.header[0]) == (sender, receiver, header[0])
        return before.header, before.body

    def _to_controller(self, role: str, header: bytes, body: bytes) -> None:
        header, body = self._say(role, "controller", header, body)
        sender = self._ids[role]
        route = self.broker.routes.table.get(sender + header[: codec.ROUTE_BYTES])
        if route is not None and header[0] == kinds.CHUNKS:
            self._to_peer(route.client, header, body)
        else:
            self.broker.receive(sender, header, body, self.now_ns)

    def _to_peer(self, receiver: RoutingId, header: bytes, body: bytes) -> None:
        role = next(role for role, name in self._ids.items() if name == receiver)
        header, body = self._say("controller", role, header, body)
        if role == "client":
            self.client.receive(header, body, self.now_ns)
            return
        orders = self.worker.receive(header, body, self.now_ns)
        self.orders += orders
        self.running += [order.request_id for order in orders if isinstance(order, Begin)]

    # ── what they do ────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, operation: Operation, request: AnyRequest, window: int = 4) -> tuple[Pending, Reader]:
        """Have the client ask for something of the model."""
        reader = Reader()
        pending = self.client.submit(operation, request, reader, self.now_ns, model="m", window=window)
        self.settle()
        return pending, reader

    def query(self, what: str, **arguments: object) -> None:
        """Have the client ask a question."""
        self.client.ask(what, arguments, self.asker, self.now_ns)
        self.settle()

    def step(self, *tokens: int, last: bool = False) -> None:
        """Have the worker's engine make tokens of the request that was the latest to come."""
        deltas = [Delta(text=f"{token} ", token_ids=[token]) for token in tokens]
        if last:
            deltas[-1] = Delta(text="end", token_ids=[tokens[-1]], finish_reason="stop", usage=Usage(2, len(tokens)))
        self.worker.emit([(self.running[-1], delta) for delta in deltas], self.now_ns)
        self.settle()


def held(former: list[Said] | None = None, replaced: Collection[str] = ()) -> Talk:
    """Sessions, streams that lose their client, their worker and their controller on the way, questions, and what ends."""
    talk = Talk(former, replaced)
    talk.worker.announce([ModelInfo(name="m", aliases=["n"], capabilities=["generate", "count_tokens", "resume"])], 0)
    talk.connect("worker")
    talk.connect("client")
    text = TextRequest(prompt="one two", sampling=SamplingOptions(temperature=0.0, max_new_tokens=64))
    pending, whole = talk.ask("generate", text)
    talk.step(1)
    talk.step(2, 3, 4, 5)
    talk.client.consumed([(pending, 4)])
    talk.settle()
    talk.cut("client")
    talk.step(6)
    talk.sleep(100)
    talk.connect("client")
    talk.sleep(200)
    talk.cut("worker")
    talk.connect("worker")
    talk.sleep(200)
    talk.step(7)
    talk.restart()
    talk.step(8)
    talk.connect("worker")
    talk.connect("client")
    talk.sleep(400)
    talk.client.consumed([(pending, 7)])
    talk.settle()
    talk.step(9, last=True)
    assert (whole.tokens, whole.ends) == ([1, 2, 3, 4, 5, 6, 7, 8, 9], [None])
    cancelled, _ = talk.ask("count_tokens", CountRequest(prompt="one two"))
    talk.client.cancel(cancelled)
    talk.settle()
    talk.worker.stopped(talk.running[-1], talk.now_ns)
    talk.settle()
    for what, arguments in (("models", {}), ("model", {"name": "n"}), ("workers", {}), ("status", {}), ("refresh", {})):
        talk.query(what, **arguments)
    talk.query("nothing")
    talk.query("drain", worker="w1", limit_ms=500)
    talk.worker.drain(talk.now_ns)
    talk.settle()
    talk.sleep(1_500)
    talk.worker.goodbye("drained")
    talk.settle()
    talk.client.close()
    talk.settle()
    return talk


def main() -> None:
    """Write what is said today."""
    path = Path(sys.argv[1])
    rows = [[it.sender, it.receiver, it.header.hex(), it.body.hex()] for it in held().said]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
