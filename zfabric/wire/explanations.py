"""Why a request went where it went: the result of the question `explain`."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from zfabric.wire.listings import RequestStatus

#: Whether a request may go to a host now: "open" if it may; else what keeps it out.
HostState = Literal["open", "full", "circuit", "draining", "stalled", "unsuited", "paused"]


class Choice(Struct, kw_only=True):
    """One dispatch, and what was known at that time.

    Attributes:
        attempt: Which attempt.
        ago_s: Seconds since then.
        model: Its model; "" for an operator's call.
        worker: Who got it.
        decision: "chosen" by the policy at once; "queued", taken from the queue by the first worker with a free slot; "moved"
            from another model's queue, and chosen then; or "asked", its client named the worker.
        policy: The policy of that time.
        candidates: How many workers the policy could choose among; 0 where it was not asked.
        loads: Live requests of those workers at that time: of all where they are few, else of the least loaded one.
        held: Where requests with its affinity went before; "" for nowhere.
        blocks: Blocks of its prompt that had hashes.
        block_tokens: Tokens of a block.
        cached: How many of the first blocks the worker was taken to have.
        cached_most: The most that any worker was taken to have: what is more than `cached` is the regret of the choice.
        cached_most_at: Which one that is; "" for none.
    """

    attempt: int
    ago_s: float
    model: str
    worker: str
    decision: str
    policy: str
    candidates: int
    loads: dict[str, int]
    held: str
    blocks: int
    block_tokens: int
    cached: int
    cached_most: int
    cached_most_at: str


class HostStatus(Struct, kw_only=True):
    """A worker that hosts the request's model, as it stands for the request now.

    Attributes:
        worker: Its name.
        state: Whether the request may go there now, or what keeps it out.
        load: Live requests of the worker, all models.
        speed: Relative speed that it announced.
        latency_s: Mean seconds of requests of the model there; None before the first.
        cached: How many of the first blocks of the prompt it is taken to have.
        held: Whether requests with the same affinity went there lately.
        cost: What the policy takes the request to cost there, the least is the best; None for policies without a cost.
        serves_it: Whether it has the request.
    """

    worker: str
    state: HostState
    load: int
    speed: float
    latency_s: float | None = None
    cached: int = 0
    held: bool = False
    cost: float | None = None
    serves_it: bool = False


class Explanation(Struct, kw_only=True):
    """One request.

    Attributes:
        policy: The present one.
        request: The request while it is at the controller; None after that.
        choices: Its dispatches, the last one first, as far as the controller still knows them.
        hosts: Workers that host its model, those first that could take it now; none after its end.
        left_out: How many workers come after the last of them.
    """

    policy: str
    request: RequestStatus | None = None
    choices: list[Choice] = field(default_factory=list)
    hosts: list[HostStatus] = field(default_factory=list)
    left_out: int = 0
