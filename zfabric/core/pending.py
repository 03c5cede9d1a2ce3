"""A request as its client holds it until it has ended, and who is told of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from zfabric import limits
from zfabric.core.timers import Timer
from zfabric.errors import FabricError
from zfabric.wire.messages import Answer, Operation
from zfabric.wire.payloads import AnyRequest, Chunk, Outcome

#: Whether a stream that broke off may go on at another worker: "exact" only where the text is the same as without the
#: break, "any" also where tokens are drawn anew from there, "never" not at all.
Resume = Literal["exact", "any", "never"]


class Sink(Protocol):
    """Who reads one request's answer."""

    def arrived(self, chunk: Chunk) -> None:
        """The next chunk, in order, without gap or repeat."""

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """The one terminal. Nothing comes after it."""


class Inquirer(Protocol):
    """Who asked the controller something."""

    def answered(self, error: FabricError | None, answer: Answer | None) -> None:
        """The one answer."""


@dataclass(slots=True)
class SessionCounters:
    """What went on besides plain answers."""

    submitted: int = 0
    failovers: int = 0
    claims: int = 0
    stale_chunks: int = 0
    repeated_chunks: int = 0
    gaps: int = 0


class Pending:
    """One request that has not ended."""

    __slots__ = (
        "attempt", "barren", "characters", "consumed", "deadline_ns", "granted", "guard", "model", "next", "number",
        "operation", "priority", "request", "resume", "sink", "submitted", "token_ids", "window", "worker",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        operation: Operation,
        request: AnyRequest,
        sink: Sink,
        *,
        model: str,
        priority: int,
        worker: str,
    ) -> None:
        self.number = number
        self.operation: Operation = operation
        self.request = request
        self.sink = sink
        self.model = model
        self.priority = priority
        self.worker = worker
        self.resume: Resume = "exact"
        self.window = limits.WINDOW_UNITS
        self.attempt = 0
        self.barren = 0
        self.next = 0
        self.characters = 0
        self.token_ids: list[int] = []
        self.consumed = 0
        self.granted = 0
        self.deadline_ns: int | None = None
        self.guard: Timer | None = None
        self.submitted = False
