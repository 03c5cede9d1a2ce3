"""Which worker takes a request: the candidates of a model, and policies over them.

A policy is a pure function ``(candidates, rng) -> Host | None`` (None: nobody now); `register_policy` adds one under a
name. It is only asked when there is a candidate: a worker with a free slot for the model that is neither draining nor stalled.

Load is the controller's own count of live requests at a worker, so it is never stale. Answering "who has the least" must
not cost a walk over a thousand workers, therefore `Candidates` keeps a heap for large sets; policies only ask.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Hashable, Iterator
from typing import Final

from zfabric.errors import ConfigurationError

#: Up to so many candidates a plain scan is as fast as the heap, and needs no upkeep.
_SCAN_MAX: Final = 16
#: FastChat's bound: with less speed than this in all there is nobody to draw.
_SPEED_SUM_MIN: Final = 1e-4


class Line:
    """How many live requests a worker has: one object that the hosts of all its models share."""

    __slots__ = ("length",)

    def __init__(self) -> None:
        self.length = 0


class Host:
    """One model at one worker.

    Attributes:
        name: The worker's.
        speed: Relative speed the worker announced.
        line: The worker's live requests, all models.
        live: Keys of the live requests of this model there that hold a slot.
        latency_ns: Exponentially weighted mean time from dispatch to terminal; 0 before the first.
    """

    __slots__ = ("_stamp", "latency_ns", "line", "live", "name", "position", "slots", "speed")

    def __init__(self, name: str, speed: float, slots: int, line: Line | None = None) -> None:
        self.name = name
        self.speed = speed
        self.slots = slots
        self.line = line or Line()
        self.live: set[Hashable] = set()
        self.latency_ns = 0.0
        self.position = -1
        self._stamp = 0

    @property
    def in_flight(self) -> int:
        """How many of its slots the model has taken."""
        return len(self.live)

    @property
    def load(self) -> int:
        """Live requests of the worker, all models."""
        return self.line.length

    @property
    def queue_ratio(self) -> float:
        """FastChat's measure for `shortest_queue`: queue length over speed."""
        return self.line.length / self.speed if self.speed > 0 else float("inf")

    def __repr__(self) -> str:
        return f"<Host {self.name} load={self.load} speed={self.speed}>"


class Candidates:
    """Hosts of one model that can take a request now. Membership and the least loaded one are kept up to date."""

    __slots__ = ("_heap", "_hosts", "_order", "_speed_max", "_turn")

    def __init__(self) -> None:
        self._hosts: list[Host] = []
        self._heap: list[tuple[float, float, int, int, Host]] = []
        self._order = 0
        self._speed_max = 0.0
        self._turn = 0

    def __len__(self) -> int:
        return len(self._hosts)

    @property
    def ordered(self) -> bool:
        """Whether changes of load have to be told by `changed`: small sets are looked at as they are."""
        return len(self._hosts) > _SCAN_MAX

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __getitem__(self, position: int) -> Host:
        return self._hosts[position]

    def add(self, host: Host, rng: random.Random) -> None:
        """Make a host a candidate; one that is already is only brought up to date."""
        if host.position < 0:
            host.position = len(self._hosts)
            self._hosts.append(host)
            self._speed_max = max(self._speed_max, host.speed)
            if len(self._hosts) == _SCAN_MAX + 1:
                self._rebuild(rng)
                return
        self.changed(host, rng)

    def remove(self, host: Host) -> None:
        """Take a host out; unknown ones are ignored."""
        position = host.position
        if position < 0:
            return
        last = self._hosts.pop()
        if last is not host:
            self._hosts[position] = last
            last.position = position
        host.position = -1
        host._stamp += 1
        if len(self._hosts) <= _SCAN_MAX:
            self._heap.clear()

    def changed(self, host: Host, rng: random.Random) -> None:
        """A candidate's load changed."""
        if len(self._hosts) <= _SCAN_MAX or host.position < 0:
            return
        if len(self._heap) > 4 * len(self._hosts) + 64:
            self._rebuild(rng)
        else:
            heapq.heappush(self._heap, self._entry(host, rng))

    def least_loaded(self, rng: random.Random) -> Host:
        """The least queue length over speed; ties are drawn."""
        if len(self._hosts) <= _SCAN_MAX:
            least = min(host.queue_ratio for host in self._hosts)
            ties = [host for host in self._hosts if host.queue_ratio == least]
            return ties[0] if len(ties) == 1 else rng.choice(ties)
        heap = self._heap
        while heap[0][3] != heap[0][4]._stamp:
            heapq.heappop(heap)
        return heap[0][4]

    def by_speed(self, rng: random.Random) -> Host | None:
        """Drawn with probability speed over the sum of speeds; None where the sum is nothing."""
        if len(self._hosts) > _SCAN_MAX and self._speed_max > 0:
            # Rejection against an upper bound draws from the very same distribution, in constant time.
            for _ in range(32):
                host = rng.choice(self._hosts)
                if rng.random() * self._speed_max < host.speed:
                    return host
        weights = [host.speed for host in self._hosts]
        return rng.choices(self._hosts, weights)[0] if sum(weights) >= _SPEED_SUM_MIN else None

    def two(self, rng: random.Random) -> tuple[Host, Host]:
        """Two candidates drawn without regard to load; the same one twice if it is alone."""
        count = len(self._hosts)
        first = rng.randrange(count)
        second = (first + 1 + rng.randrange(count - 1)) % count if count > 1 else first
        return self._hosts[first], self._hosts[second]

    def next_in_turn(self) -> Host:
        """Each candidate in turn."""
        self._turn += 1
        return self._hosts[self._turn % len(self._hosts)]

    def _entry(self, host: Host, rng: random.Random) -> tuple[float, float, int, int, Host]:
        host._stamp += 1
        self._order += 1
        # Drawn among ties, and yet nobody waits for ever: whoever changed long ago comes before who changed just now.
        tie = self._order + rng.random() * 2 * len(self._hosts)
        return (host.queue_ratio, tie, self._order, host._stamp, host)

    def _rebuild(self, rng: random.Random) -> None:
        self._heap = [self._entry(host, rng) for host in self._hosts]
        heapq.heapify(self._heap)


Policy = Callable[[Candidates, random.Random], Host | None]


def shortest_queue(candidates: Candidates, rng: random.Random) -> Host:
    """argmin(queue length / speed), FastChat's formula, with ties drawn instead of the first one taken."""
    return candidates.least_loaded(rng)


def lottery(candidates: Candidates, rng: random.Random) -> Host | None:
    """p_i = speed_i / sum(speed), FastChat's formula."""
    return candidates.by_speed(rng)


def round_robin(candidates: Candidates, rng: random.Random) -> Host:
    """Each candidate in turn, whatever its load."""
    return candidates.next_in_turn()


def power_of_two(candidates: Candidates, rng: random.Random) -> Host:
    """The less loaded of two drawn ones (Mitzenmacher 2001)."""
    first, second = candidates.two(rng)
    return first if first.queue_ratio <= second.queue_ratio else second


def least_latency(candidates: Candidates, rng: random.Random) -> Host:
    """The least expected time: mean time of past requests, times the requests that would share the worker."""
    return min(candidates, key=lambda host: (host.latency_ns * (host.load + 1), host.load, rng.random()))


POLICIES: Final[dict[str, Policy]] = {
    policy.__name__: policy for policy in (shortest_queue, lottery, round_robin, power_of_two, least_latency)
}


def register_policy(name: str, policy: Policy) -> None:
    """Make a policy known under a name.

    Raises:
        ConfigurationError: The name is taken by another policy.
    """
    if POLICIES.get(name, policy) is not policy:
        raise ConfigurationError(f"a dispatch policy named {name!r} exists", policy=name)
    POLICIES[name] = policy


def find_policy(name: str) -> Policy:
    """Raises: ConfigurationError for an unknown name."""
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigurationError(f"policy {name!r} is not one of {', '.join(sorted(POLICIES))}", policy=name)
    return policy
