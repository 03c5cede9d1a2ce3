"""Putting running streams together again after a controller's start.

Workers kept running while there was no controller, and clients kept waiting. Both come back in any order and say what
they have: a worker's `Carried`, a client's `Claim`. When both name the same attempt, the stream goes on from the first
unit that the client lacks. What is still alone when the time is over ends: a claim with ConnectionLostError, after which
the client submits its next attempt; a carried request by being stopped.

Outside this time there is nothing to put together: a lost connection ended the session's requests at once.
"""

from __future__ import annotations

from zfabric.core.endings import Endings
from zfabric.core.outbox import Outbox
from zfabric.core.registry import ClientPeer, Registry, Request, WorkerPeer
from zfabric.core.request_state import RequestEvent, RequestState, advance
from zfabric.errors import ConnectionLostError
from zfabric.wire import codec
from zfabric.wire.messages import Abort, Carried, Claim, CreditLine, Grant

Key = tuple[int, int, int]


class Recovery:
    """Matches claims with carried requests while `active`."""

    def __init__(self, endings: Endings, registry: Registry, outbox: Outbox) -> None:
        self._endings = endings
        self._registry = registry
        self._outbox = outbox
        self._carried: dict[Key, Request] = {}
        self._claimed: dict[Key, tuple[Request, Claim]] = {}
        self.active = True
        self.matched = 0

    def worker_back(self, worker: WorkerPeer, carried: list[Carried]) -> None:
        """A worker says what it runs. Attempts that nobody can be waiting for are stopped."""
        strays: dict[int, list[tuple[int, int]]] = {}
        for line in carried:
            if not self.active:
                strays.setdefault(line.instance, []).append((line.request, line.attempt))
                continue
            request = Request(
                None,
                instance=line.instance,
                request=line.request,
                attempt=line.attempt,
                operation=line.operation,
                state=RequestState.RECOVERED,
            )
            request.slotless = line.finished or line.operation == "operate"
            host = worker.hosts.get(line.model)
            request.model = host.model if host else None
            if request.key in worker.live:
                continue
            self._endings.place(request, worker, host)
            self._carried[request.key] = request
            claimed = self._claimed.get(request.key)
            if claimed is not None and claimed[0].state is RequestState.CLAIMED:
                self._match(claimed[0], claimed[1], request)
        for instance, attempts in strays.items():
            self._outbox.send(worker.routing_id, codec.pack(Abort(instance=instance, attempts=attempts)))

    def client_back(self, client: ClientPeer, claims: list[Claim]) -> None:
        """A client says what it waits for."""
        for claim in claims:
            request = Request(
                client,
                instance=client.instance,
                request=claim.request,
                attempt=claim.attempt,
                operation="generate",
                state=RequestState.CLAIMED,
                window=claim.window,
            )
            if not self.active:
                self._outbox.end(client, claim.request, claim.attempt, _lost())
                continue
            client.requests[claim.request] = request
            self._claimed[request.key] = (request, claim)
            carried = self._carried.get(request.key)
            if carried is not None and carried.state is RequestState.RECOVERED:
                self._match(request, claim, carried)

    def finish(self) -> None:
        """The time is over: end what is alone."""
        self.active = False
        self._endings.abandon(
            [request for request in self._carried.values() if request.state is RequestState.RECOVERED]
        )
        for request, _ in self._claimed.values():
            if request.state is RequestState.CLAIMED and request.client is not None:
                client = request.client
                request.state = advance(request.state, RequestEvent.GAVE_UP)
                self._endings.retire(request)
                self._outbox.end(client, request.request, request.attempt, _lost())
        self._carried.clear()
        self._claimed.clear()

    def _match(self, claimed: Request, claim: Claim, carried: Request) -> None:
        """Give the carried request its reader; the claim has served."""
        client, worker = claimed.client, carried.worker
        if client is None or worker is None:
            return
        self.matched += 1
        claimed.state = advance(claimed.state, RequestEvent.MATCHED)
        carried.state = advance(carried.state, RequestEvent.MATCHED)
        del self._claimed[carried.key], self._carried[carried.key]
        self._endings.adopt(carried, client)
        line = CreditLine(
            request=claim.request, attempt=claim.attempt, next=claim.next, window=claimed.window, again=True
        )
        grant = Grant(client=client.number, instance=client.instance, lines=[line])
        self._outbox.send(worker.routing_id, codec.pack(grant))


def _lost() -> ConnectionLostError:
    return ConnectionLostError("the connection was lost, and no worker has the request any more")
