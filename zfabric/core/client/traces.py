"""Traces of requests as a client's machine and whoever makes spans know them."""

from __future__ import annotations

from typing import Protocol

from zfabric.core.client.pending import Trace
from zfabric.errors import FabricError
from zfabric.wire.answers import Outcome
from zfabric.wire.traces import TraceContext


class NamedTrace(Trace, Protocol):
    """A trace that wants to know what its request is called in logs, once it was accepted."""

    def submitted(self, request_id: str) -> None: ...


class PassedOn(Trace):
    """A trace that is told nothing here, and goes on at the worker."""

    __slots__ = ("_context",)

    def __init__(self, context: TraceContext) -> None:
        self._context = context

    @property
    def context(self) -> TraceContext:
        return self._context

    def submitted(self, request_id: str) -> None:
        """Nothing is noted."""

    def began(self, worker: str) -> None:
        """Nothing is noted."""

    def choice_ended(self, index: int, reason: str) -> None:
        """Nothing is noted."""

    def failed_over(self, attempt: int, error: FabricError) -> None:
        """Nothing is noted."""

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """Nothing is noted."""
