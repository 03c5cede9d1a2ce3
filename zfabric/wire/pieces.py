"""Messages that do not decode as a whole, piece by piece: what is wrong with one stream's part is that stream's alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Raw

from zfabric.errors import ProtocolError
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome
from zfabric.wire.chunks import Chunks

T = TypeVar("T")

_list: Final = msgspec.msgpack.Decoder(list[Raw])
_number: Final = msgspec.msgpack.Decoder(int)
_text: Final = msgspec.msgpack.Decoder(str)
_tokens: Final = msgspec.msgpack.Decoder(int | list[int])
_extra: Final = msgspec.msgpack.Decoder(ChunkExtra)
_outcome: Final = msgspec.msgpack.Decoder(Outcome)
#: Columns that every message of chunks has.
_COLUMNS: Final = 4


class Broken(NamedTuple):
    """A part that does not decode, and the attempt that it names."""

    request: int
    attempt: int
    error: ProtocolError


def chunks_of(header: bytes) -> tuple[Chunks, list[Broken]]:
    """The content of CHUNKS. Raises: ProtocolError if these are no columns that belong together."""
    try:
        return codec.unpack_chunks(header), []
    except ProtocolError:
        return _chunks(memoryview(header)[codec.ROUTE_BYTES :])


def ends_of(body: bytes, count: int) -> tuple[Chunks, list[Broken], list[Outcome | ProtocolError]]:
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
            return Chunks(), [], [ProtocolError(f"ENDS does not decode: {error}", kind=int(kinds.ENDS))] * count
    if len(outcomes) != count:
        return chunks, broken, [ProtocolError(f"{count} ends have {len(outcomes)} outcomes")] * count
    return chunks, broken, outcomes


def _chunks(data: bytes | memoryview) -> tuple[Chunks, list[Broken]]:
    """Columns, entry by entry. Raises: ProtocolError: Nobody can say which entries belong together."""
    columns = [_pieces(column) for column in _pieces(data)]
    if len(columns) < _COLUMNS:
        raise ProtocolError(f"chunks have {len(columns)} columns, at least {_COLUMNS} are needed")
    none: list[list[Raw]] = [[], [], []]
    requests, offsets, texts, tokens, attempts, indexes, extras, *_ = [*columns, *none]
    count = len(requests)
    if any(len(column) != count for column in (offsets, texts, tokens)) or any(
        len(column) not in (0, count) for column in (attempts, indexes)
    ):
        raise ProtocolError("columns of chunks are of different lengths")
    rest = _extras(extras, count)
    found = Chunks()
    broken: list[Broken] = []
    for at in range(count):
        request = _decoded(_number.decode, requests[at])
        attempt = _decoded(_number.decode, attempts[at]) if attempts else 0
        if isinstance(request, ProtocolError) or isinstance(attempt, ProtocolError):
            continue
        parts: list[Any] = [
            _decoded(_number.decode, indexes[at]) if indexes else 0,
            _decoded(_number.decode, offsets[at]),
            _decoded(_text.decode, texts[at]),
            _decoded(_tokens.decode, tokens[at]),
            _decoded(_extra.decode, rest[at]) if at in rest else None,
        ]
        faults = [part for part in parts if isinstance(part, ProtocolError)]
        if faults:
            broken.append(Broken(request, attempt, faults[0]))
            continue
        index, offset, text, ids, extra = parts
        found.add(Chunk(request, attempt, index, offset, text, ids if isinstance(ids, list) else [ids], extra))
    found.complete()
    return found, broken


def _extras(pieces: list[Raw], count: int) -> dict[int, Raw]:
    """Extras by the number of their chunk. Raises: ProtocolError: One belongs to no chunk."""
    found: dict[int, Raw] = {}
    for piece in pieces:
        pair = _pieces(piece)
        position = _decoded(_number.decode, pair[0]) if len(pair) == 2 else -1
        if isinstance(position, ProtocolError) or not 0 <= position < count:
            raise ProtocolError("an extra belongs to no chunk")
        found[position] = pair[1]
    return found


def _pieces(data: bytes | memoryview | Raw) -> list[Raw]:
    """Raises: ProtocolError if this is no list."""
    decoded = _decoded(_list.decode, data)
    if isinstance(decoded, ProtocolError):
        raise decoded
    return decoded


def _decoded(decode: Callable[[bytes | memoryview | Raw], T], piece: bytes | memoryview | Raw) -> T | ProtocolError:
    try:
        return decode(piece)
    except (msgspec.MsgspecError, RecursionError, ValueError, TypeError) as error:
        return ProtocolError(f"a part of an answer does not decode: {error}")
