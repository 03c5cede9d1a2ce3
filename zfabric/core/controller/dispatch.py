"""Which worker takes a request: policies over the candidates of a model.

A policy is a pure function ``(ask) -> Host | None`` of one value, an `Ask`, which holds all that it may look at;
`register_policy` adds one under a name. It is only asked when there is a candidate: a worker with a free slot that can do what
the request demands. Which of them it takes is up to the policy, whether one takes it is not: None, an error, or anything that is
no candidate leaves the choice to `shortest_queue`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Final

from zfabric.core.controller.candidates import Candidates, Host
from zfabric.errors import ConfigurationError
from zfabric.ids import milliseconds
from zfabric.limits import (
    HASH_LOAD_RATIO,
    IMBALANCE_RATIO,
    IMBALANCE_REQUESTS,
    POLICY_REPORT_MS,
    PREFIX_LOAD_TOKENS,
    WORKERS_MAX,
)

#: Kinds of a policy's failures that are told apart.
_KINDS_MAX: Final = 32


def _nothing_matches() -> Mapping[Host, int]:
    return {}


@dataclass(slots=True)
class Ask:
    """What a policy may look at, and nothing else. It changes none of it.

    Attributes:
        candidates: Who can take the request now, at least one: with their loads, speeds and latencies.
        rng: The only source of chance.
        priority: The request's; the lowest number is the most urgent, 0 is usual.
        affinity: The request's key, "" for none.
        held: Where the requests of this key went lately, candidate or not; None for no key, an unknown one, and where that
            host is gone or takes no requests any more.
        imbalance_requests, imbalance_ratio: By how much `held` may be busier than others, see `sticky_least_loaded`.
        blocks: Blocks of the request's prompt whose hashes came with it; 0 where none did.
        block_size: Tokens of one block; 0 where no hashes came.
        matched: By host of the model, candidate or not, how many of the prompt's first blocks are cached there; who has none is
            left out. It is looked up when it is called, so that a policy that does not ask pays nothing.
        cold_s: What it would take until one more worker had the model, in seconds, where it is an adapter that others could load;
            0.0 where it is none. All candidates have it loaded. Looked up when it is called, and costs O(hosts).

    Example: ``def emptiest(ask: Ask) -> Host: return min(ask.candidates, key=lambda host: host.load)``
    """

    candidates: Candidates
    rng: random.Random
    priority: int = 0
    affinity: str = ""
    held: Host | None = None
    imbalance_requests: int = IMBALANCE_REQUESTS
    imbalance_ratio: float = IMBALANCE_RATIO
    blocks: int = 0
    block_size: int = 0
    matched: Callable[[], Mapping[Host, int]] = _nothing_matches
    cold_s: Callable[[], float] = float


Policy = Callable[[Ask], Host | None]


def shortest_queue(ask: Ask) -> Host:
    """argmin(queue length / speed), FastChat's formula, with ties drawn instead of the first one taken."""
    return ask.candidates.least_loaded(ask.rng)


def lottery(ask: Ask) -> Host | None:
    """p_i = speed_i / sum(speed), FastChat's formula."""
    return ask.candidates.by_speed(ask.rng)


def round_robin(ask: Ask) -> Host:
    """Each candidate in turn, whatever its load."""
    return ask.candidates.next_in_turn()


def power_of_two(ask: Ask) -> Host:
    """The less loaded of two drawn ones (Mitzenmacher 2001)."""
    first, second = ask.candidates.two(ask.rng)
    return first if first.queue_ratio <= second.queue_ratio else second


def least_latency(ask: Ask) -> Host:
    """The least expected time: mean time of past requests, times the requests that would share the worker. Costs O(hosts).

    A host of which no request has succeeded yet counts as the mean of the others, so that it is neither flooded nor left out.
    """
    mean = _mean_latency(ask)
    return min(
        ask.candidates, key=lambda host: ((host.latency_ns or mean) * (host.load + 1), host.load, ask.rng.random())
    )


def _mean_latency(ask: Ask) -> float:
    known = [host.latency_ns for host in ask.candidates if host.latency_ns]
    return sum(known) / len(known) if known else 0.0


def _latency_cost(ask: Ask, host: Host) -> float:
    """In seconds."""
    return (host.latency_ns or _mean_latency(ask)) * (host.load + 1) / 1e9


def sticky_least_loaded(ask: Ask) -> Host:
    """Where the key's requests went lately, unless that host is overloaded; else the least queue length over speed.

    A host is overloaded where both thresholds are passed, the gate that SGLang's router has between cache and load:
    ``load > least.load + imbalance_requests`` and ``load / speed > imbalance_ratio · least.load / least.speed``.
    """
    least, held = ask.candidates.least_loaded(ask.rng), ask.held
    if held is None or held not in ask.candidates:
        return least
    overloaded = (
        held.load > least.load + ask.imbalance_requests and held.queue_ratio > ask.imbalance_ratio * least.queue_ratio
    )
    return least if overloaded else held


def consistent_hash(ask: Ask) -> Host:
    """The host that the key's hash prefers among those below their bound; without a key `shortest_queue` chooses.

    Preference is weighted rendezvous hashing (Thaler and Ravishankar 1998), the greatest ``-speed / ln u`` where u in (0, 1) is
    a hash of key and host, so a host that comes or goes moves no key but its own. Bounds are those of consistent hashing
    with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018): a host may have
    ``ceil(HASH_LOAD_RATIO · (1 + sum of loads) · speed / sum of speeds)`` requests. Costs O(hosts).
    """
    hosts = list(ask.candidates)
    speeds = sum(host.speed for host in hosts)
    if not ask.affinity or not 0 < speeds < math.inf:
        return ask.candidates.least_loaded(ask.rng)
    room = HASH_LOAD_RATIO * (1 + sum(host.load for host in hosts))
    free = [host for host in hosts if host.load < math.ceil(room * (host.speed / speeds))]
    key = _hash_of(ask.affinity)
    return max(free or hosts, key=lambda host: (-host.speed / math.log(_unit(key ^ _host_hash(host.name))), host.name))


def _hash_of(text: str) -> int:
    """64 bits that every process makes of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


_host_hash = lru_cache(WORKERS_MAX)(_hash_of)


def _unit(number: int) -> float:
    """A number in (0, 1), made of 64 bits by the last steps of MurmurHash3, which mix them all."""
    number = (number ^ number >> 33) * 0xFF51AFD7ED558CCD & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 33) * 0xC4CEB9FE1A85EC53 & 0xFFFFFFFFFFFFFFFF
    return ((number ^ number >> 33) >> 12) * 2.0**-52 + 2.0**-53


def prefix_aware(ask: Ask) -> Host:
    """argmin(tokens of the prompt not cached there + `PREFIX_LOAD_TOKENS` · queue length / speed), in tokens; without anything
    cached it is `shortest_queue`. The form is that of NVIDIA Dynamo's KV router, which adds blocks to compute and blocks in use.

    Of the hosts that have nothing cached only the least loaded one can be the best, so only those that have are looked at.
    """
    least = ask.candidates.least_loaded(ask.rng)
    if not ask.blocks:
        return least
    cached = ask.matched()
    best, least_cost = least, prefix_cost(ask, least, cached.get(least, 0))
    for host, blocks in cached.items():
        if host in ask.candidates and (cost := prefix_cost(ask, host, blocks)) < least_cost:
            best, least_cost = host, cost
    return best


def prefix_cost(ask: Ask, host: Host, cached: int) -> float:
    """What `prefix_aware` takes a request to cost at a host that has so many of its blocks cached, in tokens."""
    return (ask.blocks - cached) * ask.block_size + PREFIX_LOAD_TOKENS * host.queue_ratio


#: What policies take a request to cost at a host, for explanations; the others compare no costs.
COSTS: Final[dict[str, Callable[[Ask, Host], float]]] = {
    "shortest_queue": lambda ask, host: host.queue_ratio,
    "power_of_two": lambda ask, host: host.queue_ratio,
    "sticky_least_loaded": lambda ask, host: host.queue_ratio,
    "least_latency": _latency_cost,
    "prefix_aware": lambda ask, host: prefix_cost(ask, host, ask.matched().get(host, 0)),
}

POLICIES: Final[dict[str, Policy]] = {
    policy.__name__: policy
    for policy in (
        shortest_queue,
        lottery,
        round_robin,
        power_of_two,
        least_latency,
        sticky_least_loaded,
        consistent_hash,
        prefix_aware,
    )
}
#: Those that need not be registered.
BUILT_IN: Final = tuple(POLICIES)


def register_policy(name: str, policy: Policy) -> None:
    """Make a policy known under a name.

    Raises:
        ConfigurationError: The name is taken by another policy, or the policy cannot be called.
    """
    if not callable(policy):
        raise ConfigurationError(f"dispatch policy {name!r} is a {type(policy).__name__}, not a function", policy=name)
    if POLICIES.get(name, policy) is not policy:
        raise ConfigurationError(f"a dispatch policy named {name!r} exists", policy=name)
    POLICIES[name] = policy


def find_policy(name: str) -> Policy:
    """Raises: ConfigurationError for an unknown name."""
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigurationError(f"policy {name!r} is not one of {', '.join(sorted(POLICIES))}", policy=name)
    return policy


class Chooser:
    """A policy, and what happens where it fails: `shortest_queue` chooses, and the operator is told.

    Attributes:
        failures: How often the policy failed.
        on_failure: Called with what happened and how often since it was last told: once for each kind of failure within
            `POLICY_REPORT_MS`. It must not raise.
    """

    __slots__ = ("_name", "_policy", "_told", "failures", "on_failure")

    def __init__(self, name: str) -> None:
        self._name = name
        self._policy = find_policy(name)
        self._told: dict[str, tuple[int, int]] = {}
        self.failures = 0
        self.on_failure: Callable[[str, int], None] = lambda what, times: None

    def use(self, name: str) -> None:
        """Choose by another policy from now on. Raises: ConfigurationError for an unknown name."""
        self._policy, self._name = find_policy(name), name

    def choose(self, ask: Ask, now_ns: int) -> Host:
        """One of the candidates."""
        host: object
        try:
            host = self._policy(ask)
        except Exception as error:  # noqa: BLE001 — a policy may be anybody's code, and requests must not wait for its repair
            self._failed(f"raised {type(error).__name__}", _text(error), now_ns)
            return shortest_queue(ask)
        if host in ask.candidates:
            assert isinstance(host, Host)
            return host
        if host is not None:
            self._failed(f"returned a {type(host).__name__} that is no candidate", "", now_ns)
        return shortest_queue(ask)

    def _failed(self, kind: str, text: str, now_ns: int) -> None:
        self.failures += 1
        last_ns, missed = self._told.get(kind, (None, 0))
        if last_ns is not None and now_ns - last_ns < milliseconds(POLICY_REPORT_MS):
            self._told[kind] = (last_ns, missed + 1)
            return
        self._told.pop(kind, None)
        while len(self._told) >= _KINDS_MAX:
            del self._told[next(iter(self._told))]
        self._told[kind] = (now_ns, 0)
        self.on_failure(f"policy {self._name!r} {kind}{text and ': '}{text}", missed + 1)


def _text(error: Exception) -> str:
    """What an error says, short."""
    try:
        return str(error)[:200]
    except Exception:  # noqa: BLE001 — an error that cannot be told is still told to have happened
        return ""
