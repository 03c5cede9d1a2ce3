"""The error tree: stable codes, and nothing is lost on the wire."""

from __future__ import annotations

import copy
import pickle

import pytest

from zfabric.errors import BY_CODE, FAILOVER_CODES, Detail, FabricError, from_wire

#: FastChat's numbers that have a meaning here (constants.ErrorCode).
FASTCHAT = {
    40001: "ProtocolError",
    40101: "AuthenticationError",
    40102: "IncorrectKeyError",
    40103: "PermissionDeniedError",
    40301: "UnknownModelError",
    40302: "ParameterRangeError",
    40303: "ContextOverflowError",
    42901: "RateLimitedError",
    42902: "QuotaExceededError",
    42903: "QueueFullError",
    50001: "BackendError",
    50002: "OutOfMemoryError",
    50005: "NoWorkerError",
    50006: "WorkerTimeoutError",
}


def classes(root: type[FabricError] = FabricError) -> list[type[FabricError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in classes(child))]


def test_codes_are_unique_and_fastchats_numbers_kept() -> None:
    codes = [kind.code for kind in classes() if kind is not FabricError]
    assert len(codes) == len(set(codes))
    assert {code: BY_CODE[code].__name__ for code in FASTCHAT} == FASTCHAT


@pytest.mark.parametrize("kind", classes()[1:], ids=lambda kind: kind.__name__)
def test_an_error_survives_the_wire_and_a_pickle(kind: type[FabricError]) -> None:
    error = kind("it broke", model="m", count=3)
    for other in (
        from_wire(error.code, error.message, error.details),
        pickle.loads(pickle.dumps(error)),
        copy.copy(error),
    ):
        assert type(other) is kind
        assert (other.code, other.message, other.details) == (error.code, "it broke", {"model": "m", "count": 3})


def test_an_unknown_code_is_kept() -> None:
    assert from_wire(99_999, "from the future", {}).details == {"unknown_code": 99_999}


def test_failover_is_only_for_what_can_be_tried_again() -> None:
    assert all(BY_CODE[code].retryable for code in FAILOVER_CODES)


def test_details_of_a_peer_may_have_any_name() -> None:
    """They are data: as keyword arguments, `message` or `self` would raise in whoever reads them."""
    details: dict[str, Detail] = {"message": "x", "self": 1, "code": 2, "": None}
    for code in (40301, 99_999):
        error = from_wire(code, "told", details)
        assert error.message == "told"
        assert details.items() <= error.details.items()
        assert copy.copy(error).details == error.details
