"""Which errors another attempt mends, and which its caller gets."""

from __future__ import annotations

from zfabric import limits
from zfabric.core.client.pending import Pending
from zfabric.errors import FAILOVER_CODES, DeadlineExceededError, FabricError, UnsupportedParameterError


def why_final(pending: Pending, error: FabricError, now_ns: int) -> FabricError | None:
    """The error that the caller gets, or None if another attempt is to be made."""
    if error.code not in FAILOVER_CODES:
        return error
    if pending.deadline_ns is not None and now_ns >= pending.deadline_ns:
        # It may be the deadline that ended the attempt, while this client was away and could not be told.
        return DeadlineExceededError(f"deadline passed after an attempt was lost: {error.message}")
    if nobody_continues(error) or not pending.repeatable:
        return error
    if pending.barren >= limits.ATTEMPTS_WITHOUT_PROGRESS_MAX or pending.attempt >= limits.ATTEMPTS_MAX:
        return error
    return None if pending.continuable else error


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
