"""The promises, as checks. Each raises `Violation` with the values that break it."""

from __future__ import annotations

from zfabric.core.broker import Broker
from zfabric.core.hosting import Hosting
from zfabric.core.pending import Pending
from zfabric.errors import DeadlineExceededError, FabricError, RequestCancelledError
from zfabric.limits import DEADLINE_GUARD_MS
from zfabric.wire.payloads import Chunk, Outcome


class Violation(AssertionError):  # noqa: N818 — what a checker finds is not an error of its own
    """A promise was broken."""


def token_text(prompt: int, position: int) -> str:
    """What every engine says at a position of the answer to a prompt: other streams' text cannot pass for it."""
    return f"{prompt}.{position} "


class Record:
    """What one reader saw of one request."""

    def __init__(
        self, prompt: int, count: int, client: int, submitted_ns: int, deadline_ms: int | None, *, exact: bool
    ) -> None:
        self.prompt = prompt
        self.count = count
        self.client = client
        self.submitted_ns = submitted_ns
        self.deadline_ms = deadline_ms
        self.exact = exact
        self.pending: Pending | None = None
        self.cancelled = False
        self.units = 0
        self.endings = 0
        self.error: FabricError | None = None

    def __repr__(self) -> str:
        return f"request {self.prompt} of client {self.client} ({self.units}/{self.count} tokens)"

    def chunk(self, chunk: Chunk) -> None:
        """Promise 2: in order, no gap, no repeat, and this request's own text. Nothing after the terminal."""
        if self.endings:
            raise Violation(f"{self} got a chunk after its terminal")
        expected = "".join(token_text(self.prompt, self.units + n) for n in range(len(chunk.token_ids)))
        if chunk.text != expected or chunk.token_ids != list(range(self.units, self.units + len(chunk.token_ids))):
            raise Violation(f"{self} got {chunk.text!r} instead of {expected!r}")
        self.units += len(chunk.token_ids)

    def end(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """Promise 1: one terminal, and a whole answer if it is a good one."""
        self.endings += 1
        self.error = error
        if self.endings > 1:
            raise Violation(f"{self} ended {self.endings} times")
        if error is None and self.units != self.count:
            raise Violation(f"{self} ended well without all of its tokens")
        if error is None and (
            outcome is None or outcome.usage is None or outcome.usage.completion_tokens != self.count
        ):
            raise Violation(f"{self} has usage {outcome.usage if outcome else None}")
        if isinstance(error, RequestCancelledError) and not self.cancelled:
            raise Violation(f"{self} was cancelled by nobody")
        if isinstance(error, DeadlineExceededError) and self.deadline_ms is None:
            raise Violation(f"{self} missed a deadline that it has not")

    def check_window(self, *, at_terminal: bool) -> None:
        """Promise 8: nothing beyond the credit, but for a terminal's rest."""
        pending = self.pending
        if pending is not None and not at_terminal and pending.next > pending.granted:
            raise Violation(f"{self} got {pending.next} units with credit for {pending.granted}")

    def check_deadline(self, now_ns: int) -> None:
        """Promise 6: a deadline ends a request, whatever else happens."""
        if self.endings or self.deadline_ms is None:
            return
        late_ms = (now_ns - self.submitted_ns) / 1e6 - self.deadline_ms
        if late_ms > DEADLINE_GUARD_MS + 50:
            raise Violation(f"{self} is {late_ms:.0f} ms beyond its deadline and has not ended")


def check_supplies(hosting: Hosting) -> None:
    """A host is a candidate where it suits and has a slot, and nothing that it could do waits meanwhile."""
    model, name = hosting.model, hosting.worker.name
    for demand, supply in model.supplies.items():
        able = hosting.open and hosting.suits(demand)
        if supply.candidates is not None and (hosting in supply.candidates) != able:
            raise Violation(f"worker {name} is {'not ' if able else ''}a candidate for {demand}, and should be")
        if able and demand in model.queue.demands:
            raise Violation(
                f"{model.queue.count(demand)} requests for {demand} wait, and worker {name} could take them"
            )


def check_bounds(broker: Broker) -> None:
    """Promise 7, at any time: slots, queues and what is derived from them."""
    for worker in broker.registry.workers.values():
        for hosting in worker.hosts.values():
            check_supplies(hosting)
    for model in broker.registry.models.values():
        if len(model.queue) > broker.config.queue_depth_max + broker.config.client_requests_max:
            raise Violation(f"{len(model.queue)} requests wait for {model.name}")
    waiting = sum(request.size for model in broker.registry.models.values() for request in model.queue.items())
    if waiting != broker.desk.counters.queued_bytes:
        raise Violation(f"{broker.desk.counters.queued_bytes} bytes are said to wait, {waiting} do")


def check_rest(broker: Broker) -> None:
    """Promise 7, at rest: every table is empty, every slot is free."""
    for client in broker.registry.clients.values():
        if client.requests:
            raise Violation(f"the controller keeps {len(client.requests)} requests of client {client.number} at rest")
    for worker in broker.registry.workers.values():
        if worker.live or worker.routes or worker.in_flight:
            raise Violation(f"the controller keeps {list(worker.live)} of worker {worker.name} at rest")
    if broker.routes.table:
        raise Violation(f"{len(broker.routes.table)} routes are left at rest")
    if any(model.queue for model in broker.registry.models.values()) or broker.desk.counters.queued_bytes:
        raise Violation("a queue is not empty at rest")
