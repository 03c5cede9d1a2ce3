"""Questions that clients ask of the controller, and the few that change something."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zfabric.core.controller import listings, settings, status, steering
from zfabric.core.controller.batches import batches
from zfabric.core.controller.explaining import explain
from zfabric.core.controller.peers import ClientPeer
from zfabric.errors import FabricError, TooLargeError
from zfabric.limits import CONTROL_BODY_BYTES_MAX, FRAME_BYTES_GOAL, HEADER_BYTES_MAX
from zfabric.wire import codec
from zfabric.wire.messages import Beat
from zfabric.wire.questions import Answer, Query
from zfabric.wire.steering import Setting

if TYPE_CHECKING:
    from zfabric.core.controller.broker import Broker

Arguments = dict[str, Any]
#: What an answer holds besides its result.
_ROOM: Final = min(FRAME_BYTES_GOAL, CONTROL_BODY_BYTES_MAX) - HEADER_BYTES_MAX
#: What a list takes besides what is in it.
_LIST_BYTES: Final = 5


def answer(broker: Broker, client: ClientPeer, query: Query) -> None:
    """Answer a query: in several parts where a list is too long for one, or with an error. It never stays unanswered."""
    try:
        parts = _parts(_ask(broker, client, query))
    except FabricError as error:
        failed = Answer(number=query.number, code=error.code, message=codec.told(error), details=error.details)
        broker.outbox.send(client.routing_id, codec.pack(failed))
        return
    for position, part in enumerate(parts, start=1):
        result = Answer(number=query.number, code=0, result=part, more=position < len(parts))
        broker.outbox.send(client.routing_id, codec.pack(result))


def _ask(broker: Broker, client: ClientPeer, query: Query) -> object:
    listing = _LISTINGS.get(query.what)
    if listing is not None:
        return listing(broker, client, query.arguments)
    change = _CHANGES.get(query.what)
    if change is None:
        return status.answer(broker, query.what, query.arguments)
    client.grant.check_operator(query.what)
    return change(broker, steering.who(client), query.arguments)


def _parts(result: object) -> list[msgspec.Raw]:
    """A result as one or more encoded ones, each of which its receiver takes.

    Raises:
        TooLargeError: A row of it, or all of it where it has no rows, is larger than that.
    """
    if not isinstance(result, list):
        return [_fitting(codec.raw(result))]
    rows = [_fitting(codec.raw(row)) for row in result]
    return [codec.raw(batch) for batch in batches(rows, _size, _ROOM - _LIST_BYTES)] or [codec.raw([])]


def _size(encoded: msgspec.Raw) -> int:
    return len(memoryview(encoded))


def _fitting(encoded: msgspec.Raw) -> msgspec.Raw:
    size, limit = _size(encoded), _ROOM - _LIST_BYTES
    if size > limit:
        raise TooLargeError(f"the answer holds {size} bytes, limit is {limit}", size=size, limit=limit)
    return encoded


def _refresh(broker: Broker, by: str, arguments: Arguments) -> list[str]:
    """Have every worker report now; one whose connection is gone is found out by the attempt. Nothing is forgotten
    meanwhile. Returns their names."""
    for worker in broker.registry.workers.values():
        broker.outbox.send(worker.routing_id, codec.pack(Beat(0)))
    return sorted(broker.registry.workers)


def _config(broker: Broker, by: str, arguments: Arguments) -> list[Setting]:
    """All settings."""
    return settings.shown(broker)


def _set_config(broker: Broker, by: str, arguments: Arguments) -> Setting:
    """Change one setting. Returns how it is now."""
    return settings.change(broker, status.name_of(arguments, "name"), arguments.get("value"), by)


def _release(broker: Broker, client: ClientPeer, arguments: Arguments) -> bool:
    """Forget where requests of a key went. Returns whether that was known."""
    return broker.scheduler.affinities.release(status.name_of(arguments, "affinity"), client.grant.allows_model)


#: What is told to each client as far as it concerns it, and to an operator whole; and what each may have forgotten.
_LISTINGS: Final[dict[str, Callable[[Broker, ClientPeer, Arguments], object]]] = {
    "requests": listings.requests,
    "clients": listings.clients,
    "queue": listings.queue,
    "explain": explain,
    "release": _release,
}
#: What only an operator may ask, and is told in the journal where it changes something.
_CHANGES: Final[dict[str, Callable[[Broker, str, Arguments], object]]] = {
    "refresh": _refresh,
    "drain": steering.drain,
    "undrain": steering.undrain,
    "pause": steering.pause,
    "resume": steering.resume,
    "cancel": steering.cancel,
    "kick": steering.kick,
    "config": _config,
    "set_config": _set_config,
}
