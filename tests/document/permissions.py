"""Who may do what, as the checks of the code have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.document.markdown import table
from zfabric.core.controller import queries
from zfabric.core.controller.access import EVERYBODY, Grant, Role
from zfabric.errors import PermissionDeniedError


def _submits(grant: Grant) -> None:
    grant.check_asks()
    grant.check_request(0, 1)


#: What can be done, and the check that it passes.
_ACTS: Final[dict[str, Callable[[Grant], object]]] = {
    "begin a client's session: ask for models, workers, status and queue lengths": lambda grant: grant.check_asks(),
    "submit, claim, cancel and credit requests of its own": _submits,
    "begin a worker's session: announce models, run requests, end them": lambda grant: grant.check_worker("w"),
    "call one worker by its name (`operate`)": lambda grant: grant.check_operator("a call"),
}


def _may(check: Callable[[Grant], object], grant: Grant) -> str:
    try:
        check(grant)
    except PermissionDeniedError:
        return "no"
    return "yes"


def permissions_table() -> str:
    """Acts by role."""
    grants = [Grant("key", frozenset({role})) for role in Role] + [EVERYBODY]
    rows = [[what, *(_may(check, grant) for grant in grants)] for what, check in _ACTS.items()]
    listings = ", ".join(f"`{what}`" for what in sorted(queries._LISTINGS))
    sees = ["all" if grant.sees_all else "its own" if grant.is_client else "no" for grant in grants]
    rows.append([f"see the lists of {listings}", *sees])
    orders = ", ".join(f"`{what}`" for what in sorted(queries._CHANGES))
    rows.append([f"steer: {orders}", *(_may(lambda grant: grant.check_operator("an order"), it) for it in grants)])
    return table(["what", *(role.value for role in Role), "without keys, anybody"], rows)
