"""Links that fail as ZeroMQ's do, and bear what ZeroMQ bears.

A link delivers in order. It loses messages only as a suffix: what is under way when it breaks, in both directions, and
nothing before that. It may die silently (half-open), which both ends learn after the transport's own timeout. A new
connection is a new link with a new routing id, however soon the peer is back.

A frame that its receiver does not take would cost the sender the connection, so a well-behaved peer never sends one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from zfabric import limits
from zfabric.core.controller.access import Grant
from zfabric.ids import RoutingId
from zfabric.testing.older import as_of_2_0
from zfabric.testing.records import Violation
from zfabric.testing.world import World
from zfabric.wire import kinds

_HELLOS = (bytes([kinds.CLIENT_HELLO]), bytes([kinds.WORKER_HELLO]))


class Peer(Protocol):
    """Who is at the outer end of a link."""

    @property
    def honest(self) -> bool: ...
    @property
    def grant(self) -> Grant: ...
    @property
    def roams(self) -> bool:
        """Whether it goes to another hub when it has lost one."""

    def link_up(self, link: Link) -> None: ...
    def link_down(self, link: Link) -> None: ...
    def link_message(self, header: bytes, body: bytes) -> None: ...


class Hub(Protocol):
    """Who is at the inner end of all links."""

    def hub_message(self, sender: RoutingId, header: bytes, body: bytes) -> None: ...
    def hub_lost(self, peer: RoutingId) -> None: ...


class Link:
    """One connection, from its handshake to its end."""

    def __init__(self, network: Network, peer: Peer, routing_id: RoutingId) -> None:
        self.network = network
        self.peer = peer
        self.routing_id = routing_id
        self.honest = peer.honest
        self.older = peer.honest and network.is_older()
        self.alive = True
        self.silent = False
        self._last_in_ns = self._last_out_ns = 0
        self._header: bytes | None = None

    def to_hub(self, header: bytes, body: bytes) -> None:
        """From the peer to the hub."""
        if self.older:
            header = as_of_2_0(header)
        if self.honest:
            self.network.check_size(header, body)
        times = 2 if self.network.stutters and header[:1] in _HELLOS else 1
        for _ in range(times):
            self._last_in_ns = self._carry(
                self._last_in_ns, lambda: self.network.hub_receives(self.routing_id, header, body)
            )

    def to_peer(self, header: bytes, body: bytes) -> None:
        """From the hub to the peer."""
        if self.older:
            header = as_of_2_0(header)
        self.network.check_size(header, body)
        self._last_out_ns = self._carry(self._last_out_ns, lambda: self._arrive(frames_of(header, body)))

    def _arrive(self, frames: list[bytes]) -> None:
        """The peer reads: whether a body follows says the kind."""
        for frame in frames:
            header = self._header
            if header is not None:
                self._header = None
                self.peer.link_message(header, frame)
            elif frame[0] in kinds.WITH_BODY:
                self._header = frame
            else:
                self.peer.link_message(frame, b"")

    def _carry(self, last_ns: int, deliver: Callable[[], None]) -> int:
        world = self.network.world
        arrival_ns = max(last_ns, world.now_ns + int(self.network.delay_ms() * 1e6))

        def arrive() -> None:
            if self.alive and not self.silent:
                deliver()

        if self.alive and not self.silent:
            world.at(arrival_ns, arrive)
        return arrival_ns


def frames_of(header: bytes, body: bytes) -> list[bytes]:
    """A message as sockets send it: how many frames it has says its kind, and not what is in them."""
    return [header, body] if header[0] in kinds.WITH_BODY else [header]


class Network:
    """All links of one hub.

    Args:
        world: Time and chance.
        number: Of the hub, where there are several.
    """

    def __init__(self, world: World, number: int = 0) -> None:
        self.world = world
        #: Where it is dialed.
        self.endpoint = f"tcp://127.0.0.1:{number + 1}"
        self._number = number
        #: Those of all hubs, in the order in which peers go from one to the next.
        self.all = [self]
        #: Whether the hub's cable is pulled: nobody reaches it, and it reaches nobody.
        self.unplugged = False
        self.links: dict[RoutingId, Link] = {}
        #: Everybody who ever had a connection: what it said may be read after its end.
        self.peers: dict[RoutingId, Peer] = {}
        self.hub: Hub | None = None
        self.slow = False
        #: HELLOs arrive twice, as they do when a slow answer makes a peer say it again.
        self.stutters = False
        #: What any receiver takes, in bytes.
        self.frame_bytes_max = limits.FRAME_BYTES_MAX
        #: Whether the next connection is one of which an end is of the version before.
        self.is_older: Callable[[], bool] = lambda: False
        self._next_id = 0

    def check_size(self, header: bytes, body: bytes) -> None:
        """Raises: Violation, this costs the sender its connection."""
        most = min(limits.HEADER_BYTES_MAX, limits.CONTROL_BODY_BYTES_MAX)
        if len(header) <= most and len(body) <= self.frame_bytes_max:
            return
        kind = header[0]
        name = kinds.NAMES.get(kind, hex(kind))
        most = self.frame_bytes_max
        if kind in (kinds.SUBMIT, kinds.DISPATCH):
            most = limits.HEADER_BYTES_MAX
        elif kind != kinds.CHUNKS:
            most = min(most, limits.CONTROL_BODY_BYTES_MAX)
        if len(header) > most:
            raise Violation(f"{name} has a first frame of {len(header)} bytes, its receiver takes {most}")
        if len(body) > self.frame_bytes_max:
            raise Violation(f"{name} has a body of {len(body)} bytes, its receiver takes {self.frame_bytes_max}")

    def delay_ms(self) -> float:
        """How long one message takes."""
        rng = self.world.rng
        return rng.uniform(1, 80) if self.slow and rng.random() < 0.2 else rng.uniform(0.05, 1.0)

    def connect(self, peer: Peer) -> None:
        """Keep trying until there is a hub; then the peer's link is up."""
        if self.hub is None or self.unplugged:
            delay_ms = self.world.rng.uniform(20, 250 if peer.roams else 600)
            self.world.after(delay_ms, lambda: self._next(peer).connect(peer))
            return
        self._next_id += 1
        link = Link(self, peer, RoutingId(((self._number << 32) + self._next_id).to_bytes(5, "big")))
        self.links[link.routing_id], self.peers[link.routing_id] = link, peer
        self.world.after(self.delay_ms(), lambda: peer.link_up(link) if link.alive else None)

    def _next(self, peer: Peer) -> Network:
        return self.all[(self.all.index(self) + 1) % len(self.all)] if peer.roams else self

    def unplug(self, milliseconds: float) -> None:
        """Pull the hub's cable, and put it back later."""
        self.unplugged = True
        for link in list(self.links.values()):
            self.silence(link)

        def plug() -> None:
            self.unplugged = False

        self.world.after(milliseconds, plug)

    def hub_receives(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        if self.hub is not None:
            self.hub.hub_message(sender, header, body)

    def cut(self, link: Link, *, peer_alive: bool = True) -> None:
        """Break a link: both ends know at once, and the peer tries again."""
        if not link.alive:
            return
        link.alive = False
        self.links.pop(link.routing_id, None)
        hub = self.hub
        if hub is not None:
            self.world.after(self.world.rng.uniform(0.1, 2), lambda: hub.hub_lost(link.routing_id))
        if peer_alive:
            link.peer.link_down(link)
            following = self._next(link.peer)
            self.world.after(self.world.rng.uniform(20, 300), lambda: following.connect(link.peer))

    def silence(self, link: Link) -> None:
        """Let a link die without a word; the transport notices after its own timeout."""
        link.silent = True
        self.world.after(limits.ZMTP_TIMEOUT_MS, lambda: self.cut(link))

    def hub_gone(self) -> None:
        """The hub's process died: all links break."""
        self.hub = None
        for link in list(self.links.values()):
            self.cut(link)
