"""The cores with a simulated world around them: what a process, a socket and an engine would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from zfabric.core.broker import Broker
from zfabric.core.broker_config import BrokerConfig
from zfabric.core.client_session import ClientSession
from zfabric.core.pending import Pending
from zfabric.core.worker_session import Begin, DrainAsked, Order, Refused, Stop, WorkerSession
from zfabric.errors import FabricError
from zfabric.ids import RoutingId
from zfabric.testing.checkers import Record, Violation, token_text
from zfabric.testing.network import Link, Network
from zfabric.testing.world import Alarm, World
from zfabric.wire.codec import ROUTE_BYTES
from zfabric.wire.kinds import CHUNKS
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import Chunk, Delta, GenerateRequest, Outcome, SamplingParams, Usage

MODEL: Final = "sim"


class SimController:
    """A broker behind a hub. It can die and come back as another."""

    def __init__(self, world: World, network: Network, config: BrokerConfig) -> None:
        self.world = world
        self.network = network
        self.config = config
        self.broker: Broker | None = None
        self.started_ns = 0
        self.start()

    def start(self) -> None:
        """A new process: nothing is remembered."""
        if self.broker is None:
            self.started_ns = self.world.now_ns
            self.broker = Broker(self.config, self.world.rng, self.world.now_ns)
            self._alarm = Alarm(self.world, self._tick)
            self.network.hub = self
            self._after()

    def die(self) -> None:
        """SIGKILL."""
        self.broker = None
        self.network.hub_gone()

    def hub_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        broker = self.broker
        if broker is None:
            return
        if header and header[0] == CHUNKS:
            route = broker.routes.table.get(sender + header[:ROUTE_BYTES])
            if route is not None:
                route.worker.heard_ns = self.world.now_ns
                broker.outbox.pending.append((route.client, header, body))
                self._after()
                return
        broker.receive(sender, header, body, self.world.now_ns)
        self._after()

    def hub_lost(self, peer: RoutingId) -> None:
        if self.broker is not None:
            self.broker.disconnected(peer, self.world.now_ns)
            self._after()

    def overflow(self, peer: RoutingId) -> None:
        """A peer's pipe stayed full: the session ends here, and the peer knows only when it next says something."""
        self.hub_lost(peer)

    def _tick(self) -> None:
        if self.broker is not None:
            self.broker.tick(self.world.now_ns)
            self._after()

    def _after(self) -> None:
        broker = self.broker
        assert broker is not None
        while broker.outbox.pending:
            for to, header, body in broker.outbox.take():
                link = self.network.links.get(to)
                if link is None:
                    broker.disconnected(to, self.world.now_ns)
                else:
                    link.to_peer(header, body)
        self._alarm.arm(broker.next_deadline_ns())


class SimWorker:
    """A worker session with an engine that says what its prompt demands, a token a step for each request."""

    def __init__(self, world: World, network: Network, name: str, slots: int, *, resumes: bool, step_ms: float) -> None:
        self.world = world
        self.network = network
        self.name = name
        self.slots = slots
        self.resumes = resumes
        self.step_ms = step_ms
        self.alive = False
        self.died_ns: int | None = None
        self.link: Link | None = None
        self.frozen_until_ns = 0
        self.engine_hangs = False
        self.active: dict[str, list[int]] = {}
        self._held: list[tuple[bytes, bytes]] = []
        self.start()

    def start(self) -> None:
        """A new process under the same name."""
        if self.alive:
            return
        self.alive = True
        self.died_ns = None
        self.active = {}
        self._held = []
        self.frozen_until_ns = 0
        self.engine_hangs = False
        self.session = WorkerSession(name=self.name, instance=self.world.rng.getrandbits(63), rng=self.world.rng)
        self.session.load.slots = self.slots
        capabilities = ["generate"] + ["resume"] * self.resumes
        self.session.announce([ModelInfo(name=MODEL, capabilities=capabilities)], self.world.now_ns)
        self._alarm = Alarm(self.world, self._tick)
        self._life = object()
        self.network.connect(self)
        self._schedule_step(self._life)

    def die(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.died_ns = self.world.now_ns
        self.active = {}
        link, self.link = self.link, None
        if link is not None:
            self.network.cut(link, peer_alive=False)

    def freeze(self, milliseconds: float) -> None:
        """SIGSTOP, and SIGCONT later. The kernel keeps the connection; what arrives waits."""
        self.frozen_until_ns = self.world.now_ns + int(milliseconds * 1e6)
        self.world.after(milliseconds, self._thaw)

    @property
    def frozen(self) -> bool:
        return self.world.now_ns < self.frozen_until_ns

    def _thaw(self) -> None:
        if self.alive and not self.frozen:
            held, self._held = self._held, []
            for header, body in held:
                self.link_message(header, body)
            self._tick()

    def link_up(self, link: Link) -> None:
        if not self.alive:
            self.network.cut(link, peer_alive=False)
            return
        if self.frozen:
            self.world.at(self.frozen_until_ns, lambda: self.link_up(link) if link.alive else None)
            return
        self.link = link
        self.session.connected(self.world.now_ns)
        self._after()

    def link_down(self, link: Link) -> None:
        if link is self.link:
            self.link = None
            self._held.clear()
            self.session.disconnected()

    def link_message(self, header: bytes, body: bytes) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._held.append((header, body))
            return
        self._obey_all(self.session.receive(header, body, self.world.now_ns))
        self._after()

    def _obey_all(self, orders: Sequence[Order]) -> None:
        for order in orders:
            self._obey(order)

    def _obey(self, order: Order) -> None:
        if isinstance(order, Begin):
            request = order.request
            assert isinstance(request, GenerateRequest)
            assert request.sampling.max_new_tokens is not None
            self.active[order.request_id] = [
                int(request.prompt or 0), len(request.resume_token_ids), request.sampling.max_new_tokens
            ]  # fmt: skip
            if len(self.active) > self.slots:
                raise Violation(f"worker {self.name} runs {len(self.active)} requests with {self.slots} slots")
        elif isinstance(order, Stop):
            self.active.pop(order.request_id, None)
            self._obey_all(self.session.stopped(order.request_id, self.world.now_ns))
        else:
            assert not isinstance(order, DrainAsked) or order.limit_ms >= 0
            assert not isinstance(order, Refused) or order.error.retryable

    def _schedule_step(self, life: object) -> None:
        def step() -> None:
            if self.alive and life is self._life:
                if not self.frozen and not self.engine_hangs:
                    self._step()
                self._schedule_step(life)

        self.world.after(self.step_ms * self.world.rng.uniform(0.5, 1.5), step)

    def _step(self) -> None:
        """One token for every active request."""
        if not self.active:
            return
        lines: list[tuple[str, Delta]] = []
        for request_id, state in list(self.active.items()):
            prompt, position, count = state
            state[1] = position + 1
            delta = Delta(text=token_text(prompt, position), token_ids=[position])
            if position + 1 >= count:
                delta.finish_reason = "length"
                delta.usage = Usage(1, position + 1)
                del self.active[request_id]
            lines.append((request_id, delta))
        self.session.load.progress += 1
        self._obey_all(self.session.emit(lines, self.world.now_ns))
        self._obey_all(self.session.flush())
        self._after()

    def _tick(self) -> None:
        if self.alive and not self.frozen:
            self.session.tick(self.world.now_ns)
            self._after()

    def _after(self) -> None:
        outbox, self.session.outbox = self.session.outbox, []
        if self.link is not None:
            for header, body in outbox:
                self.link.to_hub(header, body)
        self._alarm.arm(self.session.timers.next_ns())


class SimSink:
    """The reader of one request: checks every chunk as it comes, and consumes at once or late."""

    def __init__(self, client: SimClient, record: Record, read_delay_ms: float) -> None:
        self.client = client
        self.record = record
        self.pending: Pending | None = None
        self._read_delay_ms = read_delay_ms

    def arrived(self, chunk: Chunk) -> None:
        self.record.chunk(chunk)
        pending, units = self.pending, len(chunk.token_ids) or 1
        if pending is None:
            return
        if self._read_delay_ms:
            self.client.world.after(self._read_delay_ms, lambda: self.client.consume(pending, units))
        else:
            self.client.session.consumed(pending, units)

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        self.record.end(error, outcome)


class SimClient:
    """A client session that submits, cancels, reads late, loses its connection, and dies."""

    def __init__(self, world: World, network: Network, number: int) -> None:
        self.world = world
        self.network = network
        self.number = number
        self.alive = True
        self.link: Link | None = None
        self.records: list[Record] = []
        self.session = ClientSession(instance=world.rng.getrandbits(63), rng=world.rng)
        self._alarm = Alarm(world, self._tick)
        network.connect(self)

    def submit(
        self, prompt: int, count: int, *, seeded: bool, deadline_ms: int | None, window: int, delay: float
    ) -> Record:
        """Ask for `count` tokens of a prompt. Returns what becomes of it."""
        record = Record(prompt, count, self.number, self.world.now_ns, deadline_ms, exact=seeded)
        sink = SimSink(self, record, delay)
        sampling = SamplingParams(temperature=0.0 if seeded else 1.0, max_new_tokens=count)
        request = GenerateRequest(prompt=str(prompt), sampling=sampling)
        try:
            sink.pending = record.pending = self.session.submit(
                "generate", request, sink, self.world.now_ns, model=MODEL, deadline_ms=deadline_ms, window=window
            )
        except FabricError as error:
            record.end(error, None)
        self.records.append(record)
        self._after()
        return record

    def cancel(self, record: Record) -> None:
        """The reader gives up."""
        if record.pending is not None and self.alive:
            record.cancelled = True
            self.session.cancel(record.pending)
            self._after()

    def consume(self, pending: Pending, units: int) -> None:
        """A late reader reads."""
        if self.alive:
            self.session.consumed(pending, units)
            self._after()

    def die(self) -> None:
        """SIGKILL: nobody reads any more, and nothing is owed."""
        self.alive = False
        link, self.link = self.link, None
        if link is not None:
            self.network.cut(link, peer_alive=False)

    def link_up(self, link: Link) -> None:
        if not self.alive:
            self.network.cut(link, peer_alive=False)
            return
        self.link = link
        self.session.connected(self.world.now_ns)
        self._after()

    def link_down(self, link: Link) -> None:
        if link is self.link:
            self.link = None
            self.session.disconnected()

    def link_message(self, header: bytes, body: bytes) -> None:
        if self.alive:
            self.session.receive(header, body, self.world.now_ns)
            self._after()

    def _tick(self) -> None:
        if self.alive:
            self.session.tick(self.world.now_ns)
            self._after()

    def _after(self) -> None:
        self.session.flush()
        outbox, self.session.outbox = self.session.outbox, []
        if self.link is not None:
            for header, body in outbox:
                self.link.to_hub(header, body)
        self._alarm.arm(self.session.timers.next_ns())
