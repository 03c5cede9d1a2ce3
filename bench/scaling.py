"""Replicas on paper: the fabric's own rule for their number, on a trace, beside fixed numbers and one that knows what comes.

A replica computes prompts one after the other and decodes each of its requests at one pace, up to its slots. It loads for a while
before it takes requests, and one that is too many finishes what it has. A replica costs a GPU from its start to its end. Nothing
here keeps time but the trace: a run is a function of it, and its figures do not depend on the machine.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.placement import PREFILL
from bench.traces import DECODE, Arrival
from zfabric.core.controller.scaling import Rule, Scaler, Signals
from zfabric.limits import SCALE_LOOK_MS

#: Slots of a replica at most.
SLOTS_MAX: Final = 16
#: From the start of a replica to its first request: an engine of some billion parameters loads for so long.
LOAD_S: Final = 60.0
#: A first token is in time if it comes no more than this later than it could on a replica that has nothing else.
LATE_S: Final = 2.0
#: The share of its time that a replica may be computing prompts for those to start soon.
_BUSY_PROMPTS: Final = 0.7
#: How often it is looked how many there should be.
LOOK_S: Final = SCALE_LOOK_MS / 1_000

#: How many replicas there should be. Args: what the load is, seconds since the beginning.
Decide = Callable[[Signals, float], int]


@dataclass(frozen=True)
class Outcome:
    """How a trace went.

    Attributes:
        in_time: Share of the requests whose first token was in time.
        late_p99_s: How much later it came than it could, of the 99th percentile.
        gpu_hours: Of all replicas.
        most: Replicas at a time.
    """

    in_time: float
    late_p99_s: float
    gpu_hours: float
    most: int


class _Replica:
    __slots__ = ("leaves", "live", "prefilled_s", "ready_s", "since_s")

    def __init__(self, now: float, load_s: float) -> None:
        self.since_s = now
        self.ready_s = self.prefilled_s = now + load_s
        self.live = 0
        self.leaves = False


def slots_for(arrivals: Sequence[Arrival]) -> int:
    """What an operator who has measured gives a replica: as many slots as it serves while prompts take most of its time."""
    prompts_s = sum(arrival.prompt_tokens for arrival in arrivals) / PREFILL
    answers_s = sum(arrival.answer_tokens for arrival in arrivals) / DECODE
    return max(1, min(SLOTS_MAX, int(_BUSY_PROMPTS * (prompts_s + answers_s) / prompts_s)))


def by_rule(rule: Rule) -> Decide:
    """What the controller decides."""
    return Scaler(rule).look


def fixed(number: int) -> Decide:
    """A fleet that nobody changes."""
    return lambda _signals, _now: number


def oracle(arrivals: Sequence[Arrival], least: int = 0) -> Decide:
    """Knows the trace: there is what the most demanding moment needs that comes within the time of a load."""
    slots = slots_for(arrivals)
    changes: list[tuple[float, int]] = []
    for arrival in arrivals:
        ends = arrival.at_s + arrival.prompt_tokens / PREFILL + arrival.answer_tokens / DECODE
        changes += [(arrival.at_s, 1), (ends, -1)]
    seconds = math.ceil(max(at for at, _ in changes)) + 1
    running, busy = [0.0] * seconds, [0.0] * seconds
    changes.sort()
    present, position = 0, 0
    for second in range(seconds):
        most = present
        while position < len(changes) and changes[position][0] < second + 1:
            present += changes[position][1]
            most = max(most, present)
            position += 1
        running[second] = most / slots
    for arrival in arrivals:
        busy[int(arrival.at_s)] += arrival.prompt_tokens / PREFILL
    # Prompts of a few seconds may take turns; over those they have to be computed as fast as they come.
    span = int(2 * LATE_S)
    needed = [max(running[s], sum(busy[s : s + span]) / span) for s in range(seconds)]

    def decide(_signals: Signals, now: float) -> int:
        ahead = needed[int(now) : int(now + LOAD_S + 2 * LOOK_S) + 1]
        return max(least, math.ceil(max(ahead, default=0.0)))

    return decide


class _Play:
    """One run of a trace."""

    def __init__(self, decide: Decide, initial: int, slots: int) -> None:
        self._slots = slots
        self._decide = decide
        self._replicas = [_Replica(0.0, 0.0) for _ in range(initial)]
        self._ends: list[tuple[float, int, _Replica]] = []
        self._waiting: deque[Arrival] = deque()
        self._count = itertools.count()
        self.lates: list[float] = []
        self._served_s = 0.0
        self.gpu_s = 0.0
        self.most = initial

    def arrive(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)
        self._fill(arrival.at_s)

    def until(self, now: float) -> None:
        """All that ends before `now` has ended."""
        while self._ends and self._ends[0][0] <= now:
            at, _, replica = heapq.heappop(self._ends)
            replica.live -= 1
            self._leave(replica, at)
            self._fill(at)

    def look(self, now: float) -> None:
        """Start replicas or have some leave."""
        staying = [replica for replica in self._replicas if not replica.leaves]
        ready = [replica for replica in staying if replica.ready_s <= now]
        wait_ms = (now - self._waiting[0].at_s) * 1_000 if self._waiting else 0.0
        running = sum(replica.live for replica in self._replicas)
        service_s = self._served_s / max(1, len(self.lates))
        signals = Signals(len(ready), self._slots, running, len(self._waiting), wait_ms, service_s=service_s)
        wanted = self._decide(signals, now)
        for _ in range(wanted - len(staying)):
            self._replicas.append(_Replica(now, LOAD_S))
        # Those that load are of the least use to anybody, then those with the least to finish.
        staying.sort(key=lambda replica: (replica.ready_s <= now, replica.live))
        for replica in staying[: max(0, len(staying) - wanted)]:
            replica.leaves = True
            self._leave(replica, now)
        self.most = max(self.most, len(self._replicas))
        self._fill(now)

    def end(self, now: float) -> None:
        """Account for those that are still there."""
        self.gpu_s += sum(now - replica.since_s for replica in self._replicas)

    @property
    def rests(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._ends and not self._waiting

    def _leave(self, replica: _Replica, now: float) -> None:
        if replica.leaves and not replica.live:
            self._replicas.remove(replica)
            self.gpu_s += now - replica.since_s

    def _fill(self, now: float) -> None:
        while self._waiting:
            free = [it for it in self._replicas if not it.leaves and it.ready_s <= now and it.live < self._slots]
            if not free:
                return
            arrival, replica = self._waiting.popleft(), min(free, key=lambda it: (it.live, it.prefilled_s))
            alone_s = arrival.prompt_tokens / PREFILL
            replica.prefilled_s = max(now, replica.prefilled_s) + alone_s
            replica.live += 1
            self.lates.append(replica.prefilled_s - arrival.at_s - alone_s)
            ends = replica.prefilled_s + arrival.answer_tokens / DECODE
            self._served_s += ends - now
            heapq.heappush(self._ends, (ends, next(self._count), replica))


def play(arrivals: Sequence[Arrival], decide: Decide, initial: int) -> Outcome:
    """Run a trace. Args: initial: Replicas that are ready at its beginning."""
    run = _Play(decide, initial, slots_for(arrivals))
    position, now = 0, 0.0
    while position < len(arrivals) or not run.rests:
        while position < len(arrivals) and arrivals[position].at_s <= now:
            run.until(arrivals[position].at_s)
            run.arrive(arrivals[position])
            position += 1
        run.until(now)
        run.look(now)
        now += LOOK_S
    run.end(now)
    lates = sorted(run.lates)
    return Outcome(bisect_left(lates, LATE_S) / len(lates), lates[len(lates) * 99 // 100], run.gpu_s / 3_600, run.most)


def bursts(arrivals: Sequence[Arrival], times: int = 4, silence_s: float = 1_200.0) -> list[Arrival]:
    """A trace again and again, with silence between."""
    period_s = arrivals[-1].at_s + silence_s
    return [
        Arrival(arrival.at_s + number * period_s, arrival.prompt_tokens, arrival.answer_tokens)
        for number in range(times)
        for arrival in arrivals
    ]
