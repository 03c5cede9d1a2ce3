"""A controller's core below another one's, with fake peers at both: no clock, no sockets, and no engines."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.peers import FakeFabric
from zfabric.core.cell.session import CellSession
from zfabric.core.controller.outbox import Send
from zfabric.core.controller.peers import WorkerPeer
from zfabric.core.worker.session import Order
from zfabric.ids import RoutingId, milliseconds
from zfabric.limits import CELL_LOOK_MS

CELL = "east"


class _Level(FakeFabric):
    """One controller, some of whose sends go another way."""

    def __init__(self, first: int, **settings: Any) -> None:
        super().__init__(**settings)
        # All of these are made of the same chance.
        self.broker.epoch = self.broker.sessions._epoch = first
        #: Numbers of clients and workers begin here.
        self._first = first
        self.divert: Callable[[list[Send]], list[Send]] = lambda sends: sends

    def _connect(self, name: str) -> None:
        self.instances.setdefault(name, self._first + len(self.instances))
        super()._connect(name)

    def _sort(self) -> None:
        self.broker.outbox.pending = self.divert(self.broker.outbox.take())
        super()._sort()

    def hear(self, sender: RoutingId, frames: tuple[bytes, bytes]) -> None:
        """A message of a connection."""
        self.broker.receive(sender, *frames, self.now_ns)
        self._sort()


class Levels:
    """A parent and a cell. `settle` lets all arrive that is on its way.

    Attributes:
        parent, cell: Both controllers, with the clients and workers that a test gives them.
        session: The cell's at its parent.
        orders: What that had its driver do.
        connected: Whether they can talk.
    """

    def __init__(self, **settings: Any) -> None:
        self.parent = _Level(1, **settings)
        self.cell = _Level(1_000_001, **settings)
        self.cell.divert = lambda sends: self.session.requests.sift(sends)
        self.parent.divert = self._down
        self.session = CellSession(self.cell.broker, name=CELL, instance=77, rng=random.Random(3))
        self.orders: list[Order] = []
        self._to_cell: list[tuple[bytes, bytes]] = []
        self._connection = 0
        self.connected = False
        self.connect()

    @property
    def peer(self) -> WorkerPeer | None:
        """The cell as its parent knows it."""
        return self.parent.broker.registry.workers.get(CELL)

    def connect(self) -> None:
        """The cell reaches its parent."""
        self._connection += 1
        self.connected = True
        self.session.connected(self.now_ns)
        self.pass_ms(200)

    def cut(self) -> None:
        """The connection is lost, with all that is on its way."""
        self.connected = False
        self._to_cell.clear()
        self.session.outbox.clear()
        self.session.disconnected()
        self.cell._sort()
        self.parent.broker.disconnected(self._id, self.now_ns)
        self.parent._sort()

    def settle(self) -> None:
        """Pass messages on until there are none."""
        for _ in range(1_000):
            self.cell._sort()
            self.session.settle(self.now_ns)
            up, self.session.outbox = self.session.outbox, []
            down, self._to_cell = self._to_cell, []
            if not up and not down:
                return
            for frames in up if self.connected else ():
                self.parent.hear(self._id, frames)
            for frames in down if self.connected else ():
                self.orders += self.session.receive(*frames, self.now_ns)
        raise AssertionError("the two do not come to rest")

    def look(self) -> None:
        """Wait until the cell has looked at its sum."""
        self.pass_ms(2 * CELL_LOOK_MS)

    def pass_ms(self, duration_ms: float) -> None:
        """Let time pass; all workers are heard of all the while."""
        until_ns = self.now_ns + milliseconds(duration_ms)
        while self.now_ns < until_ns:
            step_ms = min(50.0, (until_ns - self.now_ns) / 1e6)
            for level in (self.parent, self.cell):
                level.pass_ms(step_ms, *level.broker.registry.workers)
            self.session.tick(self.now_ns)
            self.settle()

    @property
    def now_ns(self) -> int:
        """The time, which is one for both."""
        return self.cell.now_ns

    @property
    def _id(self) -> RoutingId:
        return RoutingId(f"{CELL}/{self._connection}".encode())

    def _down(self, sends: list[Send]) -> list[Send]:
        self._to_cell += [(header, body) for to, header, body in sends if to == self._id]
        return [send for send in sends if send[0] != self._id]
