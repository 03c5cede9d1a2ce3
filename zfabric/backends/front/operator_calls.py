"""Arguments of operators' calls: what is missing, unknown or of another type is said by name."""

from __future__ import annotations

from typing import Any

from zfabric.errors import RequestError, UnsupportedOperationError
from zfabric.wire.payloads import OperateRequest


def arguments_of(request: OperateRequest, *required: str, **optional: Any) -> dict[str, Any]:
    """The arguments of a call.

    Args:
        required: Names of those that it has to have, all of them texts.
        optional: Others, with the values that hold where they are not given; those that are have the type of these.

    Raises:
        RequestError: One is missing, unknown, or of another type.

    Example:
        >>> arguments_of(OperateRequest(call="load_adapter", arguments={"name": "poet"}), "name", pinned=False)
        {'pinned': False, 'name': 'poet'}
    """
    given = request.arguments
    missing = [name for name in required if name not in given]
    unknown = [name for name in given if name not in required and name not in optional]
    if missing or unknown:
        words = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
        raise RequestError(f"call {request.call!r}: {', '.join(words)}", call=request.call)
    for name, value in given.items():
        kind = str if name in required else type(optional[name])
        if type(value) is not kind or (kind in (str, bytes) and not value):
            raise RequestError(
                f"call {request.call!r}: {name} is {value!r}, it must be a {_KINDS[kind]}",
                call=request.call,
                argument=name,
            )
    return {**optional, **given}


def no_such_call(request: OperateRequest, backend: str, calls: list[str]) -> UnsupportedOperationError:
    """The error of a call that a backend has not got."""
    return UnsupportedOperationError(
        f"{backend} has no call {request.call!r}, it has {', '.join(sorted(calls))}",
        operation="operate",
        call=request.call,
    )


_KINDS = {
    str: "text that is not empty",
    bool: "truth value",
    int: "whole number",
    bytes: "value of bytes that is not empty",
}
