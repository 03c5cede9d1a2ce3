"""What a machine collects for others, such as spans and what a recording keeps, on its way to whoever takes it."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, Protocol


class Source(Protocol):
    """Collects until somebody takes it."""

    @property
    def pending(self) -> Sized:
        """What is there."""

    def take(self) -> Any:
        """All of it, once."""


class Outlets:
    """Passes on what was collected, when its driver says that a turn is over. Without sources that is nothing.

    Args:
        failed: Told of what a taker raises: whoever reads what others do must not cost anybody an answer.

    Example:
        >>> outlets.add(broker.trace(), exporter)
        >>> outlets.pass_on()
    """

    __slots__ = ("_failed", "_ways")

    def __init__(self, failed: Callable[[Exception], object]) -> None:
        self._failed = failed
        self._ways: list[tuple[Source, Callable[[Any], object]]] = []

    def add(self, source: Source, take: Callable[[Any], object]) -> None:
        """Hand what a source has to a taker from now on."""
        self._ways.append((source, take))

    def pass_on(self) -> None:
        """Hand on what there is."""
        for source, take in self._ways:
            if source.pending:
                try:
                    take(source.take())
                except Exception as error:  # noqa: BLE001 — as above
                    self._failed(error)
