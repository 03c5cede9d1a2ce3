"""Reasoning and tool calls on their way: from a backend's deltas to what a reader and the next attempt have of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_client_session import Wire
from tests.unit.worker_side import WorkerSide, last, token
from zfabric.backends.front.call_ids import call_id
from zfabric.backends.front.continuation import Redraw, Unseen
from zfabric.client.mailbox import Collector, Mailbox
from zfabric.core.worker.session import Spoiled
from zfabric.errors import ProtocolError, WorkerLostError
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome
from zfabric.wire.payloads import Delta, GenerateRequest, Usage
from zfabric.wire.tool_calls import ToolCallDelta


def call(index: int, arguments: str = "", name: str | None = None) -> ToolCallDelta:
    return ToolCallDelta(index=index, id=None if name is None else f"id{index}", name=name, arguments=arguments)


#: What an engine makes of one token each, in the order that it does.
ANSWER = [
    Delta(reasoning="I ", token_ids=[1]),
    Delta(reasoning="call.", token_ids=[2]),
    Delta(text="Look: ", token_ids=[3]),
    Delta(tool_calls=[call(0, '{"a"', "add")], token_ids=[4]),
    Delta(tool_calls=[call(0, ": 1}"), call(1, name="now")], token_ids=[5]),
    Delta(tool_calls=[call(1, "{}")], token_ids=[6]),
    Delta(finish_reason="tool_calls", token_ids=[7], usage=Usage(3, 7)),
]


def fresh() -> list[Delta]:
    return [Delta(**{name: getattr(delta, name) for name in Delta.__struct_fields__}) for delta in ANSWER]


@pytest.mark.parametrize("window", [1_000, 0, 3])
def test_a_reader_gets_all_of_it_however_it_was_merged(window: int) -> None:
    side = WorkerSide()
    name = side.begin(1, window=window)
    for delta in fresh():
        side.emit((name, delta))
    side.grant(1, 0, 1_000)
    box = Mailbox(lambda: None)
    for chunk in side.heard().chunks:
        box.arrived(chunk.index, chunk.text, chunk.token_ids, chunk.extra)
    box.ended(None, Outcome())
    seen = [box.take() for _ in iter(lambda: bool(box.waiting), False)]
    choice = box.completion("r", "m").choices[0]
    assert (choice.reasoning, choice.text, choice.finish_reason) == ("I call.", "Look: ", "tool_calls")
    assert [(c.id, c.name, c.arguments) for c in choice.tool_calls] == [
        ("id0", "add", '{"a": 1}'),
        ("id1", "now", "{}"),
    ]
    assert "".join(delta.reasoning for delta in seen) == "I call."
    assert choice.message == {
        "role": "assistant",
        "content": "Look: ",
        "tool_calls": [
            {"id": "id0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
            {"id": "id1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    }
    json.dumps(box.completion("r", "m").to_dict())


@given(st.integers(0, 6), st.lists(st.booleans(), min_size=7, max_size=7))
def test_an_answer_that_is_drawn_again_goes_on_where_its_reader_stands(units: int, alone: list[bool]) -> None:
    """Whatever part the reader has, and however the engine groups what it draws again."""
    wire = Wire()
    wire.up()
    pending, _ = wire.submit()
    wire.said()
    reader = Collector(1, lambda: None, lambda units: None)
    for position, delta in enumerate(fresh()[:units]):
        extra = ChunkExtra(reasoning=delta.reasoning, tool_calls=delta.tool_calls)
        chunk = Chunk(pending.number, 0, 0, position, delta.text, delta.token_ids, extra)
        reader.arrived(chunk.index, chunk.text, chunk.token_ids, chunk.extra)
        wire.chunk(pending, delta.text, delta.token_ids, reasoning=delta.reasoning, tool_calls=delta.tool_calls)
    wire.end(pending, WorkerLostError("gone"))
    ((_, again),) = wire.said_of("Submit")
    assert again.resume_token_ids == [1, 2, 3, 4, 5, 6][:units]
    redraw = Redraw(again)
    position = units
    for delta in grouped(fresh(), alone):
        if redraw.leave_out(delta):
            extra = ChunkExtra(
                reasoning=delta.reasoning, tool_calls=delta.tool_calls, finish_reason=delta.finish_reason
            )
            reader.arrived(0, delta.text, delta.token_ids, extra)
            position += len(delta.token_ids)
    (choice,) = reader.choices
    assert (choice.reasoning, choice.text, choice.token_ids) == ("I call.", "Look: ", [1, 2, 3, 4, 5, 6, 7])
    assert [(c.id, c.name, c.arguments) for c in choice.tool_calls] == [
        ("id0", "add", '{"a": 1}'),
        ("id1", "now", "{}"),
    ]


def grouped(deltas: list[Delta], alone: list[bool]) -> list[Delta]:
    """Deltas that are of one kind and follow one another may be one."""
    groups = [deltas[0]]
    for delta, apart in zip(deltas[1:], alone[1:], strict=True):
        before = groups[-1]
        kinds = [(bool(d.reasoning), bool(d.text), bool(d.tool_calls)) for d in (before, delta)]
        if apart or kinds[0] != kinds[1]:
            groups.append(delta)
            continue
        before.reasoning += delta.reasoning
        before.tool_calls = [*(before.tool_calls or []), *(delta.tool_calls or [])] or None
        before.token_ids = before.token_ids + delta.token_ids
    return groups


def test_a_name_is_left_out_whole_and_arguments_by_their_length() -> None:
    unseen = Unseen(len("add") + 2)
    delta = Delta(tool_calls=[call(0, '{"a": 1}', "add"), call(1, "", "now")])
    unseen.leave_out(delta)
    assert delta.tool_calls == [call(0, 'a": 1}'), call(1, "", "now")]


def test_what_cannot_be_sent_ends_its_own_stream() -> None:
    for wrong in (Delta(reasoning=5), Delta(tool_calls=[{"index": 0}]), Delta(tool_calls=5)):  # type: ignore[arg-type, list-item]
        side = WorkerSide()
        bad, good = side.begin(1), side.begin(2)
        orders = side.emit((bad, wrong), (good, token(1)))
        assert [order.request_id for order in orders if isinstance(order, Spoiled)] == [bad]
        side.emit((good, last(2)))
        assert [chunk.request for chunk in side.heard().chunks] == [2, 2]


def test_a_piece_of_a_call_that_nothing_began_ends_its_stream() -> None:
    box = Mailbox(lambda: None)
    box.arrived(0, "", [1], ChunkExtra(tool_calls=[call(1, "{}", "f")]))
    with pytest.raises(ProtocolError, match="call 1"):
        box.take()


def test_ids_are_those_of_the_request_and_not_of_its_attempt() -> None:
    assert call_id("5f-77-0", 0, 1) == call_id("5f-77-3", 0, 1)
    assert len({call_id(f"5f-{request}-0", choice, n) for request in (1, 2) for choice in (0, 1) for n in (0, 1)}) == 8
    assert GenerateRequest().resume_characters == 0
