"""The life of one attempt of a request at the controller, as a table.

Rule 1: every change of state goes through `TRANSITIONS`; a pair that is not in it is a bug in the broker, and raises.
Rule 2: this file knows no clock and no peer.
Rule 3: the client gets its terminal on entering a state of `TERMINAL_GIVEN`, and never twice.

RECOVERED and CLAIMED are halves of a request whose other half may come back. An ORPHANED one still holds its worker's slot:
load is a set of live requests, never a counter.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class RequestState(IntEnum):
    """Where an attempt stands.

    Attributes:
        QUEUED: It waits for a worker.
        RUNNING: A worker has it.
        CANCELLING: Its client has cancelled it; the worker's terminal is still to come.
        ORPHANED: Nobody waits for it any more, but the worker's slot is held until the worker says that it has stopped.
        RECOVERED: A worker has announced it, and its client has not claimed it yet.
        CLAIMED: Its client has claimed it, and no worker has announced it yet.
        DONE: It has ended, and nothing is kept of it.
        FINISHED: It has ended while its client was away; its worker keeps the answer.
    """

    QUEUED = 1
    RUNNING = 2
    CANCELLING = 3
    ORPHANED = 4
    RECOVERED = 5
    CLAIMED = 6
    DONE = 7
    FINISHED = 8


class RequestEvent(IntEnum):
    """What can happen to an attempt.

    Attributes:
        DISPATCHED: It was given to a worker.
        CANCELLED: Its client cancels it.
        DEADLINE: Its deadline has passed.
        ENDED: Its worker gave its terminal.
        WORKER_LOST: Its worker is gone.
        CLIENT_LOST: Its client is gone for good.
        MATCHED: Both halves are there.
        GAVE_UP: It is stopped for another reason: replaced, not claimed in time, or waiting for what cannot come.
        UNREAD: Its worker gave its terminal while its client was away.
    """

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
