"""A request as its client holds it until it has ended, and who is told of its answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from msgspec import Raw

from zfabric import limits
from zfabric.core.timers import Timer
from zfabric.errors import FabricError, ParameterRangeError
from zfabric.wire.answers import ChunkExtra, Outcome
from zfabric.wire.fields import Operation
from zfabric.wire.messages import Claim
from zfabric.wire.traces import TraceContext

T = TypeVar("T")

#: Whether a stream that broke off may go on at another worker: "exact" only where the text is the same as without the
#: break, "any" also where tokens are drawn anew from there, "never" not at all.
Resume = Literal["exact", "any", "never"]


class Sink(Protocol):
    """Who reads one request's answer."""

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        """The next chunk, in order, without gap or repeat: its choice, text and tokens, and what few chunks have. The list is the
        sink's own. If it raises, the request ends with what it raised."""

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """The one terminal. Nothing comes after it."""


class Trace(Protocol):
    """Which trace a request belongs to, and what that is told of it. It must not raise."""

    @property
    def context(self) -> TraceContext:
        """Which span the fabric's own belong below."""

    def began(self, worker: str) -> None:
        """The first chunk of an attempt is there."""

    def choice_ended(self, index: int, reason: str) -> None:
        """One of its choices has ended."""

    def failed_over(self, attempt: int, error: FabricError) -> None:
        """An attempt was lost; this is the number of the next."""

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """It is over."""


class Inquirer(Protocol):
    """Who asked the controller something."""

    def answered(self, error: FabricError | None, results: list[Raw]) -> None:
        """The one answer: an error, or all parts of the result."""


@dataclass(slots=True)
class SessionCounters:
    """What went on besides plain answers.

    Attributes:
        submitted: Requests accepted.
        failovers: Attempts beyond the first.
        moves: Controllers that were left since they were silent, for the next one.
        claims: Running requests that were claimed after a connection or a worker was lost.
        stale_chunks, repeated_chunks: Chunks that nobody waited for.
        gaps: Chunks that were missed.
        broken: Answers that ended because a part of them could not be read.
        faults: Faults that named nothing of this client's.
    """

    submitted: int = 0
    failovers: int = 0
    moves: int = 0
    claims: int = 0
    stale_chunks: int = 0
    repeated_chunks: int = 0
    gaps: int = 0
    broken: int = 0
    faults: int = 0


class Pending:
    """One request that has not ended.

    Attributes:
        body: As it was encoded when it was accepted; empty once no other attempt can follow.
        accepted_ns: When that was.
        single: Whether there is one choice, so that its tokens are an answer's.
        reproducible: Whether the request itself says that another worker would draw the same text.
        drawn_seed: What is drawn by where the request has no seed.
        exact: Whether the worker said that it draws by `drawn_seed`.
        pinned: Whether the attempt that runs was given `drawn_seed` as its seed.
        loss: What ended the former attempt.
        barren: Attempts in a row that brought nothing.
        deaths, deaths_max: Of its workers, in a row under attempts that brought nothing, and after how many it ends.
        waits: How often the loss of a worker was waited out.
        next: The first unit that has not arrived.
        granted, consumed: Units that may be sent, and those that the reader took.
        host: The worker that its chunks come from, as they have told; "" while none has come.
        trace: Which trace it belongs to; None for none.
        affinity, prefix, prefix_block: What a policy of the controller may go by.
    """

    __slots__ = (
        "accepted_ns", "affinity", "attempt", "barren", "body", "characters", "consumed", "deadline_ns", "deaths", "deaths_max",
        "drawn_seed", "exact", "granted", "guard", "host", "loss", "model", "next", "number", "operation", "pinned", "prefix",
        "prefix_block", "priority", "reproducible", "resume", "single", "sink", "submitted", "token_ids", "trace", "waits",
        "window", "worker",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        operation: Operation,
        body: bytes,
        sink: Sink,
        *,
        model: str,
        worker: str,
        priority: int,
        resume: Resume,
        window: int,
        accepted_ns: int,
        deaths_max: int = limits.DEATHS_DEFAULT,
    ) -> None:
        self.number = number
        self.operation: Operation = operation
        self.body = body
        self.sink = sink
        self.model = model
        self.worker = worker
        self.priority = priority
        self.resume: Resume = resume
        self.window = self.granted = window
        self.accepted_ns = accepted_ns
        self.deadline_ns: int | None = None
        self.guard: Timer | None = None
        self.submitted = False
        self.attempt = 0
        self.barren = 0
        self.deaths = 0
        self.deaths_max = deaths_max
        self.waits = 0
        self.loss: FabricError | None = None
        self.next = 0
        self.characters = 0
        self.token_ids: list[int] = []
        self.consumed = 0
        self.single = True
        self.reproducible = False
        self.exact = False
        self.pinned = False
        self.drawn_seed: int | None = None
        self.trace: Trace | None = None
        self.affinity = self.host = ""
        self.prefix = b""
        self.prefix_block = 0

    @property
    def repeatable(self) -> bool:
        """Whether another attempt may follow at all: an operator's call is never made twice."""
        return self.operation != "operate" and self.resume != "never"

    @property
    def continuable(self) -> bool:
        """Whether another worker can go on from what has arrived."""
        if not self.next:
            return True
        if not self.single or len(self.token_ids) != self.next:
            return False
        return self.reproducible or self.exact or self.resume == "any"

    def claim(self, *, moved: bool = False) -> Claim:
        """That this client still waits for it. Args: moved: Whether the controller may be another than it was submitted to."""
        return Claim(
            request=self.number,
            attempt=self.attempt,
            next=self.next,
            window=self.granted,
            model=self.model,
            affinity=self.affinity,
            moved=moved,
            worker=self.host if moved else "",
        )

    def left_ms(self, now_ns: int) -> int | None:
        """Time until the deadline, if it has one."""
        return None if self.deadline_ns is None else max(0, (self.deadline_ns - now_ns) // 1_000_000)


#: What a claim takes in a message at most, beside its texts: five numbers and the marks of all.
_CLAIM_BYTES = 50


def in_parts(pendings: list[Pending]) -> list[list[Pending]]:
    """Requests in groups whose claims fit one message each, a HELLO too."""
    parts: list[list[Pending]] = [[]]
    room = limits.FRAME_BYTES_GOAL - limits.HEADER_BYTES_MAX
    used = 0
    for pending in pendings:
        size = _CLAIM_BYTES + 4 * (len(pending.model) + len(pending.affinity) + len(pending.host))
        if used + size > room or len(parts[-1]) >= limits.LIST_LENGTH_MAX:
            parts.append([])
            used = 0
        parts[-1].append(pending)
        used += size
    return parts


def slices(items: list[T]) -> Iterator[list[T]]:
    """A list in parts that a message takes."""
    for start in range(0, len(items), limits.LIST_LENGTH_MAX):
        yield items[start : start + limits.LIST_LENGTH_MAX]


def check_ranges(model: str, worker: str, priority: int, deadline_ms: int | None, affinity: str) -> None:
    """Raises: ParameterRangeError: What an envelope cannot hold."""
    for name, value, low, high in (
        ("deadline_ms", deadline_ms or 0, 0, limits.DEADLINE_MAX_MS),
        ("priority", priority, -limits.PRIORITY_MAX, limits.PRIORITY_MAX),
        ("length of model", len(model), 0 if worker else 1, limits.NAME_LENGTH_MAX),
        ("length of worker", len(worker), 0, limits.NAME_LENGTH_MAX),
        ("length of affinity", len(affinity), 0, limits.AFFINITY_LENGTH_MAX),
    ):
        if not low <= value <= high:
            raise ParameterRangeError(f"{name} is {value}, it must be {low} … {high}", parameter=name, value=value)
