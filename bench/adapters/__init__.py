"""Clients, one a protocol, behind one small interface. Each runs in its peer's own virtual environment, so it imports
nothing of the suite but this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: Called with the number of tokens that have just come.
Arrived = Callable[[int], None]


class Adapter(Protocol):
    """A client of one system, used as its users would."""

    async def open(self, target: str) -> None:
        """Connect."""

    async def ask(self, prompt: str, tokens: int, arrived: Arrived) -> None:
        """One streamed answer of so many tokens, every one decoded. Raises whatever the client library does."""

    async def close(self) -> None:
        """Disconnect."""
