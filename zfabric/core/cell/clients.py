"""Clients of the parent whose requests a cell runs: they have no connection here, and are told through the parent."""

from __future__ import annotations

from typing import Final

from zfabric.core.controller.access import Grant, Role
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.peers import ClientPeer
from zfabric.errors import NameTakenError
from zfabric.ids import RoutingId, milliseconds
from zfabric.wire import kinds
from zfabric.wire.messages import ClientHello

#: What names such a client where a connection names others, none of which begins so.
_MARK: Final = b"\1cell"


class RemoteClient(ClientPeer):
    """A client of the parent's.

    Attributes:
        above: How chunks for it begin on the way to the parent: the kind, and the number of its session there.
    """

    remote = True

    __slots__ = ("above",)

    above: bytes


class RemoteClients:
    """Those that have requests here, or had some a moment ago, by their instance.

    Each has a number of its own at this controller, another one whenever its way to its reader is new: what workers sent the
    former way must not come by the new one, where it would be a gap.

    Args:
        broker: This controller's.
        cell: The cell's name, for operators.
    """

    def __init__(self, broker: Broker, cell: str) -> None:
        self._broker = broker
        self._grant: Final = Grant(f"parent of {cell}", frozenset({Role.CLIENT, Role.OPERATOR}))
        self.clients: dict[int, RemoteClient] = {}
        self.by_route: dict[RoutingId, RemoteClient] = {}
        self._idle: dict[int, None] = {}

    def at(self, instance: int, number: int, lock: bytes) -> RemoteClient:
        """The client of an instance, which has this session's number at the parent now.

        Raises:
            NameTakenError: A client of this controller's own has the instance.
            PermissionDeniedError: An operator of this controller has kicked it out.
        """
        above = b"\x01" + number.to_bytes(4, "big")
        client, known = self.clients.get(instance), self._broker.registry.clients
        if client is not None and known.get(instance) is not client:
            self._drop(client)
            client = None
        if client is None:
            client = self._make(instance, lock)
        elif client.away or client.above != above:
            self.away(client)
            client.number = self._broker.sessions.next_session()
            client.away = False
        if not client.requests:
            client.lock = lock
        client.above = above
        return client

    def _make(self, instance: int, lock: bytes) -> RemoteClient:
        registry, now_ns = self._broker.registry, self._broker.timers.now_ns
        self._broker.sessions.check_kicked(instance, now_ns)
        if instance in registry.clients:
            raise NameTakenError("another client has this instance number")
        hello = ClientHello(
            version=kinds.PROTOCOL_VERSION,
            build="",
            instance=instance,
            label=self._grant.name,
            minor=kinds.MINOR_VERSION,
        )
        route = RoutingId(_MARK + instance.to_bytes(8, "big"))
        client = RemoteClient(self._broker.sessions.next_session(), hello, b"", route, self._grant, now_ns)
        client.lock = lock
        registry.clients[instance] = self.clients[instance] = self.by_route[route] = client
        return client

    def away(self, client: RemoteClient) -> None:
        """The way to its reader is lost. What it waits for is kept for it."""
        if not client.away:
            self._broker.scheduler.endings.client_away(client)
            client.away = True

    def all_away(self) -> None:
        """The parent is lost, and with it the way to all readers."""
        for client in self.clients.values():
            self.away(client)

    def forget_all(self) -> None:
        """The parent does not come back: stop all that its clients had here."""
        for client in list(self.clients.values()):
            self._broker.scheduler.endings.client_left(client)
            self._drop(client)

    def rests(self, instance: int) -> None:
        """A client may have nothing here any more."""
        self._idle[instance] = None

    def sweep(self) -> None:
        """Forget who has had nothing here for a while: the next attempt of what was lost has the former's place until then."""
        since_ns = self._broker.timers.now_ns - milliseconds(self._broker.config.claim_ms)
        for instance in list(self._idle):
            client = self.clients.get(instance)
            if client is None or client.requests:
                del self._idle[instance]
            elif not client.coming_back(since_ns):
                del self._idle[instance]
                self._drop(client)

    def _drop(self, client: RemoteClient) -> None:
        known = self._broker.registry.clients
        if known.get(client.instance) is client:
            del known[client.instance]
        self.clients.pop(client.instance, None)
        self.by_route.pop(client.routing_id, None)
