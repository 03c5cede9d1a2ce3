"""A worker's messages, none of them larger than its receiver takes.

Most of the time what changed for a client fits one message, which is encoded as it is. What does not, or cannot be
encoded, is taken apart here: each chunk and each terminal is encoded alone, messages are filled up to FRAME_BYTES_GOAL,
and a stream of which something cannot be sent at all is named, so that it ends and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from msgspec import Raw, structs

from zfabric import limits
from zfabric.core.worker.backlog import Backlog
from zfabric.core.worker.soundness import outcome_of
from zfabric.errors import BackendError, FabricError, TooLargeError
from zfabric.wire import codec
from zfabric.wire.answers import Chunk
from zfabric.wire.chunks import Chunks, EndsBody, columns_of
from zfabric.wire.messages import Carried, CarriedMore, End, Ends, Located, WorkerHello
from zfabric.wire.plain import ENCODING_ERRORS, encode_plain

T = TypeVar("T")
#: What a list and an envelope take besides what is in them.
_FRAMING_BYTES: Final = 64
#: What an extra takes among columns beside what it takes in a chunk of its own: a pair, and the chunk's number.
_POSITION_BYTES: Final = 8


def pack_whole(client: int, chunks: Chunks, finished: Sequence[Backlog] | None) -> codec.Frames:
    """Everything of one client as one message: CHUNKS, or ENDS if some of its streams have finished.

    Raises:
        One of ENCODING_ERRORS: It cannot be encoded as a whole.
    """
    if finished is None:
        return codec.chunks_route(client) + encode_plain(chunks), codec.EMPTY
    if len(finished) > limits.LIST_LENGTH_MAX:
        raise ValueError("more terminals than a message takes")
    lines = [_end_of(stream) for stream in finished]
    outcomes = [stream.outcome for stream in finished if stream.outcome is not None]
    envelope = Ends(instance=finished[0].instance, ends=lines, client=client)
    return codec.pack_envelope(envelope), encode_plain(EndsBody(chunks=chunks, outcomes=outcomes))


def _end_of(stream: Backlog) -> End:
    # A client may say that it has more units than can be told.
    units = min(stream.end, 2**32 - 1)
    return End(request=stream.request, attempt=stream.attempt, code=stream.code or 0, units=units)


class _Piece(NamedTuple):
    """A chunk, and what it takes in a message at most."""

    chunk: Chunk
    size: int


class Packing:
    """The messages of one client at one flush, where one message would not do.

    Args:
        client: Its session's number.
        worker: This worker's name.
        frame_bytes_max: What the receiver takes at most.
    """

    def __init__(self, client: int, worker: str, frame_bytes_max: int) -> None:
        self.messages: list[codec.Frames] = []
        #: Streams of which something cannot be sent, and why.
        self.spoiled: list[tuple[Backlog, FabricError]] = []
        self._client = client
        self._worker = worker
        self._room = max(frame_bytes_max, limits.HEADER_BYTES_MAX) - _FRAMING_BYTES
        self._goal = min(self._room, limits.FRAME_BYTES_GOAL - _FRAMING_BYTES)

    def add(self, streams: Sequence[Backlog], chunks: Chunks, finished: Sequence[Backlog]) -> None:
        """Take everything apart, and fill messages with it."""
        by_attempt = {(stream.request, stream.attempt): stream for stream in streams}
        pieces: list[_Piece] = []
        doomed: set[int] = set()
        for chunk in chunks.rows():
            stream = by_attempt[chunk.request, chunk.attempt]
            if id(stream) in doomed:
                continue
            try:
                pieces += self._pieces(stream, chunk)
            except FabricError as error:
                doomed.add(id(stream))
                stream.truncate(chunk.offset)
                self.spoiled.append((stream, error))
        for group in grouped(pieces, lambda piece: piece.size, self._goal):
            content = encode_plain(columns_of([piece.chunk for piece in group]))
            self.messages.append((codec.chunks_route(self._client) + content, codec.EMPTY))
        for stream, why in self.spoiled:
            if stream.finished:
                stream.code, stream.outcome = outcome_of(why)
        self._add_ends(finished)

    def _pieces(self, stream: Backlog, chunk: Chunk) -> list[_Piece]:
        """A chunk, in as many parts as it takes, each of which can be encoded.

        Raises:
            BackendError: It cannot be encoded.
            TooLargeError: A single unit is larger than the receiver takes.
        """
        try:
            size = len(encode_plain(chunk)) + _POSITION_BYTES
        except ENCODING_ERRORS as error:
            raise BackendError(f"what the backend made cannot be sent: {error}") from None
        if size <= self._goal:
            return [_Piece(chunk, size)]
        parts = stream.halves(chunk, self._worker)
        if len(parts) > 1:
            return [piece for part in parts for piece in self._pieces(stream, part)]
        if size > self._room:
            raise _too_large("a part of the answer", size, self._room)
        return [_Piece(chunk, size)]

    def _add_ends(self, finished: Sequence[Backlog]) -> None:
        ends: list[tuple[End, bytes]] = []
        for stream in finished:
            outcome = self._outcome(stream)
            ends.append((_end_of(stream), outcome))
        for group in grouped(ends, lambda end: len(end[1]), self._goal):
            envelope = Ends(instance=finished[0].instance, ends=[end for end, _ in group], client=self._client)
            body = codec.encode([Chunks(), [Raw(outcome) for _, outcome in group]])
            self.messages.append((codec.pack_envelope(envelope), body))

    def _outcome(self, stream: Backlog) -> bytes:
        """A terminal, encoded. One that is larger than the receiver takes is an error instead."""
        assert stream.outcome is not None
        encoded = codec.encode(stream.outcome)
        if len(encoded) <= self._room:
            return encoded
        error = _too_large("the result", len(encoded), self._room)
        self.spoiled.append((stream, error))
        stream.code, stream.outcome = outcome_of(error)
        return codec.encode(stream.outcome)


def pack_hello(hello: WorkerHello, carried: list[Carried]) -> tuple[codec.Frames, set[tuple[int, int, int]]]:
    """HELLO with as many carried requests as it holds.

    Returns:
        The message, and the keys of what it tells.

    Raises:
        TooLargeError: The models alone do not fit.
    """
    alone = len(codec.pack(hello)[0])
    room = limits.CONTROL_BODY_BYTES_MAX - alone - _FRAMING_BYTES
    if room < 0:
        raise TooLargeError(
            f"a worker's models take {alone} bytes to announce, limit is {limits.CONTROL_BODY_BYTES_MAX}",
            size=alone,
            limit=limits.CONTROL_BODY_BYTES_MAX,
        )
    first = next(grouped(carried, _encoded_bytes, room), [])
    if len(first) == 1 and _encoded_bytes(first[0]) > room:
        first = []
    hello.carried = first
    if len(first) < len(carried):
        # What is not told yet may hold slots: there are none until it is.
        hello.load = structs.replace(hello.load, slots=0)
    return codec.pack(hello), {key_of(line) for line in first}


def pack_carried(carried: list[Carried]) -> list[codec.Frames]:
    """CARRIED, as many as it takes."""
    room = limits.FRAME_BYTES_GOAL - _FRAMING_BYTES
    return [codec.pack(CarriedMore(group)) for group in grouped(carried, _encoded_bytes, room)]


def pack_located(number: int, carried: list[Carried]) -> list[codec.Frames]:
    """LOCATED, as many as it takes, and one at least."""
    room = limits.FRAME_BYTES_GOAL - _FRAMING_BYTES
    groups = list(grouped(carried, _encoded_bytes, room)) or [[]]
    last = len(groups) - 1
    return [
        codec.pack(Located(number=number, carried=group, more=position < last)) for position, group in enumerate(groups)
    ]


def key_of(line: Carried) -> tuple[int, int, int]:
    """What names an attempt."""
    return line.instance, line.request, line.attempt


def grouped(items: Sequence[T], size_of: Callable[[T], int], goal: int) -> Iterator[list[T]]:
    """Items in order, in lists that are no larger than this together unless a single item is, and no longer than a list
    may be."""
    group: list[T] = []
    filled = 0
    for item in items:
        size = size_of(item)
        if group and (filled + size > goal or len(group) >= limits.LIST_LENGTH_MAX):
            yield group
            group, filled = [], 0
        group.append(item)
        filled += size
    if group:
        yield group


def _encoded_bytes(line: Carried) -> int:
    return len(codec.encode(line))


def _too_large(what: str, size: int, limit: int) -> TooLargeError:
    return TooLargeError(f"{what} holds {size} bytes, limit is {limit}", size=size, limit=limit)


def carried_of(stream: Backlog) -> Carried:
    """A request as another controller has to know of it."""
    return Carried(
        instance=stream.instance,
        request=stream.request,
        attempt=stream.attempt,
        operation=stream.operation,
        model=stream.model,
        finished=stream.finished,
        lock=stream.lock,
    )
