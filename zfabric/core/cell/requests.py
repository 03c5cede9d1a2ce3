"""The parent's requests at a cell, as the cell's own controller runs them.

A cell neither opens bodies nor keeps answers: what the parent sends is a SUBMIT of a client that has no connection, and what
comes of it goes up as it is, with the number of the client's session changed. So credit, cancels, deadlines, seeds and failover
are those of the parent's client, and a token costs the cell no more than one of its own clients'.

Rule 1: the parent frees a slot by a terminal, so each attempt that it has sent gets one, from its worker or from here.
Rule 2: what has ended is known for FINISHED_MS: a client that has lost its connection to the parent meanwhile asks for it again,
        and the worker has kept it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, cast

from zfabric.core.cell.clients import RemoteClient, RemoteClients
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.figures import Outcome
from zfabric.core.controller.outbox import Send
from zfabric.core.controller.peers import Key, Request, WorkerPeer, WorkerState
from zfabric.core.controller.request_state import RequestState
from zfabric.core.worker.soundness import outcome_of
from zfabric.errors import FAILOVER_CODES, FabricError, RequestCancelledError, RequestError, WorkerLostError
from zfabric.ids import RoutingId, milliseconds
from zfabric.limits import FINISHED_MS, LIST_LENGTH_MAX
from zfabric.wire import codec, kinds
from zfabric.wire.chunks import EndsBody
from zfabric.wire.flow import Abort, Credit, CreditLine, Grant
from zfabric.wire.load import StreamUnits
from zfabric.wire.messages import Carried, Claim, Dispatch, End, Ends, Submit

#: What a returning parent may find running, waiting or finished.
_LIVING: Final = frozenset({RequestState.QUEUED, RequestState.RUNNING, RequestState.FINISHED})
#: Details of a loss that are about this controller's workers alone: its parent has others.
_OWN: Final = ("claim_ms", "resumable")


# Names of their own: chunks are many.
_ROUTE_BYTES: Final = codec.ROUTE_BYTES
_EMPTY: Final = codec.EMPTY


class _Kept(NamedTuple):
    """An answer that a worker may still have."""

    worker: WorkerPeer
    lock: bytes
    until_ns: int


class CellRequests:
    """Requests of the parent's clients.

    Args:
        broker: This controller's; this is told what becomes of its requests from now on.
        cell: The cell's name.
        send: Takes a message to the parent.
    """

    def __init__(self, broker: Broker, cell: str, send: Callable[[codec.Frames], None]) -> None:
        self._broker = broker
        self._cell = cell
        self._send = send
        self.remote = RemoteClients(broker, cell)
        #: Where chunks for clients of the parent come from: all that have no connection here are its.
        self._routes = cast("dict[bytes, tuple[RemoteClient, WorkerPeer]]", broker.routes.remote)
        #: Attempts that the parent waits for, and whether each holds a slot.
        self.owed: dict[Key, bool] = {}
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._retired: list[Key] = []
        broker.scheduler.observer.remote = self

    @property
    def held(self) -> int:
        """Attempts that hold a slot of this cell, as the parent counts."""
        return sum(self.owed.values())

    @property
    def waiting(self) -> int:
        """Those of them that no worker has. Costs O(requests of the parent)."""
        return sum(
            request.state is RequestState.QUEUED
            for client in self.remote.clients.values()
            for request in client.requests.values()
        )

    # ── from the parent ─────────────────────────────────────────────────────────────────────────────────────────────

    def dispatched(self, envelope: Dispatch, body: bytes, now_ns: int) -> None:
        """Take a request. An attempt runs once, however often it comes."""
        key = (envelope.instance, envelope.request, envelope.attempt)
        if key in self.owed:
            return
        self.owed[key] = envelope.operation != "operate"
        broker = self._broker
        broker.timers.now_ns = now_ns
        try:
            client = self.remote.at(envelope.instance, envelope.client, envelope.lock)
            worker = envelope.worker or (self._only_worker() if envelope.operation == "operate" else "")
        except FabricError as error:
            self.tell(key, error)
            return
        submit = Submit(
            request=envelope.request,
            attempt=envelope.attempt,
            operation=envelope.operation,
            model=envelope.model,
            priority=envelope.priority,
            deadline_ms=envelope.deadline_ms,
            window=envelope.window,
            resume_from=envelope.resume_from,
            worker=worker,
            traceparent=envelope.traceparent,
            tracestate=envelope.tracestate,
            affinity=envelope.affinity,
            prefix=envelope.prefix,
            prefix_block=envelope.prefix_block,
        )
        try:
            broker.submit(client, submit, body, now_ns)
        except FabricError as error:
            self.tell(key, error)
        broker.settle()

    def _only_worker(self) -> str:
        """Who gets an operator's call that names nobody. Raises: RequestError: There are several workers, or none."""
        names = list(self._broker.registry.workers)
        if len(names) != 1:
            raise RequestError(
                f"{self._cell!r} is a cell of {len(names)} workers, name one of them as {self._cell}/WORKER",
                parameter="worker",
            )
        return names[0]

    def granted(self, grant: Grant, now_ns: int) -> None:
        """Pass credit on, and have what has lost its reader sent again."""
        self._broker.timers.now_ns = now_ns
        client = self.remote.clients.get(grant.instance)
        plain = [line for line in grant.lines if not line.again]
        if client is not None and plain:
            self._broker.scheduler.endings.credit(client, Credit(plain))
        again = [line for line in grant.lines if line.again]
        if again:
            self._read_again(grant, again)
        self._broker.settle()

    def _read_again(self, grant: Grant, lines: Iterable[CreditLine]) -> None:
        """A reader has come another way."""
        claims: list[Claim] = []
        for line in lines:
            key = (grant.instance, line.request, line.attempt)
            client = self.remote.clients.get(grant.instance)
            request = client.requests.get(line.request) if client is not None else None
            kept = self._kept.pop(key, None)
            known = request is not None and request.attempt == line.attempt
            try:
                if client is None and kept is None:
                    raise self._gone()
                lock = kept.lock if kept is not None else client.lock if client is not None else b""
                client = self.remote.at(grant.instance, grant.client, lock)
                if not known:
                    self._revive(client, key, kept, line)
            except FabricError as error:
                self.owed.setdefault(key, False)
                self.tell(key, error)
                continue
            self.owed.setdefault(key, True)
            if known:
                claims.append(Claim(request=line.request, attempt=line.attempt, next=line.next, window=line.window))
        client = self.remote.clients.get(grant.instance)
        if client is not None and claims:
            self._broker.recovery.claim(client, claims)

    def _revive(self, client: RemoteClient, key: Key, kept: _Kept | None, line: CreditLine) -> None:
        """Have a worker say an answer again that has ended. Raises: WorkerLostError: None has it any more."""
        if kept is None or kept.worker.state is WorkerState.GONE or client.lock != kept.lock:
            raise self._gone()
        if key in self._broker.registry.live:
            raise self._gone()
        endings = self._broker.scheduler.endings
        request = Request(
            None, instance=key[0], request=key[1], attempt=key[2], operation="generate", state=RequestState.FINISHED
        )
        request.lock, request.window = kept.lock, line.window
        endings.place(request, kept.worker, None, finished=True)
        endings.read(request, client)
        endings.grant(kept.worker, client, [line])

    def aborted(self, abort: Abort, now_ns: int) -> None:
        """Stop what the parent does not want. Each gets its terminal, also where nothing runs."""
        self._broker.timers.now_ns = now_ns
        client = self.remote.clients.get(abort.instance)
        stopped: list[int] = []
        for number, attempt in abort.attempts:
            key = (abort.instance, number, attempt)
            self._kept.pop(key, None)
            request = client.requests.get(number) if client is not None else None
            self.owed.setdefault(key, False)
            if request is not None and request.attempt == attempt:
                stopped.append(number)
            elif key not in self._broker.registry.live:
                self.tell(key, RequestCancelledError("cancelled"))
        if client is not None and stopped:
            self._broker.scheduler.endings.cancel(client, stopped)
        self._broker.settle()

    # ── to the parent ───────────────────────────────────────────────────────────────────────────────────────────────

    def relay(self, sender: RoutingId, header: bytes, now_ns: int) -> bool:
        """Send chunks up, if they are for a client of the parent's. Returns whether they were."""
        route = self._routes.get(sender + header[:_ROUTE_BYTES])
        if route is None:
            return False
        client, worker = route
        worker.heard_ns = now_ns
        self._send((client.above + header[_ROUTE_BYTES:], _EMPTY))
        return True

    def sift(self, sends: list[Send]) -> list[Send]:
        """Send up what is for clients of the parent. Returns the rest."""
        if not self.remote.by_route:
            return sends
        rest: list[Send] = []
        for send in sends:
            client = self.remote.by_route.get(send[0])
            if client is None:
                rest.append(send)
            elif send[1][0] == kinds.ENDS:
                self._ends(client, send[1], send[2])
        return rest

    def _ends(self, client: RemoteClient, header: bytes, body: bytes) -> None:
        """Terminals, and chunks of the same step."""
        envelope: Ends = codec.unpack_envelope(header)
        if not envelope.client:
            body = self._own(envelope, body)
        for end in envelope.ends:
            self.owed.pop((envelope.instance, end.request, end.attempt), None)
        self.remote.rests(client.instance)
        envelope.client = int.from_bytes(client.above[1:], "big")
        self._send((codec.pack_envelope(envelope), body))

    def _own(self, envelope: Ends, body: bytes) -> bytes:
        """Terminals of this controller's own, without what they say of its workers alone."""
        if not any(end.code in FAILOVER_CODES for end in envelope.ends):
            return body
        content: EndsBody = codec.unpack_ends_body(body)
        for outcome in content.outcomes:
            outcome.details = {name: value for name, value in outcome.details.items() if name not in _OWN}
        return codec.encode(content)

    def tell(self, key: Key, error: FabricError) -> None:
        """A terminal for which no worker stands."""
        self.remote.rests(key[0])
        if self.owed.pop(key, None) is None:
            return
        code, outcome = outcome_of(error)
        envelope = Ends(instance=key[0], ends=[End(request=key[1], attempt=key[2], code=code)])
        self._send((codec.pack_envelope(envelope), codec.encode(EndsBody(outcomes=[outcome]))))

    def tell_all(self, error: FabricError) -> None:
        """The cell leaves: hand all back."""
        for key in list(self.owed):
            self.tell(key, error)

    def settle(self) -> None:
        """What has ended without a terminal to its reader gets one for the parent, which counts its slot."""
        retired, self._retired = self._retired, []
        for key in retired:
            self.remote.rests(key[0])
            client = self.remote.clients.get(key[0])
            request = client.requests.get(key[1]) if client is not None else None
            back = request is not None and request.attempt == key[2]
            if not back and key not in self._broker.registry.live:
                self.tell(key, RequestCancelledError("cancelled"))

    # ── from the broker ─────────────────────────────────────────────────────────────────────────────────────────────

    def ended(self, request: Request, outcome: Outcome, now_ns: int) -> None:
        """An attempt has its terminal; if its worker gave it, that has the answer for a while."""
        worker, client = request.worker, request.client
        if client is None or not client.remote or worker is None or worker.state is WorkerState.GONE:
            return
        if outcome not in ("completed", "failed"):
            return
        self._kept[request.key] = _Kept(worker, request.lock, now_ns + milliseconds(FINISHED_MS))
        if len(self._kept) > LIST_LENGTH_MAX:
            self._kept.popitem(last=False)

    def retired(self, request: Request) -> None:
        """Nothing is left of an attempt here."""
        if request.key in self.owed or request.instance in self.remote.clients:
            self._retired.append(request.key)

    # ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────────

    def parent_lost(self) -> None:
        """There is no session: what runs goes on, until the next one says who reads."""
        self.remote.all_away()
        self.owed.clear()

    def sweep(self, now_ns: int) -> None:
        """Forget what has been of no use for long enough."""
        while self._kept and next(iter(self._kept.values())).until_ns <= now_ns:
            self._kept.popitem(last=False)
        self.remote.sweep()

    def carried(self) -> list[Carried]:
        """All that the parent's clients have here, which the parent waits for from now on. Costs O(requests of the parent)."""
        found = []
        for request in self._requests():
            self.owed.setdefault(request.key, request.operation != "operate")
            found.append(
                Carried(
                    instance=request.instance,
                    request=request.request,
                    attempt=request.attempt,
                    operation=request.operation,
                    model=request.model.name if request.model is not None else "",
                    finished=request.state is RequestState.FINISHED,
                    lock=request.lock,
                )
            )
        return found

    def units_made(self, most: int) -> list[StreamUnits]:
        """How far running attempts are, as far as their readers have said."""
        return [
            StreamUnits(instance=it.instance, request=it.request, attempt=it.attempt, units=it.units)
            for it, _ in zip(self._requests(), range(most), strict=False)
        ]

    def _requests(self) -> Iterable[Request]:
        for client in self.remote.clients.values():
            for request in client.requests.values():
                if request.state in _LIVING:
                    yield request

    def _gone(self) -> WorkerLostError:
        return WorkerLostError(f"cell {self._cell!r} no longer has the answer", worker=self._cell)
