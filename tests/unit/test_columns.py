"""A step as columns is the step as deltas, at the worker and on the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit.worker_side import WorkerSide, last, token
from zfabric.backends.echo import EchoWorker
from zfabric.core.worker.orders import Columns, Spoiled, Stop
from zfabric.errors import BackendError
from zfabric.wire import codec
from zfabric.wire.answers import Chunk, ChunkExtra
from zfabric.wire.chunks import columns_of
from zfabric.wire.payloads import Delta
from zfabric.worker.sink import BackendSink


def by_columns(side: WorkerSide, names: Sequence[str], tokens: Sequence[Any], texts: Sequence[Any]) -> list[Any]:
    return [*side.session.emit_columns(Columns(names, tokens, texts), 0), *side.session.flush()]


def test_both_ways_say_the_same_bytes() -> None:
    sides = WorkerSide(), WorkerSide()
    deltas, columns = sides
    streams, same = ([side.begin(request, window=100) for request in (5, 6, 7)] for side in sides)
    assert streams == same
    for step in range(4):
        names = streams[: 3 - step // 2]
        deltas.emit(*((name, token(step)) for name in names))
        by_columns(columns, names, [step] * len(names), ["t "] * len(names))
    for side in sides:
        side.emit(*((name, last(9)) for name in streams))
    said = [side.heard() for side in sides]
    assert said[0].frames == said[1].frames
    assert [chunk.offset for chunk in said[0].chunks if chunk.request == 5] == [0, 1, 2, 3, 4]


def test_what_was_handed_over_so_is_kept_merged_and_said_again() -> None:
    side = WorkerSide()
    name = side.begin(5, window=2)
    for step in range(5):
        by_columns(side, [name], [step], [f"{step} "])
    assert [chunk.token_ids for chunk in side.heard().chunks] == [[0], [1]]
    side.grant(5, 1, 4)
    side.session.flush()
    (merged,) = side.heard().chunks
    assert (merged.offset, merged.token_ids, merged.text) == (2, [2, 3], "2 3 ")
    side.grant(5, 1, 8, again=True, client=8)
    side.session.flush()
    (again,) = side.heard().chunks
    assert (again.offset, again.token_ids, again.text) == (1, [1, 2, 3, 4], "1 2 3 4 ")
    assert side.session.streams[name].completion_tokens == 5


@pytest.mark.parametrize(("tokens", "text"), [(["x"], "a"), ([1], 5), ([None], "a")])
@pytest.mark.parametrize("first", [True, False])
def test_a_value_that_is_none_ends_its_stream_alone(tokens: list[Any], text: Any, first: bool) -> None:
    side = WorkerSide()
    bad, good = side.begin(5), side.begin(6)
    if not first:
        by_columns(side, [bad, good], [1, 1], ["a", "a"])
    orders = by_columns(side, [bad, good], [*tokens, 2], [text, "b"])
    assert [type(order) for order in orders] == [Spoiled, Stop]
    assert side.heard().chunks[-1].request == 6
    assert good in side.session.streams
    assert bad not in side.session.streams


def test_numbers_of_numpy_are_taken_for_what_they_hold() -> None:
    numpy = pytest.importorskip("numpy")
    side = WorkerSide()
    name = side.begin(5)
    for _ in range(2):
        assert not by_columns(side, [name], numpy.array([7]), ["a"])
    assert [chunk.token_ids for chunk in side.heard().chunks] == [[7], [7]]


def test_requests_that_ended_are_passed_over() -> None:
    side = WorkerSide()
    name = side.begin(5)
    by_columns(side, ["gone", name], [1, 2], ["a", "b"])
    assert [chunk.text for chunk in side.heard().chunks] == ["b"]


def test_columns_say_only_what_differs() -> None:
    plain = [Chunk(request, 0, 0, 3, "word ", [17]) for request in (2**62, 2**62 + 1)]
    columns = columns_of(plain)
    assert (columns.attempts, columns.indexes, columns.extras) == ([], [], [])
    assert columns.tokens == [17, 17]
    extra = ChunkExtra(finish_reason="stop")
    rows = [*plain, Chunk(9, 2, 0, 0, "", []), Chunk(8, 0, 3, 1, "x", [1, 2], extra), Chunk(7, 0, 0, 0, "y", [5])]
    columns = columns_of(rows)
    assert columns.attempts == [0, 0, 2, 0, 0]
    assert columns.indexes == [0, 0, 0, 3, 0]
    assert columns.extras == [(3, extra)]
    assert codec.unpack_chunks(codec.pack_chunks(3, rows)[0]).rows() == rows


async def test_columns_of_different_lengths_are_the_backends_mistake() -> None:
    class Receiver:
        steps: list[Any] = []

        def emit_columns(self, step: Columns, others: Any) -> None:
            self.steps.append((step, list(others)))

    receiver: Any = Receiver()
    sink = BackendSink(receiver, EchoWorker(), asyncio.get_running_loop())
    for call in (sink.emit_columns, sink.emit_columns_threadsafe):
        with pytest.raises(BackendError, match="1, 2 and 1 entries"):
            call(["a"], [1, 2], ["x"])
    sink.emit_columns_threadsafe(["a"], [1], ["x"], [("b", Delta(finish_reason="stop"))])
    await asyncio.sleep(0)
    ((step, others),) = receiver.steps
    assert (step, others[0][0]) == (Columns(["a"], [1], ["x"]), "b")
