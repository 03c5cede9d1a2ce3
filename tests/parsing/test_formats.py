"""Parsers of tool calls and reasoning: what is found in what models write, and that it does not matter how that is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parsing.outputs import OUTPUTS, TOOLS, Output
from zfabric.backends.front.parsing import AnswerFormat, AnswerReader
from zfabric.backends.front.parsing.formats import REASONING_FORMATS, TOOL_FORMATS
from zfabric.wire.chat import ChatOptions
from zfabric.wire.payloads import Delta, FinishReason, GenerateRequest
from zfabric.wire.tool_calls import ToolCallDelta

MESSAGES = [{"role": "user", "content": "How is the weather?"}]


def request_for(*, tools: bool = True, seen: int = 0, **chat: Any) -> GenerateRequest:
    return GenerateRequest(
        messages=MESSAGES,
        tools=TOOLS if tools else None,
        request_id="7f-3-0",
        resume_characters=seen,
        chat=ChatOptions(**chat) if chat else None,
    )


def reader_for(output: Output, *, lead: str = "", **request: Any) -> AnswerReader:
    form = AnswerFormat("", tools=output.tools, reasoning=output.reasoning)
    reader = form.reader(request_for(**request), lambda _: output.tail, lead=lead)
    assert reader is not None
    return reader


class Seen:
    """All that a reader of an answer gets."""

    def __init__(self) -> None:
        self.text = self.reasoning = ""
        self.calls: list[ToolCallDelta] = []
        self.reason: FinishReason | None = None

    def take(self, delta: Delta) -> Delta:
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.reason = delta.finish_reason
        for piece in delta.tool_calls or ():
            if piece.index == len(self.calls):
                assert piece.id
                assert piece.name
                self.calls.append(ToolCallDelta(index=piece.index, id=piece.id, name=piece.name))
            else:
                assert piece.id is piece.name is None
            self.calls[piece.index].arguments += piece.arguments
        return delta

    @property
    def called(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        return tuple((str(call.name), json.loads(call.arguments)) for call in self.calls)

    @property
    def characters(self) -> int:
        calls = sum(len(str(call.name)) + len(call.arguments) for call in self.calls)
        return len(self.text) + len(self.reasoning) + calls

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def read(reader: AnswerReader, pieces: list[str], *, end: FinishReason | None = "stop") -> Seen:
    seen = Seen()
    for piece in pieces:
        delta = Delta(text=piece)
        reader.read(delta)
        seen.take(delta)
    if end is not None:
        delta = Delta(finish_reason=end)
        reader.read(delta)
        seen.take(delta)
    return seen


outputs = pytest.mark.parametrize("output", OUTPUTS, ids=[f"{one.tools}-{at}" for at, one in enumerate(OUTPUTS)])


@outputs
def test_what_a_model_writes_is_told_apart(output: Output) -> None:
    seen = read(reader_for(output), [output.text])
    assert (seen.called, seen.text, seen.reasoning) == (output.calls, output.shown, output.thought)
    assert seen.reason == ("tool_calls" if output.calls else "stop")
    if output.verbatim is not None:
        assert tuple(call.arguments for call in seen.calls) == output.verbatim


@outputs
def test_what_is_told_depends_on_the_text_so_far_and_not_on_how_it_came(output: Output) -> None:
    """After each character: the same whether it came alone, with its neighbour, or all came at once."""
    for size in (1, 2, 7):
        reader, seen = reader_for(output), Seen()
        for at in range(0, len(output.text), size):
            delta = Delta(text=output.text[at : at + size])
            reader.read(delta)
            seen.take(delta)
            assert seen == read(reader_for(output), [output.text[: at + size]], end=None), output.text[: at + size]


@outputs
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_reader_who_has_the_first_part_gets_the_rest(output: Output, data: st.DataObject) -> None:
    """An answer that is gone on with elsewhere: what its reader has is left out, wherever it was broken off."""
    whole = read(reader_for(output), list(output.text))
    at = data.draw(st.integers(0, len(output.text)))
    first = read(reader_for(output), list(output.text[:at]), end=None)
    assert whole.text.startswith(first.text)
    assert whole.reasoning.startswith(first.reasoning)
    reader = reader_for(output, seen=first.characters)
    reader.held = True
    reader.read(Delta(text=output.text[:at]))
    reader.held = False
    for piece in [*output.text[at:], ""]:
        delta = Delta(text=piece)
        reader.read(delta)
        first.take(delta)
    last = Delta(finish_reason="stop")
    reader.read(last)
    first.take(last)
    assert first == whole


@outputs
def test_no_part_of_a_mark_is_shown_while_it_comes(output: Output) -> None:
    whole = read(reader_for(output), [output.text])
    seen = Seen()
    reader = reader_for(output)
    for character in output.text:
        delta = Delta(text=character)
        reader.read(delta)
        seen.take(delta)
        assert whole.text.startswith(seen.text)
        assert whole.reasoning.startswith(seen.reasoning)


@outputs
def test_without_tools_what_looks_like_a_call_is_text(output: Output) -> None:
    form = AnswerFormat("", tools=output.tools, reasoning=output.reasoning)
    reader = form.reader(request_for(tools=False), lambda _: output.tail)
    if output.reasoning == "none":
        assert reader is None
        return
    assert reader is not None
    seen = read(reader, [output.text])
    assert not seen.calls
    assert seen.reasoning == output.thought
    assert seen.reason == "stop"


@outputs
def test_a_call_that_is_broken_off_by_length_is_told_as_what_it_is(output: Output) -> None:
    """Of any beginning: names are whole, calls before the last as well, and the reason is the length."""
    for at in range(0, len(output.text), 3):
        seen = read(reader_for(output), [output.text[:at]], end="length")
        assert seen.reason == "length"
        for call, (name, arguments) in zip(seen.calls, output.calls, strict=False):
            assert call.name == name
            if call.index < len(seen.calls) - 1:
                assert json.loads(call.arguments) == arguments


def test_one_call_alone_where_that_is_asked_for() -> None:
    for output in OUTPUTS:
        if len(output.calls) > 1:
            seen = read(reader_for(output, parallel_tool_calls=False), list(output.text))
            assert seen.called == output.calls[:1]


def test_forced_calls_are_json_whatever_the_format() -> None:
    output = Output("mistral", "none", "")
    listed = '[{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "now", "parameters": {}}]'
    seen = read(reader_for(output, tool_choice="required"), list(listed))
    assert seen.called == (("get_weather", {"city": "Paris"}), ("now", {}))
    assert (seen.text, seen.reason) == ("", "tool_calls")
    assert [len(str(call.id)) for call in seen.calls] == [9, 9]
    chosen = {"type": "function", "function": {"name": "get_weather"}}
    seen = read(reader_for(output, tool_choice=chosen), list('{"city": "Paris"}'))
    assert (seen.called, seen.text, seen.reason) == ((("get_weather", {"city": "Paris"}),), "", "tool_calls")


def test_a_prompt_that_is_echoed_comes_first_and_as_it_is() -> None:
    output = OUTPUTS[0]
    seen = read(reader_for(output, lead=" <tool_call> prompt \n"), list(output.text))
    assert (seen.text, seen.called) == (" <tool_call> prompt \n", output.calls)


def test_the_table_of_formats_is_that_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs/backends.md").read_text()
    table = page.split("| `--tool-parser` |")[1].split("\n\n")[0]
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    assert {tools for tools, _ in rows if tools} == set(TOOL_FORMATS)
    assert {reasoning for _, reasoning in rows if reasoning} == set(REASONING_FORMATS)


@pytest.mark.parametrize(
    ("reasoning", "tail", "text", "thought", "shown"),
    [
        ("qwen3", "assistant\n<think>\nWell, ", "so.\n</think>\n\nYes.", "so.", "Yes."),
        ("qwen3", "assistant\n<think>\nWell.\n</think>\n\nYes, ", "so.", "", "so."),
        ("deepseek_r1", "<｜Assistant｜>Yes, </think> ", "so.", "", "so."),
        ("openai_gptoss", "<|start|>assistant<|channel|>final<|message|>Yes, ", "so.<|return|>", "", "so."),
        ("openai_gptoss", "<|start|>assistant<|channel|>analysis<|message|>Well, ", "so.<|end|>", "so.", ""),
    ],
)
def test_an_answer_within_a_message_begins_where_that_ends(
    reasoning: str, tail: str, text: str, thought: str, shown: str
) -> None:
    output = Output("none", reasoning, text, tail=tail)
    seen = read(reader_for(output, tools=False, continue_final_message=True), list(text))
    assert (seen.reasoning, seen.text) == (thought, shown)


def test_a_guide_waits_for_the_answer() -> None:
    """What is guided is what comes after reasoning."""
    reader = reader_for(Output("none", "qwen3", "", tail="<think>\n"), tools=False)
    told = []
    for piece in ("Hm", ".</thi", "nk>", "{"):
        told.append(reader.answers)
        reader.read(Delta(text=piece))
    assert [*told, reader.answers] == [False, False, False, True, True]
    assert reader_for(Output("none", "qwen3", "", tail="assistant\n"), tools=False).answers
    harmony = reader_for(Output("openai", "openai_gptoss", "", tail="<|start|>assistant"))
    told = []
    for piece in ("<|channel|>analysis<|message|>", "Hm.<|end|>", "<|start|>assistant<|channel|>final", "<|message|>"):
        told.append(harmony.answers)
        harmony.read(Delta(text=piece))
    assert [*told, harmony.answers] == [False, False, False, False, True]


_FRAGMENTS = sorted(
    {mark for form in TOOL_FORMATS.values() for mark in form.marks}
    | {mark for reasoning in REASONING_FORMATS.values() for mark in reasoning.marks}
    | {
        *"{}[]()\"\\'`,:;=<> \n\t",
        "a",
        "é",
        "1",
        "name",
        "arguments",
        "get_weather",
        "now",
        "call:",
        "true",
        "functions.",
    }
    | {
        '{"name": "now", "arguments": {',
        '"name": ',
        '"parameters": ',
        "<function=",
        "<parameter=",
        "</parameter>",
        "</function>",
    }
    | {"[now(", "city=", "to=functions.now", "analysis", "final", "function", "```json", '{"a": 1}'}
)


@pytest.mark.parametrize("tools", sorted(TOOL_FORMATS))
@settings(max_examples=60, deadline=None)
@given(
    fragments=st.lists(st.sampled_from(_FRAGMENTS), max_size=14),
    reasoning=st.sampled_from(["none", *REASONING_FORMATS]),
)
def test_whatever_a_model_writes_is_read_the_same_in_any_pieces(
    tools: str, fragments: list[str], reasoning: str
) -> None:
    if "openai_gptoss" in (reasoning, {"openai": "openai_gptoss"}.get(tools)):
        tools, reasoning = "openai", "openai_gptoss"
    output = Output(tools, reasoning, "".join(fragments), tail="<|start|>assistant")
    reader, seen = reader_for(output), Seen()
    so_far = ""
    for character in output.text:
        so_far += character
        delta = Delta(text=character)
        reader.read(delta)
        seen.take(delta)
        assert seen == read(reader_for(output), [so_far], end=None), so_far
    assert read(reader_for(output), list(output.text)) == read(reader_for(output), fragments)
