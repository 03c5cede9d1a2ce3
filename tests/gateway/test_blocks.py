"""Answers as rows of blocks."""

from __future__ import annotations

import pytest

from zfabric import Delta, ToolCallDelta
from zfabric.client.results import Choice
from zfabric.errors import ProtocolError
from zfabric.gateway.blocks import Block, Blocks, Step, blocks_of


def told(blocks: list[Block]) -> list[tuple[str, str, str, str]]:
    return [(block.kind, block.id, block.name, block.content) for block in blocks]


def test_one_block_is_open_at_a_time() -> None:
    blocks = Blocks()
    deltas = [
        Delta(reasoning="a"),
        Delta(reasoning="b", text="c"),
        Delta(text="d", tool_calls=[ToolCallDelta(index=0, id="1", name="f", arguments="{")]),
        Delta(tool_calls=[ToolCallDelta(index=0, arguments="}"), ToolCallDelta(index=1, id="2", name="g")]),
        Delta(text="e"),
        Delta(finish_reason="stop"),
    ]
    steps = [(change.step, change.block.index) for delta in deltas for change in blocks.of(delta)]
    steps += [(change.step, change.block.index) for change in blocks.close()]
    rest = [("call", "1", "f", "{}"), ("call", "2", "g", ""), ("text", "", "", "e")]
    assert told(blocks.row) == [("reasoning", "", "", "ab"), ("text", "", "", "cd"), *rest]
    for number, _ in enumerate(blocks.row):
        own = [step for step, index in steps if index == number]
        assert (own[0], own[-1]) == (Step.BEGUN, Step.CLOSED)
    assert [index for step, index in steps if step is not Step.MORE] == [n for n in range(5) for _ in range(2)]
    assert list(blocks.close()) == []


def test_a_piece_of_a_call_that_is_closed_is_a_fault_of_the_engine() -> None:
    blocks = Blocks()
    both = Delta(tool_calls=[ToolCallDelta(index=0, id="1", name="f"), ToolCallDelta(index=1, id="2", name="g")])
    assert len(list(blocks.of(both))) == 3
    with pytest.raises(ProtocolError, match="a piece is of call 0, which is not open"):
        list(blocks.of(Delta(tool_calls=[ToolCallDelta(index=0, arguments="{}")])))


def test_a_whole_choice_is_in_the_order_of_models() -> None:
    choice = Choice(0)
    choice.extend_parts("hm", [ToolCallDelta(index=0, id="1", name="f", arguments="{}")])
    choice.extend("text", [1])
    assert told(blocks_of(choice)) == [("reasoning", "", "", "hm"), ("text", "", "", "text"), ("call", "1", "f", "{}")]
    assert blocks_of(Choice(0)) == []
