"""Chunks of answers on the wire: one message's, of any streams of one client, as columns.

A step makes one token for each of many streams. As columns they are read and written without an object for each token, and what
most chunks share is not said at all: attempts and choices are mostly 0, and few chunks have more than text and tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat

from msgspec import Struct, field

from zfabric.errors import ProtocolError
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome


class Chunks(Struct, array_like=True, kw_only=True, gc=False):
    """Chunks as columns: entry i of each column belongs to chunk i.

    Attributes:
        requests: Whose answer it is.
        offsets: Its first unit, counted from the answer's start over all choices of the request.
        texts: New text.
        tokens: New tokens: one as itself, any other number of them as an array, which is empty where the engine tells none.
        attempts: Which attempt of the request; empty where all are 0.
        indexes: The choice, from 0; empty where all are 0.
        extras: What few chunks have, with the number of the chunk, in ascending order.
    """

    requests: list[int] = []
    offsets: list[int] = []
    texts: list[str] = []
    tokens: list[int | list[int]] = []
    attempts: list[int] = []
    indexes: list[int] = []
    extras: list[tuple[int, ChunkExtra]] = []

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, chunk: Chunk) -> None:
        """Add one at the end."""
        position = len(self.requests)
        self.requests.append(chunk.request)
        self.offsets.append(chunk.offset)
        self.texts.append(chunk.text)
        self.tokens.append(chunk.token_ids[0] if len(chunk.token_ids) == 1 else chunk.token_ids)
        if chunk.attempt:
            _put(self.attempts, position, chunk.attempt)
        if chunk.index:
            _put(self.indexes, position, chunk.index)
        if chunk.extra is not None:
            self.extras.append((position, chunk.extra))

    def complete(self) -> None:
        """Fill columns up that were written where they differ from 0 alone."""
        for column in (self.attempts, self.indexes):
            if column:
                column += [0] * (len(self.requests) - len(column))

    def check(self) -> None:
        """Raises: ProtocolError: Columns have different lengths, or something belongs to no chunk."""
        count = len(self.requests)
        lengths = {
            len(self.offsets),
            len(self.texts),
            len(self.tokens),
            len(self.attempts) or count,
            len(self.indexes) or count,
        }
        if lengths != {count}:
            raise ProtocolError(
                f"columns of chunks have {sorted({count, *lengths})} entries, they must be of one length"
            )
        if self.extras:
            positions = [position for position, _ in self.extras]
            if positions != sorted(set(positions)) or not 0 <= positions[0] <= positions[-1] < count:
                raise ProtocolError(f"extras belong to chunks {positions[:8]}, there are {count}")

    def entries(self) -> Iterator[tuple[int, int, int, int, str, int | list[int], ChunkExtra | None]]:
        """Request, attempt, choice, offset, text, tokens and extra of each chunk; call `check` before."""
        extras: Iterable[ChunkExtra | None] = repeat(None)
        if self.extras:
            known = dict(self.extras)
            extras = [known.get(position) for position in range(len(self.requests))]
        return zip(
            self.requests, self.attempts or repeat(0), self.indexes or repeat(0), self.offsets, self.texts, self.tokens, extras,
            strict=False,
        )  # fmt: skip

    def rows(self) -> list[Chunk]:
        """The chunks, one by one."""
        return [
            Chunk(request, attempt, index, offset, text, tokens if isinstance(tokens, list) else [tokens], extra)
            for request, attempt, index, offset, text, tokens, extra in self.entries()
        ]


class EndsBody(Struct, array_like=True, kw_only=True):
    """Body of ENDS.

    Attributes:
        chunks: The last chunks of a step, of these and other streams of the client.
        outcomes: One for each end of the envelope, in its order.
    """

    chunks: Chunks = field(default_factory=Chunks)
    outcomes: list[Outcome] = []


def columns_of(chunks: Iterable[Chunk]) -> Chunks:
    """Chunks as columns."""
    columns = Chunks()
    for chunk in chunks:
        columns.add(chunk)
    columns.complete()
    return columns


def _put(column: list[int], position: int, value: int) -> None:
    column += [0] * (position - len(column))
    column.append(value)
