"""How a promise is asked for: of whom, with which answers, and what is said where it is broken."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from zfabric.client.aio import AsyncClient
    from zfabric.client.results import Completion
    from zfabric.wire.status import ModelStatus

#: Tokens of most answers that are asked for: enough to see an order, few enough for a slow engine.
TOKENS: Final = 12


class BrokenPromise(Exception):  # noqa: N818 — what it is called in a report
    """What was seen instead."""


class NotAsked(Exception):  # noqa: N818 — as above
    """Why a promise cannot be asked of this model."""


@dataclass(slots=True)
class Asked:
    """Who is asked.

    Attributes:
        client: Of the fabric that serves it.
        status: The model, as it is announced.
        prompt: A text that it can go on from.
    """

    client: AsyncClient
    status: ModelStatus
    prompt: str

    @property
    def model(self) -> str:
        """The model's name."""
        return self.status.name

    def takes(self, parameter: str) -> bool:
        """Whether a parameter is honoured, as far as is known."""
        return self.status.parameters is None or parameter in self.status.parameters

    def same(self, **options: Any) -> dict[str, Any]:
        """Options of an answer that comes out the same again, where the model has such."""
        drawn: dict[str, Any] = {"temperature": 0} if self.takes("temperature") else {}
        if self.takes("ignore_eos"):
            drawn["ignore_eos"] = True
        return {"max_new_tokens": TOKENS, **drawn, **options}

    async def answer(self, prompt: str | None = None, **options: Any) -> Completion:
        """An answer to the prompt, or to another."""
        return await self.client.generate(self.model, prompt or self.prompt, **self.same(**options))


@dataclass(frozen=True, slots=True)
class Promise:
    """Something that is owed.

    Attributes:
        sentence: What.
        ask: Asks for it. Raises: BrokenPromise, or whatever a call raised.
        capability: Whom it is asked of: all models where that is empty.
        parameters: Parameters that have to be honoured for it.
    """

    sentence: str
    ask: Callable[[Asked], Awaitable[None]]
    capability: str = ""
    parameters: tuple[str, ...] = ()

    def lacks(self, status: ModelStatus) -> str:
        """What the model does not announce and the promise needs; empty for nothing."""
        if self.capability and self.capability not in status.capabilities:
            return repr(self.capability)
        missing = [name for name in self.parameters if status.parameters is not None and name not in status.parameters]
        return ", ".join(map(repr, missing))


def expect(truth: object, seen: str) -> None:
    """Raises: BrokenPromise, unless something is true."""
    if not truth:
        raise BrokenPromise(seen)
