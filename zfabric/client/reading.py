"""What every reader of an answer can say of it, whichever way it waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zfabric.client import process, values
from zfabric.client.mailbox import Mailbox
from zfabric.client.results import Choice, Completion
from zfabric.core.client.pending import Pending
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
        self._home = process.here

    def _bind(self, make: Callable[[Mailbox], Pending]) -> None:
        """Submit. The request knows the mailbox, and not this object: that it is dropped has to be noticed."""
        self._pending = make(self._box)

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
    def extra(self) -> dict[str, Any]:
        """What the engine has told besides so far, by its own names, as `kv_transfer_params`."""
        return dict(self._box.extra)

    @property
    def choices(self) -> list[Choice]:
        """All n choices by index, each as far as it was read.

        Example:
            >>> stream = client.stream("echo", "a b", n=2, seed=1)
            >>> async for delta in stream:
            ...     print([choice.text for choice in stream.choices])
        """
        return list(self._box.choices)

    @property
    def text(self) -> str:
        """Text of the first choice so far."""
        return self._box.choices[0].text

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended, once it was read to its end."""
        return self._box.choices[0].finish_reason

    def _completion(self) -> Completion:
        """The whole answer. Raises: FabricError, as it ended."""
        return self._box.completion(self.request_id, self.model)

    def _choice(self, index: object) -> int:
        """The number of a choice. Raises: RequestError, ParameterRangeError."""
        number = values.whole("index", index)
        if not 0 <= number < len(self._box.choices):
            raise values.out_of_range("index", number, f"0 … {len(self._box.choices) - 1}")
        return number
