"""Our parsers beside vLLM's own of the same names, on the same outputs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.backends.scripted import tokenizer
from tests.parsing.outputs import OUTPUTS, TOOLS, Output
from zfabric.backends.front.parsing.formats import REASONING_FORMATS, TOOL_FORMATS

#: Where vLLM reads something else, by the beginning of the text.
OTHERS = {
    '<tool_call>{"name": "get_weather", "arguments": "': "arguments stay a text",
    '<tool_call>{"name": "now"}': "a call without arguments is none",
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}</tool_call>': "a brace that lacks makes it no call",
    '{"name": "Bob"': "any object with a name and parameters is a call there, whatever tools there are",
    "[TOOL_CALLS] [": "the older form is read with the older of Mistral's own tokenizers alone",
    "Yes.[TOOL_CALLS]": "an id before the arguments becomes part of the name",
    "<|python_start|>": "read by another name, llama4_pythonic",
    "Hm.</think>\n\nWait.": "read by another name, deepseek_v31",
    "<|channel>thought": "numbers within objects whose type nothing says stay texts",
}
READ = [one for one in OUTPUTS if not one.text.startswith(tuple(OTHERS))]


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer with all marks, which vLLM's parsers look for."""
    made = tokenizer()
    marks = {mark for one in TOOL_FORMATS.values() for mark in one.marks}
    marks |= {mark for form in REASONING_FORMATS.values() for mark in form.marks}
    made.add_tokens([AddedToken(mark, special=True) for mark in sorted(marks)])
    return made


@pytest.fixture(scope="module")
def request_there() -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "x"}], tools=TOOLS, tool_choice="auto"
    )


# Of gpt-oss vLLM has no parser of texts: its own reads tokens of the real vocabulary.
CALLING = [
    pytest.param(one, id=f"{one.tools}-{at}") for at, one in enumerate(READ) if one.tools not in ("none", "openai")
]
THINKING = [
    pytest.param(one, id=f"{one.reasoning}-{at}")
    for at, one in enumerate(OUTPUTS)
    if one.reasoning in ("qwen3", "deepseek_r1") and one.thought
]


@pytest.mark.parametrize("output", CALLING)
def test_calls_are_those_that_vllm_reads(output: Output, words: Any, request_there: Any) -> None:
    from vllm.tool_parsers import ToolParserManager

    parser = ToolParserManager.get_tool_parser(output.tools)(words, request_there.tools)
    found = parser.extract_tool_calls(output.text, request_there)
    calls = tuple((call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls)
    assert calls == output.calls


@pytest.mark.parametrize("output", THINKING)
def test_reasoning_is_what_vllm_reads(output: Output, words: Any, request_there: Any) -> None:
    """But for white space at its ends, which belongs to the chat template."""
    from vllm.reasoning import ReasoningParserManager

    parser = ReasoningParserManager.get_reasoning_parser(output.reasoning)(words)
    reasoning, _ = parser.extract_reasoning(output.text, request_there)
    assert (reasoning or "").strip() == output.thought
