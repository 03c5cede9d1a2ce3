"""Deliberate faults in the library, each with what a checker has to say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Deliberate:
    """A fault in the library, and what is seen of it.

    Attributes:
        patch: Introduces it.
        seen: A regular expression for the message of the violation.
        faults: Kinds of faults that have to happen for it to matter; () for none, None for whatever a run draws.
        first: The first seed: what shows in one cluster of some hundred is looked for where it does.
        controllers: How many there are.
        fault_ms: How long requests and faults come: in a shorter time there are more of them at once.
    """

    patch: Patch
    seen: str
    faults: tuple[str, ...] | None
    first: int
    fault_ms: int
    controllers: int = 1


FAULTS: dict[str, Deliberate] = {}


def fault(
    seen: str, *faults: str, quiet: bool = False, first: int = 0, fault_ms: int = 12_000, controllers: int = 1
) -> Callable[[Patch], Patch]:
    """Enter a deliberate fault. Without kinds of faults a run draws its own, unless it is to be quiet."""

    def enter(patch: Patch) -> Patch:
        FAULTS[patch.__name__] = Deliberate(
            patch, seen, faults or (() if quiet else None), first, fault_ms, controllers
        )
        return patch

    return enter


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a function by what is made of it."""
    patch.setattr(owner, name, make(getattr(owner, name)))
