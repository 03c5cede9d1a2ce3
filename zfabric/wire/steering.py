"""What an operator changes, and what it is told of it: results of QUERY."""

from __future__ import annotations

from msgspec import Struct


class Setting(Struct, kw_only=True):
    """One setting of a running controller.

    Attributes:
        name: Its name; "speed." and a worker's name for that worker's speed.
        value: What it is now.
        default: What it is unless somebody sets it.
        changeable: Whether it can be changed while the controller runs.
        why: From when on a change holds, or why there can be none.
        changed_by: The operator who was the last to change it since the controller's start; "" if nobody did.
    """

    name: str
    value: int | float | str
    default: int | float | str
    changeable: bool
    why: str
    changed_by: str = ""


class Stopped(Struct, kw_only=True):
    """Whose requests an operator has ended.

    Attributes:
        client: Label of the client, or the number of its session.
        number: Number of its session.
        requests: Names of the requests that were ended.
    """

    client: str
    number: int
    requests: list[str]
