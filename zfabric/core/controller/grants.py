"""Streams that go on at their workers, for readers that came another way."""

from __future__ import annotations

from zfabric.core.controller.endings import Endings
from zfabric.core.controller.peers import ClientPeer, Request, WorkerPeer
from zfabric.wire.flow import CreditLine


class Grants:
    """Streams that go on, to be told to their workers: one message for each worker and client."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int], tuple[WorkerPeer, ClientPeer, list[CreditLine]]] = {}

    def add(self, request: Request, next_unit: int) -> None:
        """A request that has its reader again, who has everything before a unit."""
        worker, client = request.worker, request.client
        assert worker is not None
        assert client is not None
        line = CreditLine(
            request=request.request, attempt=request.attempt, next=next_unit, window=request.window, again=True
        )
        self._lines.setdefault((worker.name, client.number), (worker, client, []))[2].append(line)

    def send(self, endings: Endings) -> None:
        """Tell them."""
        for worker, client, lines in self._lines.values():
            endings.grant(worker, client, lines)
