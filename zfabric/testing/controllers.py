"""A broker behind a hub: what a controller's process is to the fabric."""

from __future__ import annotations

import contextlib
from typing import Final

from zfabric.core.controller import steering
from zfabric.core.controller.access import Grant
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.candidates import Host
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.dispatch import Ask
from zfabric.errors import UnsupportedOperationError
from zfabric.ids import RoutingId
from zfabric.limits import BURST_MESSAGES_MAX, ZMTP_TIMEOUT_MS
from zfabric.testing.checkers import Arrival
from zfabric.testing.network import Network
from zfabric.testing.records import Violation
from zfabric.testing.world import Alarm, World
from zfabric.wire import codec, kinds
from zfabric.wire.codec import ROUTE_BYTES
from zfabric.wire.messages import Welcome

#: A policy of somebody else's, which fails now and then.
BROKEN_POLICY: Final = "simulated_broken"
_GOODBYE: Final = bytes([kinds.GOODBYE])
_HELLOS: Final = (kinds.CLIENT_HELLO, kinds.WORKER_HELLO)


def broken_policy(ask: Ask) -> Host | None:
    """Raises now and then, or draws somebody who is no candidate."""
    what = ask.rng.randrange(8)
    if what == 0:
        raise ZeroDivisionError("a policy divides by nothing")
    return Host("nobody", 1.0, 1) if what == 1 else ask.candidates.next_in_turn()


class SimController:
    """It can pause, drain, leave, die, and come back as another.

    Args:
        keyed: Whether each peer has a key, which allows outsiders little.
    """

    def __init__(self, world: World, network: Network, config: BrokerConfig, *, keyed: bool) -> None:
        self.world = world
        self.network = network
        self.config = config
        self.keyed = keyed
        self.broker: Broker | None = None
        self._matched = 0
        #: Since when it has been there and moving without a break.
        self.awake_ns = 0
        #: While it is stopped in its tracks: what waits in its socket.
        self._waiting: list[tuple[RoutingId, bytes, bytes]] | None = None
        self.start()

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """A new process: nothing is remembered."""
        if self.broker is None:
            self.awake_ns = self.world.now_ns
            self.broker = Broker(self.config, self.world.rng, self.world.now_ns)
            if self.keyed:
                self.broker.grant_of = self._grant_of
            self._waiting = None
            self._alarm = Alarm(self.world, self._tick)
            self.network.hub = self
            self._after()

    def _grant_of(self, peer: RoutingId) -> Grant:
        return self.network.peers[peer].grant

    def die(self) -> None:
        """SIGKILL."""
        if self.broker is not None:
            self._matched += self.broker.recovery.matched
            self.broker = None
            self.network.hub_gone()

    @property
    def matched(self) -> int:
        """Streams that went on after a lost connection, of all its lives."""
        return self._matched + (self.broker.recovery.matched if self.broker is not None else 0)

    def leave(self) -> None:
        """SIGTERM: say goodbye, and end."""
        if self.broker is not None and self._waiting is None:
            self.broker.goodbye()
            self._after()
            self.world.after(20, self.die)

    def drain(self) -> None:
        """Take no new requests."""
        if self.broker is not None:
            self.broker.drain(self.world.now_ns)
            self._after()

    def take_back(self) -> None:
        """Nothing that an operator has ordered holds any more."""
        if self.broker is None:
            return
        directives = self.broker.registry.directives
        for model in list(directives.paused):
            steering.resume(self.broker, "nobody", {"model": model})
        for worker in list(directives.held):
            # One of version 2.0 that was told to leave as well does so, and may come back.
            with contextlib.suppress(UnsupportedOperationError):
                steering.undrain(self.broker, "nobody", {"worker": worker})
        directives.kicked.clear()
        if self._waiting is None:
            self._after()

    def pause(self, milliseconds: float) -> None:
        """SIGSTOP, and SIGCONT later. What arrives waits in its socket; peers notice after the transport's timeout."""
        if self.broker is None or self._waiting is not None:
            return
        self._waiting = []
        broker = self.broker
        if milliseconds > ZMTP_TIMEOUT_MS:
            self.world.after(ZMTP_TIMEOUT_MS, lambda: self._unheard(broker))
        self.world.after(milliseconds, lambda: self._go_on(broker))

    @property
    def paused(self) -> bool:
        return self._waiting is not None

    def _unheard(self, broker: Broker) -> None:
        """Peers whose pings nobody answered give up, and connect again: the kernel takes that."""
        if self.broker is broker:
            for link in list(self.network.links.values()):
                if link.alive and self.world.rng.random() < 0.5:
                    self.network.cut(link)

    def _go_on(self, broker: Broker) -> None:
        """Timers are due and messages wait: which come first is the loop's choice, and it reads in bursts."""
        if self.broker is not broker or self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        self.awake_ns = self.world.now_ns
        left = {sender for sender, header, _ in waiting if header[:1] == _GOODBYE}
        heard = {sender for sender, _, _ in waiting} - left
        workers = [worker for worker in broker.registry.workers.values() if worker.routing_id in heard]
        burst = self.world.rng.choice([0, BURST_MESSAGES_MAX])
        for sender, header, body in waiting[:burst]:
            self.hub_message(sender, header, body)
        self._tick()
        for sender, header, body in waiting[burst:]:
            self.hub_message(sender, header, body)
        for worker in workers:
            link = self.network.links.get(worker.routing_id)
            if worker.name not in broker.registry.workers and link is not None and link.honest:
                raise Violation(f"worker {worker.name} was removed, and its messages waited to be read")

    # ── what comes ──────────────────────────────────────────────────────────────────────────────────────────────────

    def hub_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        broker = self.broker
        if broker is None:
            return
        if self._waiting is not None:
            self._waiting.append((sender, header, body))
            return
        kind = header[0] if header else -1
        if kind == kinds.CHUNKS:
            route = broker.routes.table.get(sender + header[:ROUTE_BYTES])
            if route is not None:
                route.worker.heard_ns = self.world.now_ns
                broker.outbox.pending.append((route.client, header, body))
                self._after()
                return
        link = self.network.links.get(sender)
        honest = link is not None and link.honest
        arrival = Arrival(broker, header) if honest and kind == kinds.SUBMIT else None
        bad = broker.bad_frames
        broker.receive(sender, header, body, self.world.now_ns)
        if honest and broker.bad_frames > bad and kind not in _HELLOS:
            raise Violation(f"the controller cannot use {kinds.NAMES.get(kind, kind)} of a well-behaved peer")
        if arrival is not None:
            arrival.check(broker, sender)
        self._after()

    def hub_lost(self, peer: RoutingId) -> None:
        if self.broker is None:
            return
        if self._waiting is not None:
            # It looks at its connections when it goes on.
            self.world.after(100, lambda: self.hub_lost(peer))
            return
        self.broker.disconnected(peer, self.world.now_ns)
        self._after()

    def overflow(self, peer: RoutingId) -> None:
        """A peer's pipe stayed full: the session ends here, and the peer knows only when it next says something."""
        self.hub_lost(peer)

    def _tick(self) -> None:
        if self.broker is not None and self._waiting is None:
            self.broker.tick(self.world.now_ns)
            self._after()

    def _after(self) -> None:
        broker = self.broker
        assert broker is not None
        while broker.outbox.pending:
            for to, header, body in broker.outbox.take():
                link = self.network.links.get(to)
                if link is None:
                    broker.disconnected(to, self.world.now_ns)
                    continue
                if header[0] == kinds.WELCOME:
                    header = self._tell_bound(header)
                link.to_peer(header, body)
        broker.journal.take()
        self._alarm.arm(broker.next_deadline_ns())

    def _tell_bound(self, header: bytes) -> bytes:
        """A WELCOME that tells what this network's receivers take."""
        welcome: Welcome = codec.unpack_control(header)
        welcome.frame_bytes_max = self.network.frame_bytes_max
        return codec.pack(welcome)[0]
