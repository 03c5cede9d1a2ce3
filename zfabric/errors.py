"""Every failure the fabric can report, as one tree.

    FabricError
    ├── ConfigurationError            a flag, file or argument that cannot work
    ├── ProtocolError                 bytes that break docs/protocol.md
    │   └── VersionMismatchError      peers that speak different protocol versions
    ├── RequestError                  the request itself is at fault; sending it again fails again
    │   ├── UnknownModelError · ParameterRangeError · ContextOverflowError
    │   ├── UnsupportedParameterError · UnsupportedOperationError · TooLargeError
    ├── AccessError                   who asks is not allowed to
    │   └── AuthenticationError (IncorrectKeyError) · PermissionDeniedError
    ├── OverloadError                 a bound was reached; later is better
    │   └── QueueFullError · RateLimitedError · QuotaExceededError
    ├── EndedError                    the caller, or the caller's clock, ended it
    │   └── RequestCancelledError · DeadlineExceededError
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
    code = 40010


class ProtocolError(FabricError):
    code = 40001


class VersionMismatchError(ProtocolError):
    code = 40002


class RequestError(FabricError):
    code = 40300


class UnknownModelError(RequestError):
    code = 40301


class ParameterRangeError(RequestError):
    code = 40302


class ContextOverflowError(RequestError):
    code = 40303


class UnsupportedParameterError(RequestError):
    code = 40304


class UnsupportedOperationError(RequestError):
    code = 40305


class TooLargeError(RequestError):
    code = 40306


class AccessError(FabricError):
    code = 40100


class AuthenticationError(AccessError):
    """No key, or a key nobody knows (40101 absent, 40102 incorrect in FastChat's numbering)."""

    code = 40101


class IncorrectKeyError(AuthenticationError):
    code = 40102


class PermissionDeniedError(AccessError):
    code = 40103


class OverloadError(FabricError):
    code = 42900
    retryable = True


class RateLimitedError(OverloadError):
    code = 42901


class QuotaExceededError(OverloadError):
    code = 42902


class QueueFullError(OverloadError):
    """The engine-overloaded case: the queue of the model is at its bound."""

    code = 42903


class EndedError(FabricError):
    code = 49900


class RequestCancelledError(EndedError):
    code = 49901


class DeadlineExceededError(EndedError):
    code = 49902


class BackendError(FabricError):
    code = 50001


class OutOfMemoryError(BackendError):
    code = 50002


class UnavailableError(FabricError):
    code = 50300
    retryable = True


class NoWorkerError(UnavailableError):
    code = 50005


class WorkerTimeoutError(UnavailableError):
    code = 50006


class WorkerLostError(UnavailableError):
    code = 50301


class WorkerDrainingError(UnavailableError):
    code = 50302


class EngineStalledError(UnavailableError):
    code = 50303


class ConnectionLostError(UnavailableError):
    code = 50304


class NameTakenError(UnavailableError):
    code = 50305


class EndpointInUseError(UnavailableError):
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
