"""Every failure the fabric can report, as one tree::

    FabricError
    ├── ConfigurationError            a flag, file or argument that cannot work
    │   └── CellLoopError             a controller would be a cell of itself
    ├── ProtocolError                 bytes that break docs/protocol.md
    │   └── VersionMismatchError      peers that speak different protocol versions
    ├── RequestError                  the request itself is at fault; sending it again fails again
    │   ├── UnknownModelError · ParameterRangeError · ContextOverflowError
    │   ├── UnsupportedParameterError · UnsupportedOperationError · TooLargeError
    │   └── PoisonousRequestError
    ├── AccessError                   who asks is not allowed to
    │   └── AuthenticationError (IncorrectKeyError) · PermissionDeniedError
    ├── OverloadError                 a bound was reached; later is better
    │   └── QueueFullError · RateLimitedError · QuotaExceededError
    ├── EndedError                    the caller, the caller's clock, or an operator ended it
    │   └── RequestCancelledError · DeadlineExceededError · StoppedByOperatorError
    ├── BackendError                  the engine failed
    │   └── OutOfMemoryError
    └── UnavailableError              nobody is there to answer
        ├── NoWorkerError · WorkerTimeoutError · WorkerLostError · WorkerDrainingError
        └── EngineStalledError · ConnectionLostError · NameTakenError · EndpointInUseError · ClosedError

Each class has a stable numeric ``code`` (the sixteen that FastChat defined keep their numbers), says
whether the same request may succeed when ``retryable``, and carries the values of its message in
``details``, so that programs need not parse sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

Detail = str | int | float | bool | None


class FabricError(Exception):
    """Base of all errors. ``code`` 50001 is the general internal error.

    Args:
        message: Lower-case fact with its values, no advice.
        details: The same values by name; they survive the wire.
    """

    code: ClassVar[int] = 50001
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: Detail) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Detail] = details

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code}, {self.message!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.code, self.message, self.details)


class ConfigurationError(FabricError):
    """A flag, file or argument cannot work."""

    code = 40010


class CellLoopError(ConfigurationError):
    """A controller would be a cell of itself, or cells stand below one another deeper than is allowed."""

    code = 40011


class ProtocolError(FabricError):
    """Bytes or an order of messages that break the protocol."""

    code = 40001


class VersionMismatchError(ProtocolError):
    """The peers speak different versions of the protocol."""

    code = 40002


class RequestError(FabricError):
    """The request itself is at fault, and nothing below says it closer."""

    code = 40300


class UnknownModelError(RequestError):
    """Nobody serves a model of this name."""

    code = 40301


class ParameterRangeError(RequestError):
    """A value is out of its bounds, or of a wrong type."""

    code = 40302


class ContextOverflowError(RequestError):
    """The prompt does not fit the model's context."""

    code = 40303


class UnsupportedParameterError(RequestError):
    """The model does not honour a parameter that was given."""

    code = 40304


class UnsupportedOperationError(RequestError):
    """The model cannot do what was asked."""

    code = 40305


class TooLargeError(RequestError):
    """A message, or what it holds, is larger than its bound."""

    code = 40306


class PoisonousRequestError(RequestError):
    """Worker after worker died or hung under the request, and it is sent to no other; `details["deaths"]` says how many."""

    code = 40307


class AccessError(FabricError):
    """Who asks is not allowed to."""

    code = 40100


class AuthenticationError(AccessError):
    """A key is needed, and there is none."""

    code = 40101


class IncorrectKeyError(AuthenticationError):
    """The key is one that nobody knows."""

    code = 40102


class PermissionDeniedError(AccessError):
    """The key may not do this, or not with this model or name."""

    code = 40103


class OverloadError(FabricError):
    """A bound on what goes on at a time was reached."""

    code = 42900
    retryable = True


class RateLimitedError(OverloadError):
    """Too much in too little time, by the limits of a key or as a remote API counts; `details["retry_after_ms"]` of a key's limit
    says when there is more."""

    code = 42901


class QuotaExceededError(OverloadError):
    """Too much at a time: requests of a client, sessions of a controller."""

    code = 42902


class QueueFullError(OverloadError):
    """The queue of the model is at its bound."""

    code = 42903


class EndedError(FabricError):
    """The caller, the caller's clock, or an operator ended it."""

    code = 49900


class RequestCancelledError(EndedError):
    """The request was cancelled, or stopped with a former connection of its client."""

    code = 49901


class DeadlineExceededError(EndedError):
    """The request's deadline passed."""

    code = 49902


class StoppedByOperatorError(EndedError):
    """An operator of the fabric ended the request; `details["by"]` says who."""

    code = 49903


class BackendError(FabricError):
    """The engine failed, or any other thing inside."""

    code = 50001


class OutOfMemoryError(BackendError):
    """The engine had no memory for the request."""

    code = 50002


class UnavailableError(FabricError):
    """Nobody is there to answer."""

    code = 50300
    retryable = True


class NoWorkerError(UnavailableError):
    """Workers that could serve the request take none, or the controller drains."""

    code = 50005


class WorkerTimeoutError(UnavailableError):
    """An engine or a remote API did not answer in time."""

    code = 50006


class WorkerLostError(UnavailableError):
    """The worker died, lost its connection, or cannot go on with the answer."""

    code = 50301


class WorkerDrainingError(UnavailableError):
    """The worker leaves and hands the request back."""

    code = 50302


class EngineStalledError(UnavailableError):
    """The worker's engine made no progress for too long."""

    code = 50303


class ConnectionLostError(UnavailableError):
    """The connection was lost, and with it the request."""

    code = 50304


class NameTakenError(UnavailableError):
    """A live worker has the name, or another client the instance number."""

    code = 50305


class EndpointInUseError(UnavailableError):
    """Somebody else listens at the endpoint."""

    code = 50306


class ClosedError(UnavailableError):
    """The client object was closed, or belongs to another process (after a fork)."""

    code = 50307
    retryable = False


def _tree(root: type[FabricError]) -> dict[int, type[FabricError]]:
    found: dict[int, type[FabricError]] = {}
    pending = [root]
    while pending:
        kind = pending.pop(0)
        pending.extend(kind.__subclasses__())
        if kind is not root:
            found.setdefault(kind.code, kind)
    return found


#: Wire code → class. Codes are part of the protocol: they are never renumbered.
BY_CODE: dict[int, type[FabricError]] = _tree(FabricError)

#: Codes after which a client may send the same request again, as the next attempt, without asking its caller.
FAILOVER_CODES: frozenset[int] = frozenset(
    kind.code for kind in (WorkerLostError, WorkerDrainingError, EngineStalledError, ConnectionLostError)
)


def from_wire(code: int, message: str, details: Mapping[str, Detail]) -> FabricError:
    """The exception a peer reported; an unknown code becomes a plain FabricError that keeps it."""
    return _rebuild(code, message, dict(details))


def _rebuild(code: int, message: str, details: dict[str, Detail]) -> FabricError:
    kind = BY_CODE.get(code)
    # Details are a peer's: as keyword arguments they could collide with a parameter's name.
    error = (kind or FabricError)(message)
    error.details = details if kind is not None else {**details, "unknown_code": code}
    return error
