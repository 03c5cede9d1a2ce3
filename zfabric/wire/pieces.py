"""Messages that do not decode as a whole, piece by piece: what is wrong with one stream's part is that stream's alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

import msgspec
from msgspec import Raw

from zfabric.errors import ProtocolError
from zfabric.wire import codec, kinds
from zfabric.wire.payloads import Chunk, Outcome

T = TypeVar("T")

_list: Final = msgspec.msgpack.Decoder(list[Raw])
_chunk: Final = msgspec.msgpack.Decoder(Chunk)
_outcome: Final = msgspec.msgpack.Decoder(Outcome)


class Broken(NamedTuple):
    """A part that does not decode, and the attempt that it names, if it names one."""

    request: int
    attempt: int
    error: ProtocolError


def chunks_of(header: bytes) -> tuple[list[Chunk], list[Broken]]:
    """The content of CHUNKS. Raises: ProtocolError if it is no list."""
    try:
        return codec.unpack_chunks(header), []
    except ProtocolError:
        return _chunks(memoryview(header)[codec.ROUTE_BYTES :])


def ends_of(body: bytes, count: int) -> tuple[list[Chunk], list[Broken], list[Outcome | ProtocolError]]:
    """The body of ENDS, with an outcome or an error for each of its ends."""
    try:
        content = codec.unpack_ends_body(body)
        chunks, outcomes, broken = content.chunks, list[Outcome | ProtocolError](content.outcomes), list[Broken]()
    except ProtocolError:
        try:
            first, second, *_ = _pieces(body)
            chunks, broken = _chunks(first)
            outcomes = [_decoded(_outcome.decode, piece) for piece in _pieces(second)]
        except (ProtocolError, ValueError) as error:
            return [], [], [ProtocolError(f"ENDS does not decode: {error}", kind=int(kinds.ENDS))] * count
    if len(outcomes) != count:
        return chunks, broken, [ProtocolError(f"{count} ends have {len(outcomes)} outcomes")] * count
    return chunks, broken, outcomes


def _chunks(data: bytes | memoryview) -> tuple[list[Chunk], list[Broken]]:
    chunks: list[Chunk] = []
    broken: list[Broken] = []
    for piece in _pieces(data):
        decoded = _decoded(_chunk.decode, piece)
        if isinstance(decoded, Chunk):
            chunks.append(decoded)
        else:
            numbers = codec.leading_integers(memoryview(piece), 2)
            if len(numbers) == 2:
                broken.append(Broken(numbers[0], numbers[1], decoded))
    return chunks, broken


def _pieces(data: bytes | memoryview) -> list[Raw]:
    """Raises: ProtocolError if this is no list."""
    decoded = _decoded(_list.decode, data)
    if isinstance(decoded, ProtocolError):
        raise decoded
    return decoded


def _decoded(decode: Callable[[bytes | memoryview], T], piece: bytes | memoryview) -> T | ProtocolError:
    try:
        return decode(piece)
    except (msgspec.MsgspecError, RecursionError, ValueError, TypeError) as error:
        return ProtocolError(f"a part of an answer does not decode: {error}")
