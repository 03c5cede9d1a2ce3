"""What operators change while a controller runs: who gets work, which models wait, what is stopped.

Each is one call that leaves the tables as all rules want them: what comes to wait is given a time to end, and what may go is
sent. Each is told in the journal with who wanted it. A name that nobody has is an error that says so; to order what holds
already, or to take back what does not, is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zfabric.core.controller.access import EVERYBODY
from zfabric.core.controller.directives import Kick, Pause, check_room
from zfabric.core.controller.hosting import Model
from zfabric.core.controller.peers import ClientPeer, WorkerPeer
from zfabric.core.controller.status import name_of, number_of
from zfabric.errors import (
    FabricError,
    NoWorkerError,
    RequestError,
    StoppedByOperatorError,
    UnknownModelError,
    UnsupportedOperationError,
)
from zfabric.ids import milliseconds
from zfabric.limits import DEADLINE_MAX_MS, KICK_MS, LISTED_DEFAULT, UNTAKEN_MS
from zfabric.wire import codec
from zfabric.wire.messages import Drain
from zfabric.wire.steering import Stopped

if TYPE_CHECKING:
    from zfabric.core.controller.broker import Broker

Arguments = dict[str, Any]


def who(client: ClientPeer) -> str:
    """What an operator is called: by its key, or where there are no keys by its label or number."""
    return client.grant.name if client.grant is not EVERYBODY else client.name


# ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def drain(broker: Broker, by: str, arguments: Arguments) -> str:
    """Have a worker get nothing new, and unless it is to stay, finish and leave. Returns its name."""
    worker = _worker(broker, arguments)
    limit_ms = number_of(arguments, "limit_ms", 0, 2**32 - 1)
    if arguments.get("stay"):
        held = broker.registry.directives.held
        check_room(held, worker.name)
        held[worker.name] = by
    else:
        worker.leaves_for = by
        broker.outbox.send(worker.routing_id, codec.pack(Drain(limit_ms)))
    broker.watch.judge(worker)
    return worker.name


def undrain(broker: Broker, by: str, arguments: Arguments) -> str:
    """Have a worker get work again that an operator has drained. Returns its name.

    Raises:
        UnsupportedOperationError: It leaves, and speaks a version in which it cannot be told to stay.
    """
    name = name_of(arguments, "worker")
    directives = broker.registry.directives
    held = directives.held.pop(name, None) is not None
    worker = broker.registry.workers.get(name)
    if worker is None:
        if not held:
            raise NoWorkerError(f"no worker is named {name!r}", worker=name)
        broker.journal.note("worker_undrained", worker=name, by=by)
        return name
    leaves = bool(worker.leaves_for) or worker.load.draining
    if leaves:
        if worker.minor < 1:
            if held:
                broker.journal.note("worker_undrained", worker=name, by=by)
            raise UnsupportedOperationError(
                f"worker {name!r} speaks version 2.{worker.minor}, in which a drain cannot be taken back", worker=name
            )
        worker.leaves_for = ""
        broker.outbox.send(worker.routing_id, codec.pack(Drain(0, withdrawn=True)))
    if held or leaves:
        broker.journal.note("worker_undrained", worker=name, by=by)
    broker.watch.judge(worker)
    broker.scheduler.fill(worker, broker.timers.now_ns)
    return name


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def pause(broker: Broker, by: str, arguments: Arguments) -> str:
    """Dispatch nothing of a model; what runs runs on. Requests wait for so long, and are refused then. Returns its name."""
    name = name_of(arguments, "model")
    wait_ms = number_of(arguments, "wait_ms", UNTAKEN_MS, DEADLINE_MAX_MS)
    model = broker.registry.find(name)
    if model is None:
        raise UnknownModelError(f"no worker serves a model named {name!r}", model=name)
    paused = broker.registry.directives.paused
    check_room(paused, model.name)
    paused[model.name] = Pause(by, broker.timers.now_ns + milliseconds(wait_ms))
    broker.journal.note("model_paused", model=model.name, by=by, wait_ms=wait_ms, queued=len(model.queue))
    _settle(broker, model)
    return model.name


def resume(broker: Broker, by: str, arguments: Arguments) -> str:
    """Dispatch a model's requests again. Returns its name."""
    name = name_of(arguments, "model")
    paused = broker.registry.directives.paused
    model = broker.registry.models.get(name) if name in paused else broker.registry.find(name)
    if model is None and name not in paused:
        raise UnknownModelError(f"no worker serves a model named {name!r}", model=name)
    own = model.name if model is not None else name
    if paused.pop(own, None) is not None:
        broker.journal.note("model_resumed", model=own, by=by, queued=len(model.queue) if model is not None else 0)
    if model is not None:
        _settle(broker, model)
    return own


def _settle(broker: Broker, model: Model) -> None:
    """What waits for a model is given another time to end, or goes to whoever has a slot free."""
    broker.scheduler.queues.review(model)
    broker.scheduler.adapters.asked(model.name)
    for host in list(model.hosts.values()):
        broker.scheduler.fill(host.worker, broker.timers.now_ns)


# ── requests and clients ────────────────────────────────────────────────────────────────────────────────────────────


def cancel(broker: Broker, by: str, arguments: Arguments) -> Stopped:
    """End a request, whatever attempt of it there is; its client is told who did.

    Raises:
        RequestError: No client waits for it, or several do for one of this name.
    """
    name, wanted = name_of(arguments, "request"), name_of(arguments, "client")
    try:
        number = int(name, 16)
    except ValueError:
        raise RequestError(
            f"{name!r} is no name of a request, which are hexadecimal numbers", parameter="request"
        ) from None
    found = [
        client.requests[number]
        for client in broker.registry.clients.values()
        if number in client.requests and wanted in ("", client.label, str(client.number))
    ]
    if not found:
        raise RequestError(f"no client waits for a request {name!r}", request=name)
    if len(found) > 1:
        told = ", ".join(str(request.client.number) for request in found if request.client is not None)
        raise RequestError(f"clients {told} have a request {name!r}, say of which it is", request=name)
    (request,) = found
    client = request.client
    assert client is not None
    broker.journal.note(
        "request_cancelled", request=f"{number:x}", client=client.name, by=by, state=request.state.name.lower()
    )
    broker.scheduler.endings.stop([request], _stopped(by))
    return Stopped(client=client.name, number=client.number, requests=[f"{number:x}"])


def kick(broker: Broker, by: str, arguments: Arguments) -> Stopped:
    """End all requests of a client and its session, and let it have none for some time.

    Raises:
        RequestError: No client has this label or number, or several have the label.
    """
    name = name_of(arguments, "client")
    refuse_ms = number_of(arguments, "refuse_ms", KICK_MS, DEADLINE_MAX_MS)
    found = [client for client in broker.registry.clients.values() if name in (client.label, str(client.number))]
    if not found:
        raise RequestError(f"no client has the label or number {name!r}", client=name)
    if len(found) > 1:
        numbers = ", ".join(str(client.number) for client in found[:LISTED_DEFAULT])
        raise RequestError(f"clients {numbers} have the label {name!r}, name one by its number", client=name)
    (client,) = found
    kicked = broker.registry.directives.kicked
    check_room(kicked, client.instance)
    stopped = [f"{number:x}" for number in client.requests][:LISTED_DEFAULT]
    broker.journal.note("client_kicked", client=client.name, by=by, in_flight=len(client.requests), refuse_ms=refuse_ms)
    broker.scheduler.endings.stop(list(client.requests.values()), _stopped(by))
    if refuse_ms:
        order = kicked[client.instance] = Kick(by, broker.timers.now_ns + milliseconds(refuse_ms))
        broker.timers.at(order.until_ns, lambda _: _let_in(broker, client.instance, order))
    broker.sessions.kick(client, by, refuse_ms)
    return Stopped(client=client.name, number=client.number, requests=stopped)


def _let_in(broker: Broker, instance: int, order: Kick) -> None:
    if broker.registry.directives.kicked.get(instance) is order:
        del broker.registry.directives.kicked[instance]


def _stopped(by: str) -> FabricError:
    # Not as if its client had cancelled it: a client that is told so takes it for what it left behind, and asks again.
    return StoppedByOperatorError(f"ended by operator {by!r}", by=by)


# ── arguments ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _worker(broker: Broker, arguments: Arguments) -> WorkerPeer:
    name = name_of(arguments, "worker")
    worker = broker.registry.workers.get(name)
    if worker is None:
        raise NoWorkerError(f"no worker is named {name!r}", worker=name)
    return worker
