"""A client session with callers and readers around it: what a client's process is to the fabric."""

from __future__ import annotations

from typing import Final

from msgspec import Raw

from zfabric.core.client.pending import Pending
from zfabric.core.client.session import ClientSession
from zfabric.core.controller.access import EVERYBODY
from zfabric.errors import FabricError
from zfabric.testing.network import Link, Network
from zfabric.testing.records import Record, Violation, Wish, values_of
from zfabric.testing.world import Alarm, World
from zfabric.wire import codec
from zfabric.wire.answers import ChunkExtra, Outcome
from zfabric.wire.tasks import EmbedResult, EmbedTokensResult


class SimSink:
    """The reader of one request: checks every chunk as it comes, and consumes at once or late."""

    def __init__(self, client: SimClient, record: Record) -> None:
        self.client = client
        self.record = record
        self._read_delay_ms = record.wish.read_delay_ms

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        self.record.tokens(text, token_ids)
        pending, units = self.record.pending, len(token_ids) or 1
        if pending is None:
            return
        if self._read_delay_ms:
            self.client.world.after(self._read_delay_ms, lambda: self.client.consume(pending, units))
        else:
            self.client.session.consumed([(pending, units)])

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        result: object = None
        if outcome is not None:
            operation = self.record.wish.operation
            if operation == "generate":
                result = outcome.usage
            elif operation == "embed":
                embedded = codec.unpack_result(outcome.result, EmbedResult)
                result = values_of(embedded.rows, embedded.dimensions, embedded.data)
            elif operation == "embed_tokens":
                told = codec.unpack_result(outcome.result, EmbedTokensResult)
                result = [values_of(sum(told.tokens), told.dimensions, told.data)]
            else:
                result = codec.unpack_result(outcome.result, object)
        self.record.end(error, result)


class Question:
    """One query, and what became of it."""

    def __init__(self, what: str, client: int) -> None:
        self.what = what
        self.client = client
        self.answers = 0
        self.error: FabricError | None = None

    def answered(self, error: FabricError | None, results: list[Raw]) -> None:
        self.answers += 1
        self.error = error
        if self.answers > 1:
            raise Violation(f"query {self.what!r} of client {self.client} was answered {self.answers} times")


class SimClient:
    """A client that submits, asks, cancels, reads late, loses its connection, is closed, and dies."""

    honest: Final = True
    grant: Final = EVERYBODY

    def __init__(self, world: World, network: Network, number: int) -> None:
        self.world = world
        self.number = number
        self.alive = True
        self.awake_ns = 0
        self.link: Link | None = None
        self.records: list[Record] = []
        self.questions: list[Question] = []
        self.session = ClientSession(instance=world.rng.getrandbits(63), rng=world.rng, secret=world.rng.randbytes(16))
        #: Whether it goes to another controller when it has lost one.
        self.roams = self.session.several = len(network.all) > 1
        self.session.leave = self._move_on
        self._alarm = Alarm(world, self._tick)
        (world.rng.choice(network.all) if self.roams else network).connect(self)

    def submit(self, wish: Wish) -> Record:
        """Make a request. Returns what becomes of it."""
        record = Record(wish, self.number, self.world.now_ns)
        sink = SimSink(self, record)
        try:
            record.pending = self.session.submit(
                wish.operation,
                wish.request(),
                sink,
                self.world.now_ns,
                model=wish.model,
                worker=wish.worker,
                priority=wish.priority,
                deadline_ms=wish.deadline_ms,
                resume=wish.resume,
                window=wish.window,
                affinity=wish.affinity,
            )
        except FabricError as error:
            record.end(error, None)
        self.session.accepted(self.world.now_ns)
        self.records.append(record)
        if wish.cancel_after_ms == 0:
            self._cancel(record)
        elif wish.cancel_after_ms is not None:
            self.world.after(wish.cancel_after_ms, lambda: self._cancel(record))
        self._after()
        return record

    def ask(self, what: str, arguments: dict[str, object]) -> None:
        """Ask the controller."""
        question = Question(what, self.number)
        self.questions.append(question)
        self.session.ask(what, arguments, question, self.world.now_ns)
        self.session.accepted(self.world.now_ns)
        self._after()

    def _cancel(self, record: Record) -> None:
        """The reader gives up."""
        if record.pending is not None and self.alive and not record.endings:
            record.cancelled = True
            self.session.cancel(record.pending)
            if not record.error:
                raise Violation(f"{record} was cancelled and goes on")
            self._after()

    def consume(self, pending: Pending, units: int) -> None:
        """A late reader reads."""
        if self.alive:
            self.session.consumed([(pending, units)])
            self._after()

    def close(self) -> None:
        """Say goodbye. All that waited has ended then."""
        if self.alive:
            self.session.close()
            self._after()
            unended = [record for record in self.records if record.endings != 1]
            if unended or self.session.busy:
                raise Violation(f"client {self.number} was closed, and left {unended}")
            self.alive = False
            # The farewell leaves before the connection does.
            self.world.after(100, self._leave)

    def freeze(self, milliseconds: float) -> None:
        """Only a client with a loop of its own can be stopped in its tracks."""

    def die(self) -> None:
        """SIGKILL: nobody reads any more, and nothing is owed."""
        if self.alive:
            self.alive = False
            self._leave()

    def _leave(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.network.cut(link, peer_alive=False)

    def link_up(self, link: Link) -> None:
        if not self.alive:
            link.network.cut(link, peer_alive=False)
            return
        self.link = link
        self.session.connected(self.world.now_ns)
        self._after()

    def _move_on(self) -> None:
        if self.link is not None:
            self.link.network.cut(self.link)

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
