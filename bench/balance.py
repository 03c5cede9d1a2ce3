"""A cluster on paper: the fabric's own dispatch policies, workers of unequal speed, the requests of a trace.

Nothing here keeps time but the trace: a run is a function of it and a seed.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.traces import DECODE, Arrival
from zfabric.core.controller.candidates import Candidates, Host
from zfabric.core.controller.dispatch import Ask, find_policy

#: Tokens a second of prefill, at speed 1.
_PREFILL: Final = 8_000.0
_SLOTS: Final = 8


@dataclass(frozen=True)
class Outcome:
    """How a trace went.

    Attributes:
        makespan_s: From the first arrival to the last end.
        wait_p50_s, wait_p99_s: From arrival to the start of a request.
        spread: Mean over all arrivals of the difference between the largest and the least load a worker's slot.
    """

    makespan_s: float
    wait_p50_s: float
    wait_p99_s: float
    spread: float


class _Worker(Host):
    """A host with its own line of waiting requests, which only dispatch at arrival fills."""

    __slots__ = ("waiting",)

    def __init__(self, number: int, speed: float) -> None:
        super().__init__(f"w{number}", speed, _SLOTS)
        self.waiting: deque[tuple[Arrival, float]] = deque()


def service_s(arrival: Arrival, speed: float) -> float:
    """How long a request takes a slot."""
    return (arrival.prompt_tokens / _PREFILL + arrival.answer_tokens / DECODE) / speed


def lower_bound_s(trace: Sequence[Arrival], speeds: Sequence[float]) -> float:
    """No schedule, not even one that knows the whole trace, ends before this: what arrives from some moment on needs all
    slots for so long, and the longest request needs the fastest slot."""
    capacity = sum(speeds) * _SLOTS
    bound = max(arrival.at_s + service_s(arrival, max(speeds)) for arrival in trace)
    left = 0.0
    for arrival in reversed(trace):
        left += service_s(arrival, 1.0)
        bound = max(bound, arrival.at_s + left / capacity)
    return bound


def play(trace: Sequence[Arrival], speeds: Sequence[float], policy: str, *, central: bool, seed: int = 1) -> Outcome:
    """Run a trace.

    Args:
        central: Requests wait in the controller until a worker has a slot, as zfabric does it; else each goes to a
            worker the moment it arrives and waits there, as FastChat does it.
    """
    rng, choose = random.Random(seed), find_policy(policy)
    workers = [_Worker(number, speed) for number, speed in enumerate(speeds)]
    candidates = Candidates()
    for worker in workers:
        candidates.add(worker, rng)
    ends: list[tuple[float, int, _Worker, float]] = []
    queue: deque[Arrival] = deque()
    waits: list[float] = []
    spreads: list[float] = []
    order = 0

    def start(worker: _Worker, arrival: Arrival, now: float) -> None:
        nonlocal order
        order += 1
        worker.live.add(order)
        waits.append(now - arrival.at_s)
        heapq.heappush(ends, (now + service_s(arrival, worker.speed), order, worker, now))

    def give(arrival: Arrival, now: float) -> bool:
        chosen = choose(Ask(candidates, rng)) if len(candidates) else None
        if not isinstance(chosen, _Worker):
            return False
        chosen.line.length += 1
        if chosen.in_flight < _SLOTS:
            start(chosen, arrival, now)
        else:
            chosen.waiting.append((arrival, now))
        if central and chosen.load >= _SLOTS:
            candidates.remove(chosen)
        else:
            candidates.changed(chosen, rng)
        return True

    def finish() -> float:
        now, number, worker, began = heapq.heappop(ends)
        worker.live.remove(number)
        worker.line.length -= 1
        worker.latency_ns = (
            0.8 * worker.latency_ns + 0.2 * (now - began) * 1e9 if worker.latency_ns else (now - began) * 1e9
        )
        if worker.waiting:
            start(worker, worker.waiting.popleft()[0], now)
        candidates.add(worker, rng)
        while queue and give(queue[0], now):
            queue.popleft()
        return now

    for arrival in trace:
        while ends and ends[0][0] <= arrival.at_s:
            finish()
        if queue or not give(arrival, arrival.at_s):
            queue.append(arrival)
        loads = [worker.load / _SLOTS for worker in workers]
        spreads.append(max(loads) - min(loads))
    now = 0.0
    while ends:
        now = finish()
    waits.sort()
    return Outcome(now, waits[len(waits) // 2], waits[len(waits) * 99 // 100], sum(spreads) / len(spreads))
