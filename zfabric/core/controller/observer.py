"""What happens to requests, told once, and kept wherever it is wanted: counted, traced and recorded.

None of it is done per token, and of tracing and recording nothing where nobody asked for them.
"""

from __future__ import annotations

from typing import Protocol

from zfabric.core.controller.figures import Decision, Figures, Outcome
from zfabric.core.controller.hosting import Model
from zfabric.core.controller.journal import Journal
from zfabric.core.controller.peers import ClientPeer, Request, WorkerPeer
from zfabric.core.controller.spans import AttemptSpan, begin
from zfabric.core.spans import Spans
from zfabric.errors import Detail, FabricError, QueueFullError
from zfabric.wire.messages import Submit
from zfabric.wire.traces import log_name


class RemoteRequests(Protocol):
    """Who answers for requests to another controller."""

    def ended(self, request: Request, outcome: Outcome, now_ns: int) -> None:
        """An attempt has its terminal. One of a worker's is still at that worker."""

    def retired(self, request: Request) -> None:
        """Nothing is left of an attempt."""


class Observer:
    """Where the machine says what it does with requests.

    Args:
        journal: For operators; its recorder keeps the same events and those of requests.

    Attributes:
        figures: What is counted.
        spans: Where what traces are told is collected; None where nobody makes any.
        remote: Told of requests of clients of another controller; None where this one is no cell.
    """

    __slots__ = ("_journal", "figures", "remote", "spans")

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.figures = Figures()
        self.spans: Spans[AttemptSpan] | None = None
        self.remote: RemoteRequests | None = None

    def submitted(self, client: ClientPeer, request: Request, envelope: Submit, now_ns: int) -> None:
        """An attempt is accepted."""
        self.figures.submitted += 1
        if self.spans is not None:
            request.span = begin(self.spans, envelope, now_ns)
        if (recorder := self._journal.recorder) is not None:
            recorder.record(
                "submitted",
                (
                    request.key,
                    client.shown,
                    envelope.operation,
                    envelope.model,
                    envelope.worker,
                    envelope.priority,
                    envelope.deadline_ms,
                    envelope.window,
                    envelope.resume_from,
                    request.size,
                ),
            )

    def refused(
        self, client: ClientPeer, model: Model | None, envelope: Submit, size: int, error: FabricError, now_ns: int
    ) -> None:
        """An attempt is turned away."""
        self.figures.of_model(model).outcomes["rejected"] += 1
        self.figures.failed(error.code)
        if isinstance(error, QueueFullError):
            names = {"request": f"{envelope.request:x}", **log_name(envelope.traceparent)}
            self._journal.note("queue_full", model=envelope.model, client=client.label, error=error.message, **names)
        span = begin(self.spans, envelope, now_ns) if self.spans is not None else None
        if span is not None:
            span.judged("rejected", error.code)
            span.end(now_ns)
        if (recorder := self._journal.recorder) is not None:
            recorder.record(
                "rejected",
                (
                    (client.instance, envelope.request, envelope.attempt),
                    client.shown,
                    envelope.operation,
                    envelope.model,
                    size,
                    error.code,
                    error.message,
                ),
            )

    def dispatched(self, request: Request, worker: WorkerPeer, decision: Decision, now_ns: int) -> None:
        """A worker gets an attempt."""
        self.figures.decisions[decision] += 1
        model = ""
        if request.model is not None:
            model, figures = request.model.name, self.figures.of_model(request.model)
            figures.queue_time.observe(now_ns - request.accepted_ns)
            figures.failovers += request.attempt > 0
            figures.resumptions += request.resume_from > 0
        if request.span is not None:
            request.span.dispatched(worker.name, model, decision, now_ns)
        if (recorder := self._journal.recorder) is not None:
            recorder.record("dispatched", (request.key, worker.name, model, decision))

    def ended(self, request: Request, outcome: Outcome, code: int, now_ns: int) -> None:
        """An attempt has its terminal, with an error of this code."""
        figures = self.figures.of_model(request.model)
        figures.outcomes[outcome] += 1
        if code:
            self.figures.failed(code)
        if outcome == "completed" and request.accepted_ns:
            figures.whole_time.observe(now_ns - request.accepted_ns)
        if request.span is not None:
            request.span.judged(outcome, code)
        if self.remote is not None:
            self.remote.ended(request, outcome, now_ns)
        if (recorder := self._journal.recorder) is not None:
            worker = request.worker.name if request.worker is not None else ""
            recorder.record("ended", (request.key, outcome, code, worker))

    def given_up(self, request: Request, why: str) -> None:
        """An attempt is stopped, since nobody waits for it any more."""
        if (recorder := self._journal.recorder) is not None:
            recorder.record("given_up", (request.key, why))

    def befell(self, request: Request, event: str, now_ns: int, **fields: Detail) -> None:
        """Something that its trace is told happened to an attempt."""
        if request.span is not None:
            request.span.note(event, now_ns, **fields)

    def came_back(self, request: Request, former: Request, now_ns: int) -> None:
        """A worker has an attempt again that was lost with its connection."""
        if former.span is not None:
            request.span = former.span.again(now_ns)

    def retired(self, request: Request, now_ns: int) -> None:
        """Nothing is left of an attempt."""
        if request.span is not None:
            request.span.end(now_ns)
        if self.remote is not None:
            self.remote.retired(request)
