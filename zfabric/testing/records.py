"""What a caller asks for, what the engines answer, and what one reader sees: the promises to one request, as checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from zfabric.core.pending import Pending, Resume
from zfabric.errors import (
    FAILOVER_CODES,
    BackendError,
    DeadlineExceededError,
    FabricError,
    NoWorkerError,
    RequestCancelledError,
)
from zfabric.limits import DEADLINE_GUARD_MS
from zfabric.wire.messages import Operation
from zfabric.wire.payloads import (
    AnyRequest,
    Chunk,
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    OperateRequest,
    Outcome,
    SamplingParams,
)

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
    cancel_after_ms: float | None = None

    @property
    def breaks(self) -> bool:
        """Whether its answer cannot be encoded."""
        return self.breaks_at is not None and (self.operation != "generate" or self.breaks_at < self.count)

    @property
    def prompt(self) -> str:
        """What tells the engine all of this."""
        breaks = "" if self.breaks_at is None else str(self.breaks_at)
        return f"{self.number}/{breaks}/{BROKEN if self.unsendable else ''}"

    def request(self) -> AnyRequest:
        """The request that goes to the worker."""
        if self.operation == "generate":
            sampling = SamplingParams(
                temperature=0.0 if self.draw == "greedy" else 1.0,
                seed=self.number if self.draw == "seeded" else None,
                max_new_tokens=self.count,
            )
            return GenerateRequest(prompt=self.prompt, sampling=sampling)
        if self.operation == "embed":
            return EmbedRequest(inputs=[self.prompt])
        if self.operation == "count_tokens":
            return CountRequest(prompt=self.prompt)
        return OperateRequest(call="show", arguments={"prompt": self.prompt})


def token_text(number: int, draw: int, position: int) -> str:
    """What every engine says at a position of the answer to a request: other streams' text cannot pass for it, nor can
    the text of the same request drawn another time."""
    return f"{number}.{draw}.{position} "


class Record:
    """What one reader saw of one request."""

    def __init__(self, wish: Wish, client: int, submitted_ns: int) -> None:
        self.wish = wish
        self.client = client
        self.submitted_ns = submitted_ns
        self.pending: Pending | None = None
        self.cancelled = False
        #: Its client was closed: it ends with that.
        self.closed = False
        self.units = 0
        self.endings = 0
        self.error: FabricError | None = None
        self._draw: int | None = None
        self._attempt = 0

    def __repr__(self) -> str:
        wish = self.wish
        return f"{wish.operation} {wish.number} of client {self.client} ({self.units}/{wish.count} tokens)"

    def chunk(self, chunk: Chunk) -> None:
        """Promise 2: in order, no gap, no repeat, and this request's own text. Nothing after the terminal."""
        if self.endings:
            raise Violation(f"{self} got a chunk after its terminal")
        number, first, count = self.wish.number, self.units, len(chunk.token_ids)
        if self._draw is None or (self.wish.resume == "any" and chunk.attempt != self._attempt):
            self._draw = int(chunk.text.split(".", 2)[1])
        draw = self._draw
        expected = "".join([token_text(number, draw, position) for position in range(first, first + count)])
        if chunk.text != expected or chunk.token_ids != list(range(first, first + count)):
            raise Violation(f"{self} got {chunk.text!r} instead of {expected!r}")
        self._attempt = chunk.attempt
        self.units += count

    def end(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """Promise 1: one terminal, and a whole answer if it is a good one."""
        self.endings += 1
        self.error = error
        wish = self.wish
        if self.endings > 1:
            raise Violation(f"{self} ended {self.endings} times")
        if error is None:
            self._check_good(outcome)
        elif isinstance(error, RequestCancelledError) and not self.cancelled:
            raise Violation(f"{self} was cancelled by nobody")
        elif isinstance(error, DeadlineExceededError) and wish.deadline_ms is None:
            raise Violation(f"{self} missed a deadline that it has not")
        elif type(error) is BackendError and not wish.breaks:
            raise Violation(f"{self} ended with {error!r}, and its engine is well")
        elif isinstance(error, NoWorkerError) and "draining" in error.message and self.pending and self.pending.attempt:
            raise Violation(f"{self} was running, and a controller that drains refused its next attempt")

    def _check_good(self, outcome: Outcome | None) -> None:
        wish = self.wish
        if wish.unsendable or wish.breaks:
            raise Violation(f"{self} ended well, and could not be {'sent' if wish.unsendable else 'answered'}")
        if outcome is None:
            raise Violation(f"{self} ended without an outcome")
        if wish.operation == "generate":
            if self.units != wish.count:
                raise Violation(f"{self} ended well without all of its tokens")
            if outcome.usage is None or outcome.usage.completion_tokens != wish.count:
                raise Violation(f"{self} has usage {outcome.usage}")
            return
        result = msgspec.msgpack.decode(outcome.result)
        if result["number"] != wish.number or result["operation"] != wish.operation:
            raise Violation(f"{self} has the result {result}")
        if wish.worker and result["worker"] != wish.worker:
            raise Violation(f"{self} was meant for worker {wish.worker}, and went to {result['worker']}")
        # Aliases are the fabric's, not a worker's; an operator's call names what one worker has.
        if wish.operation == "operate" and wish.model and wish.model not in result["names"]:
            raise Violation(f"{self} asks for {wish.model}, and went to an engine of {result['names']}")

    def check_window(self, *, burst: int) -> None:
        """Promise 8: nothing beyond the credit but for a terminal's rest, and what cannot be cut."""
        pending = self.pending
        if pending is not None and not self.endings and pending.next >= pending.granted + burst:
            raise Violation(f"{self} got {pending.next} units with credit for {pending.granted}")

    def check_deadline(self, now_ns: int) -> None:
        """Promise 6: a deadline ends a request, whatever else happens."""
        if self.endings or self.wish.deadline_ms is None:
            return
        late_ms = (now_ns - self.submitted_ns) / 1e6 - self.wish.deadline_ms
        if late_ms > DEADLINE_GUARD_MS + 50:
            raise Violation(f"{self} is {late_ms:.0f} ms beyond its deadline and has not ended")

    @property
    def lost(self) -> bool:
        """Whether it ended because a worker or a connection did."""
        return self.error is not None and self.error.code in FAILOVER_CODES
