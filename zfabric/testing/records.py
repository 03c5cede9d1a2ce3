"""What a caller asks for, what the engines answer, and what one reader sees: the promises to one request, as checks."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final, Literal

from zfabric.core.client.pending import Pending, Resume
from zfabric.errors import (
    FAILOVER_CODES,
    BackendError,
    DeadlineExceededError,
    EngineStalledError,
    FabricError,
    NameTakenError,
    NoWorkerError,
    RequestCancelledError,
    TooLargeError,
    WorkerLostError,
)
from zfabric.limits import DEADLINE_GUARD_MS
from zfabric.testing.tasks import TASKS
from zfabric.testing.world import MILLISECOND
from zfabric.wire.fields import Operation
from zfabric.wire.payloads import AnyRequest, CountRequest, GenerateRequest, OperateRequest, Usage
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.tasks import EmbedRequest

#: An embedding of so many values does not fit where frames are small.
VALUES_MANY: Final = 20_000
#: A lone surrogate: a legal character of a Python string that no encoder takes.
BROKEN: Final = "\ud800"


class Violation(AssertionError):  # noqa: N818 — what a checker finds is not an error of its own
    """A promise was broken."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One request as its caller makes it.

    Attributes:
        number: Names it in every text and result.
        model, worker: As given to the client; operators' calls name a worker.
        count: Tokens of the answer.
        draw: How its text is drawn.
        window, read_delay_ms: How much may be under way, and how late the reader reads.
        breaks_at: The engine hands over something that cannot be encoded in place of this token; None for never.
        unsendable: The request itself cannot be encoded.
        values: Length of an embedding.
        cancel_after_ms: The reader gives up: 0 is in the turn of the submission, None never.
    """

    number: int
    operation: Operation
    model: str
    worker: str = ""
    count: int = 1
    draw: Literal["greedy", "seeded", "unseeded"] = "greedy"
    resume: Resume = "exact"
    priority: int = 0
    deadline_ms: int | None = None
    window: int = 1_024
    read_delay_ms: float = 0.0
    breaks_at: int | None = None
    unsendable: bool = False
    values: int = 1
    cancel_after_ms: float | None = None

    @property
    def affinity(self) -> str:
        """What every other request has in common with some."""
        return f"session {self.number % 6}" if self.number % 2 else ""

    @property
    def breaks(self) -> bool:
        """Whether its answer cannot be encoded."""
        return self.breaks_at is not None and (self.operation != "generate" or self.breaks_at < self.count)

    @property
    def prompt(self) -> str:
        """What tells the engine all of this."""
        breaks = "" if self.breaks_at is None else str(self.breaks_at)
        broken = BROKEN if self.unsendable and "logit_bias" not in self.sampling else ""
        return f"{self.number}/{breaks}/{self.values}/{broken}"

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters of a generation."""
        given: dict[str, Any] = {"max_new_tokens": self.count}
        if self.draw == "greedy":
            given["temperature"] = 0.0
        elif self.draw == "seeded":
            given["seed"] = self.number
        if self.unsendable and self.operation == "generate" and self.number % 2:
            given["logit_bias"] = {2**70: 1.0}
        return given

    def request(self) -> AnyRequest:
        """The request that goes to the worker."""
        if self.operation == "generate":
            sampling = SamplingParams(**self.sampling)
            return GenerateRequest(prompt=self.prompt, sampling=sampling)
        if self.operation == "embed":
            return EmbedRequest(inputs=[self.prompt])
        if self.operation == "count_tokens":
            return CountRequest(prompt=self.prompt)
        if self.operation in TASKS:
            return TASKS[self.operation].request(self.prompt)
        return OperateRequest(call="show", arguments={"prompt": self.prompt})


#: Positions of one answer; a token's id is its draw, times this, plus its position.
_POSITIONS: Final = 1_000


def token_id(draw: int, position: int) -> int:
    """The token that stands at a position of an answer that was drawn so."""
    return draw * _POSITIONS + position


def token_text(number: int, token: int) -> str:
    """What every engine says with a token in the answer to a request: other streams' text cannot pass for it, nor can the
    text of the same request drawn another time."""
    draw, position = divmod(token, _POSITIONS)
    return f"{number}.{draw}.{position} "


class Record:
    """What one reader saw of one request."""

    def __init__(self, wish: Wish, client: int, submitted_ns: int) -> None:
        self.wish = wish
        self.client = client
        self.submitted_ns = submitted_ns
        #: The session's own entry, where the reader is that close to it.
        self.pending: Pending | None = None
        self.cancelled = False
        self.units = 0
        self.endings = 0
        self.error: FabricError | None = None
        #: Text of tokens that have arrived, and that has not.
        self._owed = ""
        self._draw: int | None = None
        #: The units that it had at the last look, if they were more than its credit.
        self._beyond: int | None = None

    def __repr__(self) -> str:
        wish = self.wish
        return f"{wish.operation} {wish.number} of client {self.client} ({self.units}/{wish.count} tokens)"

    def tokens(self, text: str, token_ids: list[int]) -> None:
        """Promise 2: in order, no gap, no repeat, and this request's own text. Nothing after the terminal."""
        if self.endings:
            raise Violation(f"{self} got a chunk after its terminal")
        number, first = self.wish.number, self.units
        positions = [token % _POSITIONS for token in token_ids]
        if positions != list(range(first, first + len(token_ids))):
            raise Violation(f"{self} got the tokens {positions}, the next is {first}")
        owed = self._owed + "".join([token_text(number, token) for token in token_ids])
        if not owed.startswith(text):
            raise Violation(f"{self} got {text!r} instead of {owed!r}")
        if token_ids and self.wish.resume != "any":
            draws = {token // _POSITIONS for token in token_ids} | ({self._draw} if self._draw is not None else set())
            if len(draws) > 1:
                raise Violation(f"{self} was drawn in {len(draws)} ways, and its caller has not allowed that")
            self._draw = draws.pop()
        self._owed = owed[len(text) :]
        self.units += len(token_ids)

    def end(self, error: FabricError | None, result: object) -> None:
        """Promise 1: one terminal, and a whole answer if it is a good one.

        Args:
            error: What the caller gets instead of an answer.
            result: Usage of a generation, else what the operation returns.
        """
        self.endings += 1
        self.error = error
        wish = self.wish
        if self.endings > 1:
            raise Violation(f"{self} ended {self.endings} times")
        if error is None:
            self._check_good(result)
        elif isinstance(error, RequestCancelledError) and not self.cancelled:
            raise Violation(f"{self} was cancelled by nobody")
        elif isinstance(error, DeadlineExceededError) and wish.deadline_ms is None:
            raise Violation(f"{self} missed a deadline that it has not")
        elif type(error) is BackendError and not wish.breaks:
            raise Violation(f"{self} ended with {error!r}, and its engine is well")
        elif isinstance(error, NameTakenError):
            raise Violation(f"{self} ended with {error!r}: somebody else speaks under its client's number")
        elif isinstance(error, TooLargeError) and wish.values < VALUES_MANY:
            raise Violation(f"{self} ended with {error!r}, and is small")
        elif isinstance(error, NoWorkerError) and "draining" in error.message and self._lost_worker:
            raise Violation(f"{self} was running, and a controller that drains refused its next attempt")

    @property
    def _lost_worker(self) -> bool:
        """Whether the controller itself ended its last attempt because of a worker."""
        loss = self.pending.loss if self.pending is not None else None
        return isinstance(loss, (WorkerLostError, EngineStalledError)) and "worker" in loss.details

    def _check_good(self, result: Any) -> None:
        wish = self.wish
        if wish.unsendable or wish.breaks:
            raise Violation(f"{self} ended well, and could not be {'sent' if wish.unsendable else 'answered'}")
        if wish.operation == "generate":
            if self.units != wish.count or self._owed:
                raise Violation(f"{self} ended well without all of its tokens")
            if not isinstance(result, Usage) or result.completion_tokens != wish.count:
                raise Violation(f"{self} has usage {result}")
            return
        if wish.operation != "operate":
            expected: Any = wish.number if wish.operation == "count_tokens" else [float(wish.number)] * wish.values
            if wish.operation in TASKS:
                expected = TASKS[wish.operation].read(wish.number)
            if result != expected:
                raise Violation(f"{self} has the result {result}")
            return
        if result["number"] != wish.number or result["worker"] != wish.worker:
            raise Violation(f"{self} of worker {wish.worker} has the result {result}")
        if wish.model and wish.model not in result["names"]:
            raise Violation(f"{self} asks for {wish.model}, and went to an engine of {result['names']}")

    def check_window(self) -> None:
        """Promise 8: nothing beyond the credit but for a terminal's rest. It may come in messages of its own, soon before the
        terminal, which may be lost then; and a later attempt may have it behind itself."""
        pending = self.pending
        if pending is None or self.endings or pending.attempt or pending.next <= pending.granted:
            self._beyond = None
            return
        if self._beyond is not None and pending.next > self._beyond:
            raise Violation(f"{self} got {pending.next} units with credit for {pending.granted}")
        self._beyond = pending.next

    def check_deadline(self, now_ns: int, awake_ns: int) -> None:
        """Promise 6: a deadline ends a request, whatever else happens.

        Args:
            awake_ns: Since when its client's process runs.
        """
        if self.endings or self.wish.deadline_ms is None:
            return
        due_ns = max(self.submitted_ns + self.wish.deadline_ms * MILLISECOND, awake_ns)
        late_ms = (now_ns - due_ns) // MILLISECOND
        # A late reader has to read what came before it sees the end.
        if late_ms > DEADLINE_GUARD_MS + 50 + 2 * self.wish.read_delay_ms:
            raise Violation(f"{self} is {late_ms} ms beyond its deadline and has not ended")

    @property
    def lost(self) -> bool:
        """Whether it ended because a worker or a connection did."""
        return self.error is not None and self.error.code in FAILOVER_CODES


def values_of(rows: int, dimensions: int, data: bytes) -> list[float]:
    """An embedding's values, read without the library."""
    return list(struct.unpack(f"<{rows * dimensions}f", data))
