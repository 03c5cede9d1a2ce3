"""Which model a name stands for.

A name is first of all the model that is called so, while anybody hosts it; then the hosted model that has it as an alias,
and of several the one that announced it last; then, for a while, the model that had it. A model keeps its place among the
holders of an alias as long as it is remembered, so that a worker which comes back does not take an alias back that had
moved on while it served.

`find` and each change cost O(log n) in the models that share a name.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from zfabric.core.controller.ranking import Ranking

M = TypeVar("M", bound=Hashable)


class Names(Generic[M]):
    """Names and the models that they may stand for."""

    __slots__ = ("_holders",)

    def __init__(self) -> None:
        self._holders: dict[str, Ranking[M]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def find(self, name: str) -> M | None:
        """The model that a name stands for now."""
        holders = self._holders.get(name)
        return holders.first() if holders is not None else None

    def put(self, name: str, model: M, *, held: bool, order: int = 0) -> None:
        """Let a name stand for a model.

        Args:
            held: Somebody serves it under this name now. Otherwise it comes after all for which that is so.
            order: When it was announced as an alias, as a number that grows; 0 where it is the model's own name.
        """
        holders = self._holders.get(name)
        if holders is None:
            holders = self._holders[name] = Ranking()
        holders.put(model, (not held, bool(order), -order))

    def discard(self, name: str, model: M) -> None:
        """A model has this name no more."""
        holders = self._holders.get(name)
        if holders is not None:
            holders.discard(model)
            if not holders:
                del self._holders[name]
