"""The data plane's one table: (worker's connection + how its chunks begin) → the client it is for.

A route exists while the worker has a live request that the client reads, so one lookup is also the check of the source: a
worker cannot send to a client it does not work for. Chunks begin with the number of the client's session, and a client that
is away, or has not claimed a request since it came back, does not read.
"""

from __future__ import annotations

from zfabric.core.controller.peers import ClientPeer, WorkerPeer
from zfabric.ids import RoutingId
from zfabric.wire import codec


class Route:
    """Where chunks go, and whose lease they renew."""

    __slots__ = ("client", "worker")

    def __init__(self, client: RoutingId, worker: WorkerPeer) -> None:
        self.client = client
        self.worker = worker


class Routes:
    """Routes with reference counts.

    Attributes:
        table: Those to clients of this controller.
        remote: Those to clients of another one, whose cell this controller is: they have no connection here.
    """

    __slots__ = ("remote", "table")

    def __init__(self) -> None:
        self.table: dict[bytes, Route] = {}
        self.remote: dict[bytes, tuple[ClientPeer, WorkerPeer]] = {}

    def add(self, worker: WorkerPeer, client: ClientPeer) -> None:
        """The client reads one more live request of this worker."""
        count = worker.routes.get(client.number, 0)
        worker.routes[client.number] = count + 1
        if not count and client.remote:
            self.remote[_key(worker, client)] = client, worker
        elif not count:
            self.table[_key(worker, client)] = Route(client.routing_id, worker)

    def drop(self, worker: WorkerPeer, client: ClientPeer) -> None:
        """One less."""
        count = worker.routes[client.number] - 1
        if count:
            worker.routes[client.number] = count
        else:
            del worker.routes[client.number]
            (self.remote if client.remote else self.table).pop(_key(worker, client), None)


def _key(worker: WorkerPeer, client: ClientPeer) -> bytes:
    return worker.routing_id + codec.chunks_route(client.number)
