"""What every reader of an answer can say of it, whichever way it waits."""

from __future__ import annotations

from zfabric.client.mailbox import Mailbox
from zfabric.core.pending import Pending
from zfabric.wire.payloads import FinishReason, Usage


class Reading:
    """One request's answer as far as it was read.

    Attributes:
        model: As asked for.
    """

    def __init__(self, model: str, mailbox: Mailbox) -> None:
        self.model = model
        self._box = mailbox
        self._pending: Pending | None = None

    @property
    def request_id(self) -> str:
        """Name of the request, as in logs."""
        return f"{self._pending.number:x}" if self._pending is not None else ""

    @property
    def worker(self) -> str | None:
        """Who serves it; known from the first delta on, and new after a failover."""
        return self._box.worker

    @property
    def usage(self) -> Usage | None:
        """Exact counts, once the answer is whole."""
        return self._box.usage

    @property
    def text(self) -> str:
        """Text of the first choice so far."""
        choice = self._box.choices.get(0)
        return choice.text if choice is not None else ""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended, once it was read to its end."""
        choice = self._box.choices.get(0)
        return choice.finish_reason if choice is not None else None
