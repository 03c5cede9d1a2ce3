"""Requests as bytes: encoded once, when they are accepted, and patched where a later attempt differs."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw, structs

from zfabric.errors import RequestError, TooLargeError
from zfabric.wire import codec
from zfabric.wire.bounds import check_request
from zfabric.wire.payloads import AnyRequest, TextRequest
from zfabric.wire.sampling import SamplingOptions

_parts: Final = msgspec.msgpack.Decoder(list[Raw])
_sampling: Final = msgspec.msgpack.Decoder(SamplingOptions)
_FIELDS: Final = TextRequest.__struct_fields__
_SAMPLING, _TOKENS, _CHARACTERS = (
    _FIELDS.index(name) for name in ("sampling", "resume_token_ids", "resume_characters")
)


def encoded(request: AnyRequest, limit: int) -> bytes:
    """A request's body.

    Args:
        limit: Bytes that may be sent at once.

    Raises:
        RequestError: Something in it cannot be sent; names the field.
        TooLargeError: Names the largest field, or what there is more of than a worker would decode.
    """
    try:
        body = codec.encode(request)
    except Exception as error:  # noqa: BLE001 — whatever a value of the caller's raises is its own fault
        name = _culprit(request)
        raise RequestError(f"{name} cannot be sent: {error}", parameter=name) from None
    if len(body) > limit:
        name = max(request.__struct_fields__, key=lambda field: len(codec.encode(getattr(request, field))))
        raise TooLargeError(
            f"request holds {len(body)} bytes, most of them in {name}; the limit is {limit}",
            parameter=name,
            size=len(body),
            limit=limit,
        )
    check_request(body)
    return body


def continued(body: bytes, token_ids: list[int], characters: int, seed: int | None) -> bytes:
    """The body of an answer's next attempt: the same request, and what its reader has.

    Args:
        seed: What the former attempt drew by, where the request has no seed of its own; None to leave it.
    """
    parts = _parts.decode(body)
    parts[_TOKENS], parts[_CHARACTERS] = codec.raw(token_ids), codec.raw(characters)
    if seed is not None:
        parts[_SAMPLING] = codec.raw(structs.replace(_sampling.decode(parts[_SAMPLING]), seed=seed))
    return codec.encode(parts)


def _culprit(request: AnyRequest) -> str:
    """The first field that cannot be encoded, or of the sampling parameters the first of them."""
    for name in request.__struct_fields__:
        value = getattr(request, name)
        try:
            codec.encode(value)
        except Exception:  # noqa: BLE001 — as above
            if not isinstance(value, SamplingOptions):
                return name
            for parameter in value.__struct_fields__:
                try:
                    codec.encode(getattr(value, parameter))
                except Exception:  # noqa: BLE001 — as above
                    return parameter
    return "request"
