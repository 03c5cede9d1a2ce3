"""Controllers below a controller on paper: the cores of all of them in one process, with workers that only say that they exist.

Messages go from core to core as the drivers would hand them over, encoded; there are no sockets, and time stands still. Costs are
CPU time, so that what else the machine does weighs less on them.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Final

from zfabric.core.cell.session import CellSession
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.config import BrokerConfig
from zfabric.ids import RoutingId, milliseconds
from zfabric.limits import CELL_LOOK_MS
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk
from zfabric.wire.chunks import columns_of
from zfabric.wire.load import Load
from zfabric.wire.messages import ClientHello, End, Ends, ModelInfo, Submit, WorkerHello

CLIENT: Final = RoutingId(b"client")
CLIENT_INSTANCE: Final = 5
_SLOTS: Final = 64


def worker_hello(number: int, models: int) -> WorkerHello:
    """A worker that announces what an engine of a language model does."""
    infos = [
        ModelInfo(
            name=f"m{model}",
            context_length=32_768,
            capabilities=["generate", "chat", "resume", "count_tokens", "tokenize", "detokenize"],
            parameters=["temperature", "top_p", "top_k", "seed", "stop", "logprobs", "tools", "response_format"],
            details={"engine": "vllm", "dtype": "bfloat16", "device": f"gpu{number % 8}"},
        )
        for model in range(models)
    ]
    return WorkerHello(
        version=kinds.PROTOCOL_VERSION,
        build="",
        name=f"w{number}",
        instance=number + 1,
        models=infos,
        load=Load(slots=_SLOTS),
        minor=kinds.MINOR_VERSION,
    )


def worker_id(number: int) -> RoutingId:
    """What a controller knows a worker's connection by."""
    return RoutingId(b"w%06d" % number)


def broker_of(workers: int, models: int, seed: int, *, client: bool = True) -> Broker:
    """A controller's core with so many workers, each with so many models."""
    broker = Broker(BrokerConfig(recovery_ms=0), random.Random(seed), 0)
    hello = ClientHello(version=kinds.PROTOCOL_VERSION, build="", instance=CLIENT_INSTANCE)
    if client:
        broker.receive(CLIENT, *codec.pack(hello), 0)
    for number in range(workers):
        broker.receive(worker_id(number), *codec.pack(worker_hello(number, models)), 0)
    broker.outbox.take()
    return broker


@dataclass
class Costs:
    """Microseconds of one request, by who spends them.

    Attributes:
        parent: The controller that the client knows: SUBMIT to DISPATCH, and the terminal.
        cell: The controller of the cell: DISPATCH to DISPATCH, and the terminal.
        chunk: The cell's for one message of chunks on its way up.
    """

    parent: float
    cell: float
    chunk: float


def flat_us(broker: Broker, count: int, *, first: int = 0) -> float:
    """Microseconds of one request at a controller without cells: submit, choose, dispatch and end."""
    spent, clock = 0.0, time.thread_time
    for number in range(first, first + count):
        header = codec.pack_envelope(Submit(request=number + 1, attempt=0, operation="generate", model="m0"))
        began = clock()
        broker.receive(CLIENT, header, b"prompt", 0)
        ((worker, _, _),) = broker.outbox.take()
        spent += clock() - began
        ends = codec.pack_envelope(Ends(instance=CLIENT_INSTANCE, ends=[End(request=number + 1, attempt=0)]))
        began = clock()
        broker.receive(worker, ends, b"", 0)
        broker.outbox.take()
        spent += clock() - began
    return spent / count * 1e6


class Cells:
    """A parent and its cells.

    Args:
        cells, workers, models: How many cells, how many workers each has, and how many models each worker.
    """

    def __init__(self, cells: int, workers: int, models: int = 1) -> None:
        self.now_ns = 0
        self.parent = broker_of(0, 0, 1)
        self.cells: list[CellSession] = []
        self.brokers: list[Broker] = []
        for number in range(cells):
            broker = broker_of(workers, models, number + 2, client=False)
            session = CellSession(broker, name=f"c{number}", instance=number + 1, rng=random.Random(number))
            self.cells.append(session)
            self.brokers.append(broker)
            session.connected(self.now_ns)
            self.carry(number)

    def carry(self, number: int) -> None:
        """Pass messages between a cell and the parent until there are none."""
        session, name = self.cells[number], self._id(number)
        while session.outbox:
            up, session.outbox = session.outbox, []
            for frames in up:
                self.parent.receive(name, *frames, self.now_ns)
            for to, header, body in self.parent.outbox.take():
                if to == name:
                    session.receive(header, body, self.now_ns)

    def request_costs(self, count: int, *, first: int = 0, chunks: int = 16) -> Costs:
        """Requests one after the other, each through the parent, a cell and a worker, with so many messages of chunks."""
        submits = [
            codec.pack_envelope(Submit(request=first + number + 1, attempt=0, operation="generate", model="m0"))
            for number in range(count)
        ]
        parent = cell = relayed = 0.0
        clock = time.thread_time
        for header in submits:
            began = clock()
            self.parent.receive(CLIENT, header, b"prompt", self.now_ns)
            ((name, dispatch, body),) = self.parent.outbox.take()
            parent += clock() - began
            number = int(name[1:])
            session, broker = self.cells[number], self.brokers[number]
            began = clock()
            session.receive(dispatch, body, self.now_ns)
            ((worker, given, _),) = session.requests.sift(broker.outbox.take())
            session.settle(self.now_ns)
            cell += clock() - began
            order = codec.unpack_envelope(given)
            token = codec.chunks_route(order.client) + codec.encode(
                columns_of([Chunk(order.request, 0, 0, 0, " token", [7])])
            )
            ends = codec.pack_envelope(Ends(instance=CLIENT_INSTANCE, ends=[End(request=order.request, attempt=0)]))
            began = clock()
            for _ in range(chunks):
                session.requests.relay(worker, token, self.now_ns)
            relayed += clock() - began
            session.outbox.clear()
            began = clock()
            broker.receive(worker, ends, b"", self.now_ns)
            assert not session.requests.sift(broker.outbox.take())
            session.settle(self.now_ns)
            ((terminal, outcome),), session.outbox = session.outbox, []
            cell += clock() - began
            began = clock()
            self.parent.receive(name, terminal, outcome, self.now_ns)
            self.parent.outbox.take()
            parent += clock() - began
        return Costs(parent / count * 1e6, cell / count * 1e6, relayed / count / chunks * 1e6)

    def announcement_us(self, number: int = 0) -> tuple[float, float]:
        """One more worker comes to a cell. Returns microseconds of the cell until the sum is told, and of the parent."""
        session, broker = self.cells[number], self.brokers[number]
        known = len(broker.registry.workers)
        hello = worker_hello(known, len(broker.registry.models))
        hello.models[0].context_length = 1_024 + known
        broker.receive(worker_id(known), *codec.pack(hello), self.now_ns)
        broker.outbox.take()
        session.settle(self.now_ns)
        return self._look(number)

    def load_us(self, number: int = 0) -> tuple[float, float]:
        """A worker of a cell has fewer slots. Returns as `announcement_us`, where the sum of a model is another one as well."""
        session, broker = self.cells[number], self.brokers[number]
        broker.receive(worker_id(0), *codec.pack(Load(slots=_SLOTS, waiting=session.load.waiting + 1)), self.now_ns)
        broker.outbox.take()
        session.settle(self.now_ns)
        return self._look(number)

    def _look(self, number: int) -> tuple[float, float]:
        session, name = self.cells[number], self._id(number)
        self.now_ns += milliseconds(CELL_LOOK_MS)
        began = time.thread_time()
        session.tick(self.now_ns)
        told_us = (time.thread_time() - began) * 1e6
        up, session.outbox = session.outbox, []
        assert up, "nothing was told"
        began = time.thread_time()
        for frames in up:
            self.parent.receive(name, *frames, self.now_ns)
        heard_us = (time.thread_time() - began) * 1e6
        self.parent.outbox.take()
        return told_us, heard_us

    @staticmethod
    def _id(number: int) -> RoutingId:
        return RoutingId(b"c%d" % number)
