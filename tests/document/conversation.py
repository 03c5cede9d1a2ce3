"""A conversation between the three real cores, without sockets or chance, as the bytes that they send."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from msgspec import inspect

from tests.document.annotate import Line, explained
from tests.document.annotate import as_text as lines_as_text
from zfabric.core.client.pending import Pending
from zfabric.core.client.session import ClientSession
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.worker.session import Begin, WorkerSession
from zfabric.errors import FabricError
from zfabric.ids import RoutingId
from zfabric.wire import codec, kinds
from zfabric.wire.answers import ChunkExtra, Outcome
from zfabric.wire.chunks import Chunks, EndsBody
from zfabric.wire.fields import Operation
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import AnyRequest, CountRequest, Delta, TextRequest, Usage
from zfabric.wire.sampling import SamplingOptions

_CLIENT: Final = RoutingId(b"\0\0\0\0\x01")
_WORKER: Final = RoutingId(b"\0\0\0\0\x02")
_NAMES: Final = {_CLIENT: "client", _WORKER: "worker"}
_REQUESTS: Final = {"generate": TextRequest, "count_tokens": CountRequest}
#: What CHUNKS hold after the session's number.
_CHUNKS_TYPE: Final = Chunks


class Message(NamedTuple):
    """One message on its way."""

    sender: str
    receiver: str
    header: bytes
    body: bytes


class _Reader:
    """Takes whatever comes."""

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        """Nothing is done with it."""

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """Nor with the end."""


class Conversation:
    """A controller, a client and a worker, and what they have said to each other."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.broker = Broker(BrokerConfig(recovery_ms=0), random.Random(1), 0, build="c", make_token=lambda: b"token")
        self.client = ClientSession(instance=1_001, rng=random.Random(2), build="a", secret=b"a secret")
        self.worker = WorkerSession(name="w1", instance=2_002, rng=random.Random(3), build="b")
        self.worker.load.slots = 4
        self.running: list[str] = []

    def settle(self) -> None:
        """Deliver what was sent, until nobody has anything to say."""
        while True:
            self.client.flush()
            self.worker.flush()
            moved = False
            for peer, session in ((_WORKER, self.worker), (_CLIENT, self.client)):
                sent, session.outbox = session.outbox, []
                for header, body in sent:
                    moved = True
                    self._to_controller(peer, header, body)
            for receiver, header, body in self.broker.outbox.take():
                moved = True
                self._from_controller(receiver, header, body)
            if not moved:
                return

    def _to_controller(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        self.messages.append(Message(_NAMES[sender], "controller", header, body))
        route = self.broker.routes.table.get(sender + header[: codec.ROUTE_BYTES])
        if route is not None and header[0] == kinds.CHUNKS:
            self._from_controller(route.client, header, body)
        else:
            self.broker.receive(sender, header, body, 0)

    def _from_controller(self, receiver: RoutingId, header: bytes, body: bytes) -> None:
        self.messages.append(Message("controller", _NAMES[receiver], header, body))
        if receiver == _CLIENT:
            self.client.receive(header, body, 0)
            return
        orders = self.worker.receive(header, body, 0)
        for order in orders:
            if isinstance(order, Begin):
                self.running.append(order.request_id)

    def submit(self, operation: Operation, request: AnyRequest) -> Pending:
        """Have the client ask for something."""
        pending = self.client.submit(operation, request, _Reader(), 0, model="m", window=2)
        self.settle()
        return pending

    def step(self, *deltas: Delta) -> None:
        """Have the worker's engine make something of the request that was the latest to come."""
        self.worker.emit([(self.running[-1], delta) for delta in deltas], 0)
        self.settle()


def held() -> Conversation:
    """The conversation: sessions, a stream with credit, and a request that is cancelled."""
    talk = Conversation()
    talk.worker.announce([ModelInfo(name="m", capabilities=["generate", "count_tokens"])], 0)
    talk.worker.connected(0)
    talk.settle()
    talk.client.connected(0)
    talk.settle()
    greedy = SamplingOptions(temperature=0.0, max_new_tokens=8)
    pending = talk.submit("generate", TextRequest(prompt="one two", sampling=greedy))
    talk.step(Delta(text="one ", token_ids=[11]))
    talk.step(Delta(text="two ", token_ids=[12]), Delta(text="three ", token_ids=[13]))
    talk.client.consumed([(pending, 2)])
    talk.settle()
    talk.step(Delta(text="four", token_ids=[14], finish_reason="stop", usage=Usage(2, 4)))
    cancelled = talk.submit("count_tokens", CountRequest(prompt="one two"))
    talk.client.cancel(cancelled)
    talk.settle()
    talk.worker.stopped(talk.running[-1], 0)
    talk.settle()
    talk.client.close()
    talk.settle()
    return talk


def as_text() -> str:
    """All messages, each with its bytes explained; frames that were passed on untouched are told once."""
    told: dict[bytes, int] = {}
    parts = []
    for number, message in enumerate(held().messages, start=1):
        kind = message.header[0]
        parts.append(f"## {number}. {kinds.NAMES[kind]}, {message.sender} → {message.receiver}")
        frames: list[tuple[bytes, Callable[[bytes], list[Line]]]] = [(message.header, _header_lines)]
        if kind in kinds.WITH_BODY:
            frames.append((message.body, _body_lines(message.header)))
        for position, (data, explain) in enumerate(frames, start=1):
            name = f"Frame {position} of {len(frames)}, {len(data)} bytes"
            if data in told and kind != kinds.WELCOME:
                parts.append(f"{name}: as in message {told[data]}.")
                continue
            told[data] = number
            parts.append(f"{name}:\n\n```text\n{lines_as_text(explain(data))}\n```")
    return "\n\n".join(parts)


def _header_lines(header: bytes) -> list[Line]:
    kind = header[0]
    lines = [Line(header[:1], 0, kinds.NAMES[kind])]
    if kind == kinds.CHUNKS:
        number = header[1 : codec.ROUTE_BYTES]
        lines.append(Line(number, 0, f"number of the client's session = {int.from_bytes(number, 'big')}"))
        return lines + explained(header[codec.ROUTE_BYTES :], inspect.type_info(_CHUNKS_TYPE))
    if len(header) > 1:
        lines += explained(header[1:], inspect.type_info(codec.STRUCTS[kind]))
    return lines


def _body_lines(header: bytes) -> Callable[[bytes], list[Line]]:
    kind: Any = EndsBody if header[0] == kinds.ENDS else _REQUESTS[codec.unpack_envelope(header).operation]
    return lambda body: explained(body, inspect.type_info(kind))
