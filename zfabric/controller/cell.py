"""A controller's link to its parent: the session of a cell, driven over a socket of its own on the controller's loop."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from typing import Final

from zfabric.controller.config import CellConfig
from zfabric.core.cell.session import CellSession
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.outbox import Send
from zfabric.core.worker.session import DrainAsked, DrainWithdrawn, Faulted, Order, Refused, Registered
from zfabric.errors import FabricError
from zfabric.ids import RoutingId
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.links import DealerDriver, Log, open_dealer
from zfabric.transport.loop_timer import LoopTimer
from zfabric.version import __version__
from zfabric.wire.kinds import CHUNKS

_CHUNKS: Final = bytes([CHUNKS])


class CellLink:
    """Keeps a controller registered at its parent.

    Whatever becomes of the parent, the controller's own clients and workers go on: to be refused is logged, and tried again.

    Args:
        config: The parent, and what this controller is called there.
        broker: The controller's.
        log: Called with an event's name and fields.
        act: Sends what the broker has to say, after the parent has sent something.
        transport, spin_us: As of the controller.
    """

    def __init__(
        self,
        config: CellConfig,
        broker: Broker,
        log: Log,
        act: Callable[[], None],
        transport: str | None,
        spin_us: int | None,
    ) -> None:
        self._config = config
        self._log = log
        self._act = act
        self._told: tuple[int, str] | None = None
        self._left_out: list[str] = []
        rng = random.Random(secrets.randbits(64))
        self.session = CellSession(broker, name=config.name, instance=secrets.randbits(63), rng=rng, build=__version__)
        self._timer = LoopTimer(asyncio.get_running_loop(), self._tick)
        self._link: DealerDriver | None = open_dealer(config.parent, self, rng, config.credentials, transport, spin_us)

    # ── the controller's side ───────────────────────────────────────────────────────────────────────────────────────

    def relay(self, sender: RoutingId, header: bytes) -> bool:
        """Send chunks up, if they are for a client of the parent's. Returns whether they were."""
        return header[:1] == _CHUNKS and self.session.requests.relay(sender, header, monotonic_ns())

    def sift(self, sends: list[Send]) -> list[Send]:
        """Send up what is for clients of the parent. Returns the rest."""
        return self.session.requests.sift(sends)

    def settle(self, now_ns: int) -> None:
        """A turn of the controller's is over: send what is due."""
        self.session.settle(now_ns)
        self._flush(now_ns)

    def close(self) -> None:
        """Say goodbye, hand back what runs for the parent, and free the socket a moment later. Safe to call twice."""
        self._timer.cancel()
        link, self._link = self._link, None
        if link is not None:
            self.session.goodbye("the cell's controller stops")
            link.send_all(self._taken())
            link.close()

    def _flush(self, now_ns: int) -> None:
        if self._link is None:
            return
        if self.session.outbox:
            self._link.send_all(self._taken())
        self._timer.arm(self.session.timers.next_ns(), now_ns)
        left_out = self.session.left_out
        if left_out != self._left_out:
            self._left_out = left_out
            if left_out:
                self._log("cell_models_left_out", cell=self._config.name, count=len(left_out), first=left_out[0])

    def _taken(self) -> list[tuple[bytes, bytes]]:
        taken, self.session.outbox = self.session.outbox, []
        return taken

    def _tick(self) -> None:
        self.session.tick(monotonic_ns())
        self._act()

    # ── the parent's side ───────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self) -> None:
        self.session.connected(monotonic_ns())

    def link_down(self) -> None:
        self._log("cell_parent_lost", parent=self._config.parent, cell=self._config.name)
        self.session.tick(monotonic_ns())
        self.session.disconnected()
        self._act()

    def link_denied(self, error: FabricError) -> None:
        self._refused(error)

    def link_message(self, header: bytes, body: bytes) -> None:
        try:
            orders = self.session.receive(header, body, monotonic_ns())
        except FabricError as error:
            self._log("bad_message", peer=f"parent {self._config.parent}", error=error.message)
            return
        for order in orders:
            self._obey(order)

    def link_idle(self) -> None:
        self._act()

    def _obey(self, order: Order) -> None:
        now_ns = monotonic_ns()
        if isinstance(order, Registered):
            self._told = None
            models = [info.name for info in self.session.models or ()]
            self._log("cell_registered", parent=self._config.parent, cell=self._config.name, models=models)
        elif isinstance(order, Refused):
            self._refused(order.error)
            if not order.error.retryable:
                self.session.refused(now_ns)
        elif isinstance(order, Faulted):
            self._log("fault", error=str(order.error), code=order.error.code)
        elif isinstance(order, DrainAsked):
            self.session.drain(now_ns)
            self._log("cell_draining", parent=self._config.parent, cell=self._config.name)
        elif isinstance(order, DrainWithdrawn):
            self.session.undrain(now_ns)
            self._log("drain_withdrawn", running=len(self.session.requests.owed))

    def _refused(self, error: FabricError) -> None:
        """Say why the parent does not take this cell, once for each reason."""
        if self._told != (error.code, error.message):
            self._told = error.code, error.message
            self._log(
                "cell_refused", parent=self._config.parent, cell=self._config.name, error=error.message, code=error.code
            )
