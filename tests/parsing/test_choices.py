"""Which format a model has, and calls that are asked for."""

# ruff: noqa: E501 — templates have lines of their own

from __future__ import annotations

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from tests.parsing.outputs import TOOLS
from tests.parsing.test_formats import request_for
from zfabric.backends.front.call_ids import call_id
from zfabric.backends.front.parsing import AnswerFormat, force_calls, template_text
from zfabric.backends.front.parsing.forcing import calls_schema
from zfabric.errors import ConfigurationError, RequestError
from zfabric.wire.chat import ChatOptions
from zfabric.wire.payloads import TextRequest
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.tools import functions

#: Parts of chat templates as the families have them, with what they tell.
TEMPLATES = [
    ("<tool_call>\\n{\"name\": \"' ~ tool_call.name ~ '\", \"arguments\": ' … message.content.split('</think>')", "hermes", "qwen3"),
    ("<tool_call>\\n{'name': <function-name>, 'arguments': <args-dict>}\\n</tool_call>", "hermes", "none"),
    ("<tool_call>\\n<function=' + tool_call.name + '>\\n' … '<parameter=' + args_name + '>\\n'", "qwen3_coder", "none"),
    ("<|start_header_id|>ipython … {\"name\": function name, \"parameters\": dictionary … '<|python_tag|>'", "llama3_json", "none"),
    ("[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]", "pythonic", "none"),
    ("'[TOOL_CALLS]' … tool_call_id|length != 9", "mistral", "none"),
    ("'[THINK]' + … + '[/THINK]' … '[TOOL_CALLS]' + name + '[ARGS]'", "mistral", "mistral"),
    ("<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'", "deepseek_v3", "none"),
    ("<｜Assistant｜> … content.split('</think>') … <｜tool▁call▁begin｜>", "deepseek_v3", "deepseek_r1"),
    ("'<start_function_call>call:' + name + '{'", "functiongemma", "none"),
    ("'<|channel>thought' … '<|tool_call>call:'", "gemma4", "gemma4"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "openai", "openai_gptoss"),
    ("<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'", "none", "none"),
    ("", "none", "none"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "tools", "reasoning"), TEMPLATES)
def test_the_chat_template_tells_the_format(template: str, tools: str, reasoning: str) -> None:
    assert AnswerFormat(template).details == {"tool_parser": tools, "reasoning_parser": reasoning}
    assert AnswerFormat(template, tools="none", reasoning="none").details == {
        "tool_parser": "none",
        "reasoning_parser": "none",
    }
    assert AnswerFormat(template, tools="hermes").tools == "hermes"


def test_all_templates_of_a_tokenizer_tell() -> None:
    assert template_text({"default": "a", "tool_use": "<tool_call> arguments"}) == "a\n<tool_call> arguments"
    assert template_text(None) == ""


def test_a_format_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="tool_parser is 'hermess', it must be one of auto, none, deepseek_v3"):
        AnswerFormat("", tools="hermess")
    with pytest.raises(ConfigurationError, match="reasoning_parser is 'hermes'"):
        AnswerFormat("", reasoning="hermes")


def test_what_goes_beyond_a_format_is_not_announced() -> None:
    assert AnswerFormat("", tools="hermes").missing == frozenset()
    assert AnswerFormat("").missing == {"parallel_tool_calls"}
    assert AnswerFormat("", tools="none").missing == {"tool_choice", "parallel_tool_calls"}


def test_a_prompt_that_is_no_chat_is_not_read() -> None:
    form = AnswerFormat("", tools="hermes", reasoning="qwen3")
    request = request_for()
    request.messages, request.prompt = None, "x"
    assert form.reader(request, lambda _: "") is None


@pytest.mark.parametrize(
    ("choice", "tools", "told"),
    [
        ("always", TOOLS, "tool_choice is 'always'"),
        ({"type": "function"}, TOOLS, "tool_choice is"),
        ({"type": "allowed_tools", "function": {"name": "now"}}, TOOLS, "tool_choice is"),
        ({"type": "function", "function": {"name": "later"}}, TOOLS, "'later', tools are get_weather, now"),
        ("required", None, "'a call', tools are none"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(choice: Any, tools: Any, told: str) -> None:
    request = TextRequest(messages=[{"role": "user"}], tools=tools, chat=ChatOptions(tool_choice=choice))
    with pytest.raises(RequestError, match=told):
        request.validate()


def test_only_what_is_unusual_has_to_be_honoured() -> None:
    def options(**chat: Any) -> set[str]:
        return set(TextRequest(messages=[{}], tools=TOOLS, chat=ChatOptions(**chat)).options)

    assert options(tool_choice="auto", parallel_tool_calls=True) == {"tools"}
    assert options(tool_choice="none") == {"tools"}
    assert options(tool_choice="required", parallel_tool_calls=False) == {"tools", "tool_choice", "parallel_tool_calls"}


def test_a_forced_list_of_calls_has_the_tools_schemas() -> None:
    schema = calls_schema(functions(TOOLS), parallel=True)
    jsonschema.Draft202012Validator.check_schema(schema)
    known = jsonschema.Draft202012Validator(schema)
    right = [{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "now", "parameters": {}}]
    assert known.is_valid(right)
    wrongs: list[Any] = [
        [],
        right[0],
        [{"name": "x", "parameters": {}}],
        [{"name": "get_weather", "parameters": {"days": 1}}],
    ]
    assert not any(known.is_valid(wrong) for wrong in wrongs)
    one = jsonschema.Draft202012Validator(calls_schema(functions(TOOLS), parallel=False))
    assert one.is_valid(right[:1])
    assert not one.is_valid(right)


def test_definitions_of_tools_move_to_the_root() -> None:
    city = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": {"type": "string"}}}
    known = jsonschema.Draft202012Validator(calls_schema({"a": city, "b": city}, parallel=True))
    assert known.is_valid([{"name": "b", "parameters": {"city": "x"}}])
    assert not known.is_valid([{"name": "b", "parameters": {"city": 1}}])
    with pytest.raises(RequestError, match="'City'"):
        calls_schema({"a": city, "b": {**city, "$defs": {"City": {"type": "integer"}}}}, parallel=True)


def test_a_function_that_is_chosen_has_its_own_schema() -> None:
    request = request_for(tool_choice={"type": "function", "function": {"name": "get_weather"}})
    force_calls(request)
    assert request.sampling.guided_json is not None
    assert json.loads(request.sampling.guided_json) == TOOLS[0]["function"]["parameters"]
    plain = request_for()
    force_calls(plain)
    assert plain.sampling == SamplingParams()


def test_a_forced_call_cannot_follow_something_else() -> None:
    request = request_for(tool_choice="required")
    request.response_format = {"type": "json_object"}
    with pytest.raises(RequestError, match="response_format"):
        force_calls(request)


def test_ids_have_the_length_that_a_template_wants() -> None:
    assert len(call_id("5f-77-0", 0, 1, 9)) == 9
    assert call_id("5f-77-0", 0, 1, 9) == call_id("5f-77-1", 0, 1, 9) != call_id("5f-77-0", 0, 2, 9)
    assert call_id("5f-77-0", 0, 1, 9).isalnum()
