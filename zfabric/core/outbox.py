"""Messages that a core wants sent, in order."""

from __future__ import annotations

from collections.abc import Sequence

from zfabric.core.registry import ClientPeer
from zfabric.errors import FabricError
from zfabric.ids import RoutingId
from zfabric.wire import codec
from zfabric.wire.messages import End, Ends
from zfabric.wire.payloads import EndsBody, Outcome

#: To whom, header, body.
Send = tuple[RoutingId, bytes, bytes]


class Outbox:
    """Collects sends until the driver takes them."""

    __slots__ = ("pending",)

    def __init__(self) -> None:
        self.pending: list[Send] = []

    def send(self, to: RoutingId, frames: codec.Frames) -> None:
        self.pending.append((to, frames[0], frames[1]))

    def end(self, client: ClientPeer, request: int, attempt: int, error: FabricError) -> None:
        """A terminal of the controller's own."""
        self.send(client.routing_id, ends_of(client, [(request, attempt, error)]))

    def take(self) -> list[Send]:
        """All sends since the last call."""
        taken, self.pending = self.pending, []
        return taken


def ends_of(client: ClientPeer, lines: Sequence[tuple[int, int, FabricError]]) -> codec.Frames:
    """One ENDS with a terminal for each (request, attempt, error)."""
    ends = [End(request=request, attempt=attempt, code=error.code) for request, attempt, error in lines]
    outcomes = [Outcome(message=codec.told(error), details=error.details) for _, _, error in lines]
    envelope = Ends(instance=client.instance, ends=ends)
    return codec.pack_envelope(envelope), codec.encode(EndsBody(outcomes=outcomes))
