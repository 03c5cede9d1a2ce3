"""The last dispatches and what their policy knew, so that each can be explained afterwards.

A dispatch costs one entry of a ring, made of what is at hand: a thousand workers are not walked over for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from zfabric.core.controller.candidates import Host
from zfabric.core.controller.dispatch import Ask
from zfabric.core.controller.figures import Decision
from zfabric.core.controller.peers import Request, WorkerPeer
from zfabric.limits import EXPLAINED_DISPATCHES

_NOTHING: Final = ()


class Dispatched(NamedTuple):
    """One dispatch.

    Attributes:
        request, attempt: Which attempt.
        client: Number of its client's session.
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

    request: int
    attempt: int
    client: int
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


class Decisions:
    """The last `EXPLAINED_DISPATCHES` dispatches."""

    __slots__ = ("_asked", "_ring")

    def __init__(self) -> None:
        self._ring: deque[Dispatched] = deque(maxlen=EXPLAINED_DISPATCHES)
        self._asked: Ask | None = None

    def asked(self, ask: Ask) -> None:
        """A policy was asked for the next dispatch."""
        self._asked = ask

    def note(
        self, request: Request, worker: WorkerPeer, host: Host | None, decision: Decision, policy: str, now_ns: int
    ) -> None:
        """An attempt goes to a worker, and does not count for its load yet."""
        ask, self._asked = self._asked, None
        if decision in {"asked", "queued"}:
            ask = None
        assert request.client is not None
        self._ring.append(
            Dispatched(
                request.request,
                request.attempt,
                request.client.number,
                request.model.name if request.model is not None else "",
                worker.name,
                decision,
                policy,
                now_ns,
                len(ask.candidates) if ask is not None else 0,
                ask.candidates.loads() if ask is not None else _NOTHING,
                ask.held.name if ask is not None and ask.held is not None else "",
                *(_cached(ask, host) if ask is not None and ask.blocks else (0, 0, 0, 0, "")),
            )
        )

    def of(self, request: int, client: int | None) -> Iterator[Dispatched]:
        """The dispatches of a request, the last one first: of one client's alone where its session is given."""
        for one in reversed(self._ring):
            if one.request == request and (client is None or one.client == client):
                yield one


def _cached(ask: Ask, host: Host | None) -> tuple[int, int, int, int, str]:
    found = ask.matched()
    most = max(found, key=found.__getitem__, default=None)
    here = found.get(host, 0) if host is not None else 0
    return (
        ask.blocks,
        ask.block_size,
        here,
        found[most] if most is not None else 0,
        most.name if most is not None else "",
    )
