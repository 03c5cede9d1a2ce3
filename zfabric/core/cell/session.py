"""A cell's session with its parent: a worker's, whose streams its own controller runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

from zfabric import limits
from zfabric.core.cell.cached import CellCaches
from zfabric.core.cell.requests import CellRequests
from zfabric.core.cell.sums import summed_load, summed_models, summed_room, summed_speed
from zfabric.core.controller import cells
from zfabric.core.controller.broker import Broker
from zfabric.core.timers import Timer
from zfabric.core.worker.orders import StreamOrder
from zfabric.core.worker.session import Order, Refused, WorkerSession
from zfabric.errors import VersionMismatchError, WorkerDrainingError
from zfabric.ids import milliseconds
from zfabric.wire import codec
from zfabric.wire.flow import Abort, Grant
from zfabric.wire.load import StreamUnits
from zfabric.wire.messages import Carried, Dispatch, Goodbye, ModelInfo, Welcome, WorkerHello

#: The minor version since which a parent refuses circles.
_CELLS_MINOR: Final = 4


class _Sum(NamedTuple):
    """What an announcement says."""

    models: list[ModelInfo]
    speed: float
    cells: list[int]
    depth: int


class CellSession(WorkerSession):
    """Protocol state of a controller that is one worker of another.

    Args:
        broker: This controller's, with its own clients and workers, which notice nothing.
        name: The name of the worker that it is.
        instance, rng, build: As of a worker.

    Attributes:
        left_out: Models that found no room in the last announcement.
    """

    def __init__(self, broker: Broker, *, name: str, instance: int, rng: random.Random, build: str = "") -> None:
        super().__init__(name=name, instance=instance, rng=rng, build=build)
        self._broker = broker
        self.requests = CellRequests(broker, name, self._send)
        self._caches = CellCaches(
            broker.registry.placement, self._cached, lambda change: self.cached(change, broker.timers.now_ns)
        )
        #: What was announced last. A cell without workers has no models, and is there all the same.
        self._sum: _Sum | None = None
        self._revision = -1
        self._announced_ns: int | None = None
        self._look: Timer | None = None
        self._gone: Timer | None = None
        self._told_load = (-1, -1, False)
        self._engines_hold = 0
        self.left_out: list[str] = []
        self._sum_models(broker.timers.now_ns)

    # ── what there is ───────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, now_ns: int) -> None:
        """Something has happened at the controller: look at the sum in a moment. Call it at the end of each turn."""
        self.timers.now_ns = self._now_ns = now_ns
        self.requests.settle()
        if self._look is None:
            self._look = self.timers.at(now_ns + milliseconds(limits.CELL_LOOK_MS), self._look_at)

    def _look_at(self, now_ns: int) -> None:
        """Tell the parent what is another sum than before."""
        self._look = None
        self._broker.timers.now_ns = now_ns
        self.requests.sweep(now_ns)
        self._caches.sweep()
        self._sum_room()
        self._sum_models(now_ns)
        if (self.load.slots, self.load.waiting, self.load.draining) != self._told_load:
            self.report(now_ns)
        if self._revision != self._broker.registry.revision or self._caches.due:
            # Too early to say so.
            self.settle(now_ns)

    def _sum_models(self, now_ns: int) -> None:
        revision = self._broker.registry.revision
        if revision == self._revision:
            return
        if self._announced_ns is not None:
            pause_ns = len(self.requests.owed) * limits.CELL_ANNOUNCED_US * 1_000
            if now_ns - self._announced_ns < pause_ns:
                return
        self._revision = revision
        registry = self._broker.registry
        models, self.left_out = summed_models(self._broker)
        own = [self._broker.epoch, *cells.below(registry)][: limits.CELLS_MAX]
        found = _Sum(models, summed_speed(self._broker), own, 1 + cells.depth_of(registry))
        if found != self._sum:
            self._sum, self.speed, self._announced_ns = found, found.speed, now_ns
            self.announce(models, now_ns)

    def _sum_load(self) -> None:
        """What a report has."""
        load = summed_load(self._broker)
        load.cached = self.load.cached
        self._engines_hold, self.load = load.waiting, load
        self._sum_room()

    def _sum_room(self) -> None:
        """What of it the parent goes by."""
        requests, load = self.requests, self.load
        room = summed_room(self._broker, requests.held, lambda: requests.waiting)
        load.slots, load.waiting = room.slots, min(self._engines_hold + room.queued, 2**32 - 1)
        load.gauges["cell_queued"] = float(room.queued)
        load.draining = self.draining or self._broker.scheduler.draining

    def report(self, now_ns: int, *, streams: bool = False) -> None:
        """Send the load now, if anybody listens, and if it is asked for how far each of the `streams` is."""
        if not self.registered:
            return
        self._sum_load()
        load = self.load
        self._told_load = load.slots, load.waiting, load.draining
        load.dispatches = self._dispatches
        load.streams = self.units_made() if streams else []
        self.outbox.append(codec.pack(load))
        load.streams = []

    def _welcome(self, welcome: Welcome, now_ns: int) -> Sequence[Order]:
        if welcome.minor < _CELLS_MINOR:
            # It would not see that cells stand in a circle.
            self.outbox.append(codec.pack(Goodbye("a cell")))
            error = VersionMismatchError(
                f"the parent speaks version 2.{welcome.minor}, cells are known since 2.{_CELLS_MINOR}",
                peer=welcome.minor,
            )
            return [Refused(error)]
        orders = super()._welcome(welcome, now_ns)
        if self.registered:
            self.timers.cancel(self._gone)
            self._gone = None
        return orders

    def _hello(self, now_ns: int) -> None:
        if not self.registered:
            # What the parent is told that it has here counts among what it has in use.
            self.requests.carried()
        self._sum_load()
        self._told_load = self.load.slots, self.load.waiting, self.load.draining
        super()._hello(now_ns)

    def _hello_of(self, models: list[ModelInfo], elsewhere: int = 0) -> WorkerHello:
        hello = super()._hello_of(models, elsewhere)
        assert self._sum is not None
        hello.cells, hello.depth = self._sum.cells, self._sum.depth
        return hello

    def refused(self, now_ns: int) -> None:
        """The parent has refused this cell for good: ask again, but rarely."""
        self._say_hello_in(now_ns, limits.CELL_REFUSED_MS * self._rng.uniform(0.75, 1.25))

    # ── requests, instead of a worker's own streams ─────────────────────────────────────────────────────────────────

    @property
    def busy(self) -> bool:
        """Whether any request holds a slot."""
        return bool(self.requests.owed)

    def dispatched(self, envelope: Dispatch, body: bytes, now_ns: int) -> None:
        """Take a request, or hand it back at once."""
        if (self.draining or self._broker.scheduler.draining) and envelope.operation != "operate":
            error = WorkerDrainingError(f"cell {self.name!r} is draining", worker=self.name)
            self._tell(envelope.instance, envelope.request, envelope.attempt, error)
            return
        self.requests.dispatched(envelope, body, now_ns)

    def granted(self, grant: Grant) -> None:
        """Take credit, and have sent again what a reader that came another way lacks."""
        self.requests.granted(grant, self._now_ns)

    def aborted(self, abort: Abort) -> None:
        """Stop what is not wanted."""
        self.requests.aborted(abort, self._now_ns)

    def carried(self) -> list[Carried]:
        """All that another parent has to know of."""
        return self.requests.carried()

    def units_made(self) -> list[StreamUnits]:
        """How far each stream is, as its reader has said."""
        return self.requests.units_made(limits.SLOTS_MAX)

    def forget_readers(self) -> None:
        """There is no session. What runs goes on for a while."""
        self._broker.timers.now_ns = self._now_ns
        self.requests.parent_lost()
        self._broker.settle()
        if self._gone is None:
            due_ns = self._now_ns + milliseconds(limits.CELL_AWAY_MS)
            self._gone = self.timers.at(due_ns, self._parent_gone)

    def _parent_gone(self, now_ns: int) -> None:
        self._gone = None
        if not self.registered:
            self._broker.timers.now_ns = now_ns
            self.requests.remote.forget_all()
            self._broker.settle()

    def flush(self) -> Sequence[StreamOrder]:
        """What there is to say is in the outbox already."""
        return ()

    def goodbye(self, reason: str) -> None:
        """Leave. What still runs is handed back."""
        self.requests.tell_all(WorkerDrainingError(f"cell {self.name!r} leaves", worker=self.name))
        if self._connected:
            self.outbox.append(codec.pack(Goodbye(reason)))

    def _send(self, frames: codec.Frames) -> None:
        if self.registered:
            self.outbox.append(frames)
