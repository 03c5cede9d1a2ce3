"""The life of one attempt of a request at the controller, as a table.

Rule 1: every change of state goes through `TRANSITIONS`; a pair that is not in it is a bug in the broker, and raises.
Rule 2: this file knows no clock and no peer.
Rule 3: the client gets its terminal on entering a state of `TERMINAL_GIVEN`, and never twice.

RECOVERED and CLAIMED are halves of a request whose other half may come back: a worker has announced it and its reader has
not claimed it yet, or the other way round. FINISHED means that its worker keeps the whole answer for a reader that was
away when it ended. ORPHANED means that nobody waits for the answer any more, but the worker's slot is still held until
the worker says that it stopped: load is a set of live requests, never a counter.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class RequestState(IntEnum):
    """Where an attempt stands."""

    QUEUED = 1
    RUNNING = 2
    CANCELLING = 3
    ORPHANED = 4
    RECOVERED = 5
    CLAIMED = 6
    DONE = 7
    FINISHED = 8


class RequestEvent(IntEnum):
    """What can happen to an attempt."""

    DISPATCHED = 1
    CANCELLED = 2
    DEADLINE = 3
    ENDED = 4
    WORKER_LOST = 5
    CLIENT_LOST = 6
    MATCHED = 7
    GAVE_UP = 8
    UNREAD = 9


S, E = RequestState, RequestEvent

TRANSITIONS: Final[dict[RequestState, dict[RequestEvent, RequestState]]] = {
    S.QUEUED: {
        E.DISPATCHED: S.RUNNING,
        E.CANCELLED: S.DONE,
        E.DEADLINE: S.DONE,
        E.CLIENT_LOST: S.DONE,
        E.GAVE_UP: S.DONE,
    },
    S.RUNNING: {
        E.CANCELLED: S.CANCELLING,
        E.DEADLINE: S.ORPHANED,
        E.ENDED: S.DONE,
        E.WORKER_LOST: S.DONE,
        E.CLIENT_LOST: S.ORPHANED,
        E.GAVE_UP: S.ORPHANED,
        E.UNREAD: S.FINISHED,
    },
    S.FINISHED: {
        E.CANCELLED: S.CANCELLING,
        E.DEADLINE: S.ORPHANED,
        E.ENDED: S.DONE,
        E.WORKER_LOST: S.DONE,
        E.CLIENT_LOST: S.ORPHANED,
        E.GAVE_UP: S.ORPHANED,
        E.UNREAD: S.FINISHED,
    },
    S.CANCELLING: {
        E.CANCELLED: S.CANCELLING,
        E.DEADLINE: S.ORPHANED,
        E.ENDED: S.DONE,
        E.WORKER_LOST: S.DONE,
        E.CLIENT_LOST: S.ORPHANED,
        E.GAVE_UP: S.ORPHANED,
    },
    S.ORPHANED: {E.ENDED: S.DONE, E.WORKER_LOST: S.DONE},
    S.RECOVERED: {
        E.MATCHED: S.RUNNING,
        E.ENDED: S.DONE,
        E.WORKER_LOST: S.DONE,
        E.GAVE_UP: S.ORPHANED,
    },
    S.CLAIMED: {
        E.MATCHED: S.RUNNING,
        E.CANCELLED: S.DONE,
        E.DEADLINE: S.DONE,
        E.CLIENT_LOST: S.DONE,
        E.GAVE_UP: S.DONE,
    },
    S.DONE: {},
}

#: States in which the client has had its terminal, or is gone.
TERMINAL_GIVEN: Final = frozenset({S.ORPHANED, S.DONE})

#: States in which the attempt is in a worker's hands.
AT_WORKER: Final = frozenset({S.RUNNING, S.FINISHED, S.CANCELLING, S.ORPHANED, S.RECOVERED})


def advance(state: RequestState, event: RequestEvent) -> RequestState:
    """The next state.

    Raises:
        AssertionError: The pair is not in the table.
    """
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise AssertionError(f"a request in {state.name} cannot have {event.name}")
    return following
