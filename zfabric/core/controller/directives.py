"""What operators have ordered and have not taken back. It holds whoever comes and goes, as long as the controller runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zfabric.errors import QuotaExceededError
from zfabric.limits import DIRECTIVES_MAX


class Pause(NamedTuple):
    """A model's requests wait.

    Attributes:
        by: Who wants that.
        until_ns: When what waits is given up, and nothing new is taken.
    """

    by: str
    until_ns: int


class Kick(NamedTuple):
    """A client gets no session.

    Attributes:
        by: Who wants that.
        until_ns: When it may come back.
    """

    by: str
    until_ns: int


@dataclass(slots=True)
class Directives:
    """All of them.

    Attributes:
        paused: Models that are dispatched to nobody, by their own name.
        held: Workers that get nothing new, by name, and who wants that.
        speeds: Speeds that count instead of what workers announce, by the worker's name.
        weights: Requests of a model that go in one turn of it, by its own name; 1 where none is set.
        kicked: Clients that get no session, by instance.
        scaled: Models that have a rule for their replicas, by their own name, and for how many nanoseconds requests wait while
            none is there.
        changes: Who was the last to change a setting, by its name.
    """

    paused: dict[str, Pause] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    kicked: dict[int, Kick] = field(default_factory=dict)
    scaled: dict[str, int] = field(default_factory=dict)
    changes: dict[str, str] = field(default_factory=dict)


def check_room(held: dict[Any, Any], name: object) -> None:
    """Raises: QuotaExceededError, there are as many such orders as may be."""
    if len(held) >= DIRECTIVES_MAX and name not in held:
        raise QuotaExceededError(f"{len(held)} such orders hold, limit is {DIRECTIVES_MAX}")
