"""Requests whose clients came from another controller: which worker has them.

Such a client claims what it waits for, as after a lost connection, and the worker has said nothing of it here: to it, the
requests are the other controller's. So workers are asked (LOCATE): the one that the client names, whose chunks it has had, else
all. What a worker has goes on there; what nobody has, or has not told of in time, is the claim's end, and the client submits the
next attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from zfabric.core.controller.batches import ATTEMPT_BYTES, batches
from zfabric.core.controller.outbox import Outbox
from zfabric.core.controller.peers import Key, Request, WorkerPeer
from zfabric.core.controller.registry import Registry
from zfabric.core.timers import Timers
from zfabric.ids import milliseconds
from zfabric.wire import codec
from zfabric.wire.messages import Carried, Locate, Located

#: Since this minor version workers may have several controllers.
_MINOR: Final = 4


class Sought(NamedTuple):
    """A claim, and the worker that has its request, as far as the client knows."""

    claim: Request
    worker: str


@dataclass(slots=True, eq=False)
class _Search:
    """One claim that nobody has answered yet.

    Attributes:
        named: The worker that the client names, "" for none.
        open: The questions about it that have no answer yet.
    """

    claim: Request
    named: str
    open: set[int] = field(default_factory=set)


class _Question(NamedTuple):
    """One LOCATE."""

    worker: WorkerPeer
    keys: frozenset[Key]


class Searches:
    """Asks workers.

    Args:
        limit_ms: How long to wait for answers, and for a worker that is named and not there.

    Attributes:
        found: Told of what a worker says that it has, and of nothing that was not asked for. Gives what is settled by that: a
            worker that says what is not so keeps nobody else from having it.
        missed: Told of a claim that nobody has answered well, and whether the worker that is named has said that it has it not.
    """

    def __init__(self, registry: Registry, timers: Timers, outbox: Outbox, limit_ms: int) -> None:
        self.found: Callable[[WorkerPeer, list[Carried]], set[Key]] = lambda worker, carried: set()
        self.missed: Callable[[Request, bool], None] = lambda claim, denied: None
        self._registry = registry
        self._timers = timers
        self._outbox = outbox
        self._limit_ms = limit_ms
        self._last = 0
        self._questions: dict[int, _Question] = {}
        self._searches: dict[Key, _Search] = {}

    @property
    def instances(self) -> set[int]:
        """Of the clients whose claims are looked for, or whom open questions are about."""
        asked = (key for question in self._questions.values() for key in question.keys)
        return {key[0] for key in self._searches} | {key[0] for key in asked}

    def begin(self, sought: Iterable[Sought]) -> None:
        """Look for what one client claims."""
        searches = [_Search(claim, worker) for claim, worker in sought]
        if not searches:
            return
        self._searches |= {search.claim.key: search for search in searches}
        unnamed = [search for search in searches if not search.named]
        for worker in self._registry.workers.values() if unnamed else ():
            self._ask(worker, unnamed)
        named: dict[str, list[_Search]] = {}
        for search in searches:
            named.setdefault(search.named, []).append(search)
        named.pop("", None)
        for name, group in named.items():
            known = self._registry.workers.get(name)
            if known is not None:
                self._ask(known, group)
        for search in unnamed:
            self._end_if_answered(search)
        until_ns = self._timers.now_ns + milliseconds(self._limit_ms)
        self._timers.judge_at(until_ns, lambda _: self._end(searches, denied=False))

    def _ask(self, worker: WorkerPeer, searches: list[_Search]) -> None:
        if worker.minor < _MINOR:
            return
        instance = searches[0].claim.instance
        for batch in batches(searches, lambda _: ATTEMPT_BYTES):
            self._last = number = self._last % 0xFFFFFFFF + 1
            self._questions[number] = _Question(worker, frozenset(search.claim.key for search in batch))
            for search in batch:
                search.open.add(number)
            attempts = [(search.claim.request, search.claim.attempt) for search in batch]
            locate = Locate(number=number, instance=instance, attempts=attempts)
            self._outbox.send(worker.routing_id, codec.pack(locate))
            self._forget_later(number)

    def _forget_later(self, number: int) -> None:
        """An answer that comes when nobody waits for it any more means nothing."""

        def forget(_: int) -> None:
            self._questions.pop(number, None)

        self._timers.judge_at(self._timers.now_ns + milliseconds(self._limit_ms), forget)

    def located(self, worker: WorkerPeer, located: Located) -> None:
        """A worker answers. What it was not asked for, or not in this session, is not looked at."""
        question = self._questions.get(located.number)
        if question is None or question.worker is not worker:
            return
        lines = [line for line in located.carried if (line.instance, line.request, line.attempt) in question.keys]
        for key in self.found(worker, lines):
            self._searches.pop(key, None)
        if not located.more:
            self._answered(located.number)

    def _answered(self, number: int) -> None:
        question = self._questions.pop(number)
        for key in question.keys:
            search = self._searches.get(key)
            if search is not None and number in search.open:
                search.open.discard(number)
                self._end_if_answered(search)

    def _end_if_answered(self, search: _Search) -> None:
        if not search.open:
            self._end([search], denied=bool(search.named))

    def _end(self, searches: list[_Search], *, denied: bool) -> None:
        for search in searches:
            if self._searches.get(search.claim.key) is search:
                del self._searches[search.claim.key]
                self.missed(search.claim, denied)

    def came(self, worker: WorkerPeer) -> None:
        """A worker has registered: it may be the one that clients name. Costs O(claims that are looked for)."""
        groups: dict[int, list[_Search]] = {}
        for search in self._searches.values():
            if search.named == worker.name and not search.open:
                groups.setdefault(search.claim.instance, []).append(search)
        for group in groups.values():
            self._ask(worker, group)

    def gone(self, worker: WorkerPeer) -> None:
        """A worker answers nothing any more. One that is named may be back. Costs O(questions)."""
        for number, question in list(self._questions.items()):
            if question.worker is worker:
                del self._questions[number]
                for key in question.keys:
                    search = self._searches.get(key)
                    if search is not None:
                        search.open.discard(number)
                        if not search.named:
                            self._end_if_answered(search)
