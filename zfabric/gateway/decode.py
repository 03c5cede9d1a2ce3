"""From the bytes of a body to a request of one API. What it does not know is refused by name, never dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from zfabric.errors import ParameterRangeError, RequestError, UnsupportedParameterError

T = TypeVar("T")

_UNKNOWN: Final = re.compile(r"contains unknown field `(?P<name>[^`]*)`(?: - at `\$\.?(?P<at>[^`]*)`)?")
_MISSING: Final = re.compile(r"missing required field `(?P<name>[^`]*)`(?: - at `\$\.?(?P<at>[^`]*)`)?")
_AT: Final = re.compile(r" - at `\$\.?(?P<at>[^`]*)`$")


def decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """What reads the bodies of one API. Make it once."""
    return msgspec.json.Decoder(kind)


def decode(reader: msgspec.json.Decoder[T], body: bytes) -> T:
    """A request.

    Raises:
        UnsupportedParameterError: It has a field that is none.
        ParameterRangeError: A value is of a wrong type.
        RequestError: A field is missing, or the body is not JSON.

    Example:
        >>> decode(decoder(EmbeddingsRequest), b'{"model": "minilm", "input": "one text"}').model
        'minilm'
    """
    try:
        return reader.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not the JSON of a request: {error}") from None


def _invalid(told: str) -> RequestError:
    if found := _UNKNOWN.search(told):
        name = _path(found["at"], found["name"])
        return UnsupportedParameterError(f"{name!r} is not a parameter of this call", parameter=name)
    if found := _MISSING.search(told):
        name = _path(found["at"], found["name"])
        return RequestError(f"{name!r} is missing", parameter=name)
    place = _AT.search(told)
    if place is None:
        return RequestError(f"the body is not that of a request: {told}")
    name = place["at"]
    fact = _AT.sub("", told)
    return ParameterRangeError(f"{name}: {fact[:1].lower()}{fact[1:]}", parameter=name)


def _path(at: str | None, name: str) -> str:
    return f"{at}.{name}" if at else name


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """A map without what is null in it: SDKs send back answers with each field that they know."""
    return {name: item for name, item in value.items() if item is not None}


def refuse_set(request: msgspec.Struct, names: Mapping[str, str | None], what: str) -> None:
    """Refuse fields that other APIs have.

    Args:
        names: Of the fields, and what each is called in this API, if there is such a thing.
        what: What the API makes.

    Raises:
        UnsupportedParameterError: One of them is set.
    """
    for name, ours in names.items():
        if getattr(request, name) is not None:
            hint = f", {ours!r} is" if ours is not None else ""
            raise UnsupportedParameterError(f"{name!r} is not a parameter of {what}{hint}", parameter=name)
