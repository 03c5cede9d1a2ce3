"""The hosts that can take a request now, ranked by load.

Load is the controller's own count of live requests at a worker, so it is never stale. Answering "who has the least" must
not cost a walk over a thousand workers, therefore `Candidates` keeps them ranked in large sets; policies only ask.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Final

from zfabric.core.controller.ranking import Ranking

#: Up to so many candidates a plain scan is as fast as the heap, and needs no upkeep.
CANDIDATES_UNORDERED_MAX: Final = 16
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
        slots: Concurrent requests of this model, 0 for as many as the worker has.
        live: Live requests of this model there that hold a slot.
        latency_ns: Exponentially weighted mean time from dispatch to terminal; 0 before the first.
    """

    __slots__ = ("latency_ns", "line", "live", "name", "slots", "speed")

    def __init__(self, name: str, speed: float, slots: int, line: Line | None = None) -> None:
        self.name = name
        self.speed = speed
        self.slots = slots
        self.line = line or Line()
        self.latency_ns = 0.0
        self.live: set[Hashable] = set()

    @property
    def in_flight(self) -> int:
        """Live requests of this model there that hold a slot."""
        return len(self.live)

    @property
    def load(self) -> int:
        """Live requests of the worker, all models."""
        return self.line.length

    @property
    def queue_ratio(self) -> float:
        """FastChat's measure for `shortest_queue`: queue length over speed."""
        return self.line.length / self.speed if self.speed > 0 else float("inf")

    def measured(self, taken_ns: int) -> None:
        """A request of the model took so long there, from dispatch to its terminal, and succeeded."""
        self.latency_ns = 0.8 * self.latency_ns + 0.2 * taken_ns if self.latency_ns else taken_ns

    def __repr__(self) -> str:
        return f"<Host {self.name} load={self.load} speed={self.speed}>"


class Candidates:
    """Hosts that can take a request now. Membership and the least loaded one are kept up to date."""

    __slots__ = ("_hosts", "_order", "_places", "_ranking", "_speed_max", "_turn")

    def __init__(self) -> None:
        self._hosts: list[Host] = []
        self._places: dict[Host, int] = {}
        self._ranking: Ranking[Host] = Ranking()
        self._order = 0
        self._speed_max = 0.0
        self._turn = 0

    def __len__(self) -> int:
        return len(self._hosts)

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __getitem__(self, position: int) -> Host:
        return self._hosts[position]

    def __contains__(self, host: object) -> bool:
        return isinstance(host, Host) and host in self._places

    @property
    def ordered(self) -> bool:
        """Whether changes of load have to be told by `changed`: small sets are looked at as they are."""
        return len(self._hosts) > CANDIDATES_UNORDERED_MAX

    def add(self, host: Host, rng: random.Random) -> None:
        """Make a host a candidate; one that is already is only brought up to date."""
        if host.speed > self._speed_max:
            self._speed_max = host.speed
        hosts = self._hosts
        if host in self._places:
            if len(hosts) > CANDIDATES_UNORDERED_MAX:
                self._rank(host, rng)
            return
        self._places[host] = len(hosts)
        hosts.append(host)
        if len(hosts) > CANDIDATES_UNORDERED_MAX:
            for other in hosts if len(hosts) == CANDIDATES_UNORDERED_MAX + 1 else (host,):
                self._rank(other, rng)

    def remove(self, host: Host) -> None:
        """Take a host out; unknown ones are ignored."""
        place = self._places.pop(host, None)
        if place is None:
            return
        last = self._hosts.pop()
        if last is not host:
            self._hosts[place] = last
            self._places[last] = place
        if self.ordered:
            self._ranking.discard(host)
        elif len(self._ranking):
            self._ranking = Ranking()

    def changed(self, host: Host, rng: random.Random) -> None:
        """A candidate's load changed."""
        if self.ordered and host in self._places:
            self._rank(host, rng)

    def least_loaded(self, rng: random.Random) -> Host:
        """The least queue length over speed; ties are drawn."""
        if self.ordered:
            return self._ranking.first()
        if len(self._hosts) == 1:
            return self._hosts[0]
        least = min(host.queue_ratio for host in self._hosts)
        ties = [host for host in self._hosts if host.queue_ratio == least]
        return ties[0] if len(ties) == 1 else rng.choice(ties)

    def loads(self) -> tuple[Sequence[Host], Sequence[int]]:
        """Hosts and their loads now: of all where they are few, else of the least loaded one."""
        if self.ordered:
            least = self._ranking.first()
            return (least,), (least.line.length,)
        return tuple(self._hosts), [host.line.length for host in self._hosts]

    def by_speed(self, rng: random.Random) -> Host | None:
        """Drawn with probability speed over the sum of speeds; None where the sum is nothing."""
        if len(self._hosts) > CANDIDATES_UNORDERED_MAX and self._speed_max > 0:
            # Rejection against an upper bound draws from the very same distribution, in constant time.
            for _ in range(32):
                host = rng.choice(self._hosts)
                if rng.random() * self._speed_max < host.speed:
                    return host
        weights = [host.speed for host in self._hosts]
        # The bound is exact again: one fast worker that has left must not make every draw as dear as this one.
        self._speed_max = max(weights, default=0.0)
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

    def _rank(self, host: Host, rng: random.Random) -> None:
        self._order += 1
        # Drawn among ties, and yet nobody waits for ever: whoever changed long ago comes before who changed just now.
        tie = self._order + rng.random() * 2 * len(self._hosts)
        self._ranking.put(host, (host.queue_ratio, tie))
