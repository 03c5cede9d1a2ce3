"""The last dispatches and what their policy knew, so that each can be explained afterwards.

A dispatch costs one entry of a ring, made of what is at hand: a thousand workers are not walked over for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from zfabric.core.controller.candidates import Host
from zfabric.core.controller.dispatch import Ask
from zfabric.core.controller.figures import Decision
from zfabric.core.controller.hosting import Model
from zfabric.core.controller.peers import Request, WorkerPeer
from zfabric.limits import EXPLAINED_DISPATCHES

_NOBODY: Final[tuple[()]] = ()


class Dispatched(NamedTuple):
    """One dispatch.

    Attributes:
        attempt: Which attempt.
        model: Its model; "" for an operator's call.
        worker: Who got it.
        decision: How it came there.
        policy: The policy's name.
        at_ns: When.
        candidates: How many hosts the policy could choose among; 0 where it was not asked.
        loads: Their names and live requests at that time: of all where they are few, else of the least loaded one.
        held: Where requests with its affinity went before; "" for nowhere.
        blocks: Blocks of its prompt that had hashes, and `block_size` their tokens.
        cached: How many of the first of them the worker had.
        cached_most, cached_most_at: The most that any host of the model had, and which.
    """

    attempt: int
    model: str
    worker: str
    decision: Decision
    policy: str
    at_ns: int
    candidates: int
    loads: tuple[tuple[str, int], ...]
    held: str
    blocks: int
    block_size: int
    cached: int
    cached_most: int
    cached_most_at: str


#: What a policy is told of prompts and keys: who held the affinity, blocks, their tokens, how many the chosen host had, the most
#: that any had, and which.
_Hints = tuple[str, int, int, int, int, str]
_NO_HINTS: Final[_Hints] = ("", 0, 0, 0, 0, "")
#: An entry of the ring: request, attempt, instance of its client, model, worker, decision, policy, when, how many hosts the
#: policy could choose, which, their loads, and hints. It keeps neither the request nor what the policy was asked: to free them at
#: once costs less than what they take in the processor's caches.
_Entry = tuple[int, int, int, Model | None, str, Decision, str, int, int, Sequence[Host], Sequence[int], _Hints]


class Decisions:
    """The last `EXPLAINED_DISPATCHES` dispatches.

    Attributes:
        asked: What a policy was asked for the dispatch that comes next; None if it was not.
    """

    __slots__ = ("_ring", "asked")

    def __init__(self) -> None:
        self._ring: deque[_Entry] = deque(maxlen=EXPLAINED_DISPATCHES)
        self.asked: Ask | None = None

    def note(
        self, request: Request, worker: WorkerPeer, host: Host | None, decision: Decision, policy: str, now_ns: int
    ) -> None:
        """An attempt goes to a worker, and does not count for its load yet."""
        count, hints = 0, _NO_HINTS
        hosts: Sequence[Host] = _NOBODY
        loads: Sequence[int] = _NOBODY
        ask = self.asked
        if ask is not None:
            self.asked = None
            count = len(ask.candidates)
            hosts, loads = ask.candidates.loads()
            if ask.blocks or ask.held is not None:
                hints = _hints(ask, host)
        self._ring.append(
            (
                request.request,
                request.attempt,
                request.instance,
                request.model,
                worker.name,
                decision,
                policy,
                now_ns,
                count,
                hosts,
                loads,
                hints,
            )
        )

    def of(self, request: int, instance: int | None) -> Iterator[Dispatched]:
        """The dispatches of a request, the last one first: of one client's alone where its instance is given."""
        for entry in reversed(self._ring):
            if entry[0] == request and (instance is None or entry[2] == instance):
                yield _told(entry)


def _hints(ask: Ask, host: Host | None) -> _Hints:
    held = ask.held.name if ask.held is not None else ""
    found = ask.matched() if ask.blocks else {}
    most = max(found, key=found.__getitem__, default=None)
    here = found.get(host, 0) if host is not None else 0
    return held, ask.blocks, ask.block_size, here, found[most] if most else 0, most.name if most else ""


def _told(entry: _Entry) -> Dispatched:
    _, attempt, _, model, worker, decision, policy, at_ns, count, hosts, loads, hints = entry
    known = zip([host.name for host in hosts], loads, strict=True)
    name = model.name if model is not None else ""
    return Dispatched(attempt, name, worker, decision, policy, at_ns, count, tuple(known), *hints)
