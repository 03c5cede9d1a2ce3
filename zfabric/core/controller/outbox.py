"""Messages that a core wants sent, in order, none larger than its receiver takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from zfabric.core.controller.batches import batches
from zfabric.core.controller.peers import ClientPeer
from zfabric.errors import FabricError
from zfabric.ids import RoutingId
from zfabric.wire import codec
from zfabric.wire.answers import Outcome
from zfabric.wire.chunks import EndsBody
from zfabric.wire.messages import End, Ends

#: To whom, header, body.
Send = tuple[RoutingId, bytes, bytes]
#: An upper bound of what an `End` takes.
_END_BYTES: Final = 32


class Notice(NamedTuple):
    """A terminal of the controller's own."""

    request: int
    attempt: int
    error: FabricError


class Outbox:
    """Collects sends until the driver takes them."""

    __slots__ = ("pending",)

    def __init__(self) -> None:
        self.pending: list[Send] = []

    def send(self, to: RoutingId, frames: codec.Frames) -> None:
        self.pending.append((to, frames[0], frames[1]))

    def end(self, client: ClientPeer, request: int, attempt: int, error: FabricError) -> None:
        """A terminal of the controller's own. A client that is away does not hear it, and asks when it is back."""
        self.end_all(client, [Notice(request, attempt, error)])

    def end_all(self, client: ClientPeer, notices: Sequence[Notice]) -> None:
        """Terminals of the controller's own, in as few messages as they fit."""
        if client.away:
            return
        # Many requests usually end for one reason, which is looked at once.
        outcomes: dict[int, tuple[Outcome, int]] = {}
        for notice in notices:
            error = notice.error
            if id(error) not in outcomes:
                outcome = Outcome(message=codec.told(error), details=error.details)
                outcomes[id(error)] = outcome, len(codec.encode(outcome)) + _END_BYTES
        for batch in batches(notices, lambda notice: outcomes[id(notice.error)][1]):
            ends = [End(request=notice.request, attempt=notice.attempt, code=notice.error.code) for notice in batch]
            body = EndsBody(outcomes=[outcomes[id(notice.error)][0] for notice in batch])
            envelope = Ends(instance=client.instance, ends=ends)
            self.send(client.routing_id, (codec.pack_envelope(envelope), codec.encode(body)))

    def take(self) -> list[Send]:
        """All sends since the last call."""
        taken, self.pending = self.pending, []
        return taken
