"""Which errors another attempt mends, and which its caller gets."""

from __future__ import annotations

from typing import Final

from zfabric import limits
from zfabric.core.client.pending import Pending
from zfabric.errors import (
    FAILOVER_CODES,
    DeadlineExceededError,
    EngineStalledError,
    FabricError,
    NoWorkerError,
    PoisonousRequestError,
    UnsupportedParameterError,
    WorkerDrainingError,
    WorkerLostError,
)

#: Losses that may be the request's own doing: its worker is gone, or its engine hangs.
_DEATHS: Final = frozenset({WorkerLostError.code, EngineStalledError.code})


def why_final(pending: Pending, error: FabricError, now_ns: int) -> FabricError | None:
    """The error that the caller gets, or None if another attempt is to be made."""
    if error.code not in FAILOVER_CODES:
        return error
    if pending.deadline_ns is not None and now_ns >= pending.deadline_ns:
        # It may be the deadline that ended the attempt, while this client was away and could not be told.
        return DeadlineExceededError(f"deadline passed after an attempt was lost: {error.message}")
    if no_fault_of(error) and pending.body and pending.attempt < limits.ATTEMPTS_MAX:
        # It has not run.
        return None
    if nobody_continues(error) or not pending.repeatable:
        return error
    deaths = deaths_with(pending, error)
    if deaths >= pending.deaths_max and deaths_of(error):
        if may_return(error) and pending.waits < limits.ATTEMPTS_MAX:
            # It is no death if that worker comes back.
            return error
        return PoisonousRequestError(
            f"{deaths} workers in a row died or hung under the request, the last: {error.message}", deaths=deaths
        )
    if pending.barren >= limits.ATTEMPTS_WITHOUT_PROGRESS_MAX or pending.attempt >= limits.ATTEMPTS_MAX:
        return error
    return None if pending.continuable else error


def next_attempt(pending: Pending, error: FabricError) -> None:
    """An attempt is lost, and the next one is to be submitted."""
    pending.loss, pending.host = error, ""
    pending.attempt += 1
    pending.deaths = deaths_with(pending, error)
    pending.barren += not no_fault_of(error)
    pending.submitted = False


def deaths_with(pending: Pending, error: FabricError) -> int:
    """Attempts in a row that ended with the death of their worker, with this one. What brought a unit begins a new row: an
    answer that goes on from worker to worker is none that kills them, and where one does at some token, the next attempt
    begins there, and brings nothing."""
    before = pending.deaths if pending.barren else 0
    return before + deaths_of(error)


def deaths_of(error: FabricError) -> int:
    """1 where a loss may be the request's own doing."""
    return int(error.code in _DEATHS)


def no_fault_of(error: FabricError) -> bool:
    """Whether a worker handed a request back since another controller had sent one for the same slot at the same moment: the next
    attempt waits for its turn, and this one says nothing of the request."""
    return error.code == WorkerDrainingError.code and error.details.get("busy") is True


def takes_nothing_new(error: FabricError) -> bool:
    """Whether it is the controller that wants no further requests, and another may take them."""
    return error.code == NoWorkerError.code and error.details.get("draining") is True


def refuses_seed(error: FabricError) -> bool:
    """Whether a worker cannot draw by the seed that it was told."""
    return isinstance(error, UnsupportedParameterError) and error.details.get("parameter") == "seed"


def nobody_continues(error: FabricError) -> bool:
    """Whether no other worker could go on with what has come so far."""
    return error.code in FAILOVER_CODES and error.details.get("resumable") is False


def may_return(error: FabricError) -> bool:
    """Whether the worker that was lost may come back with what it had, so that it is worth to claim it."""
    claim_ms = error.details.get("claim_ms")
    return error.code in FAILOVER_CODES and isinstance(claim_ms, (int, float)) and claim_ms > 0
