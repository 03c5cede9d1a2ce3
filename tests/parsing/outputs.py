"""What models of each family write, as their chat templates and vLLM's parsers have it, and what is in it."""

# ruff: noqa: E501 — what models write has its own lines

from __future__ import annotations

from typing import Any, NamedTuple

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "more": {"type": "object"},
                    "list": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


class Output(NamedTuple):
    """What a model wrote.

    Attributes:
        tools, reasoning: Names of the parsers.
        text: All of it, special tokens included.
        calls: Names, and arguments as values.
        shown, thought: What is text, and what is reasoning.
        tail: How the prompt ends.
        verbatim: Arguments as they are written; None where they are put together here.
    """

    tools: str
    reasoning: str
    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    shown: str = ""
    thought: str = ""
    tail: str = "<|im_start|>assistant\n"
    verbatim: tuple[str, ...] | None = None


_PARIS = ("get_weather", {"city": "Paris"})
_TWO: tuple[tuple[str, dict[str, Any]], ...] = (_PARIS, ("now", {}))
_WIDE = (
    "get_weather",
    {"city": 'Çeşme, "old"\n{town}', "days": 3, "exact": True, "more": {"a": [1, None]}, "list": ["x", "y"]},
)
_WIDE_JSON = (
    '{"city": "Çeşme, \\"old\\"\\n{town}", "days": 3, "exact": true, "more": {"a": [1, null]}, "list": ["x", "y"]}'
)

HERMES = [
    Output(
        "hermes",
        "none",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        (_PARIS,),
        verbatim=('{"city": "Paris"}',),
    ),
    Output(
        "hermes",
        "none",
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        _TWO,
        "Let me see.",
    ),
    Output(
        "hermes",
        "none",
        f'<tool_call>{{"name": "get_weather", "arguments": {_WIDE_JSON}}}</tool_call>',
        (_WIDE,),
        verbatim=(_WIDE_JSON,),
    ),
    Output(
        "hermes", "none", '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', (_PARIS,)
    ),
    Output(
        "hermes",
        "none",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        (_PARIS,),
    ),
    Output("hermes", "none", '<tool_call>{"name": "now"}</tool_call>', (("now", {}),)),
    Output(
        "hermes", "none", '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}</tool_call>', (_PARIS,)
    ),
    Output("hermes", "none", "<tool_call> is how I would call.", (), "<tool_call> is how I would call."),
    Output("hermes", "none", "a < b and <tool", (), "a < b and <tool"),
    Output(
        "hermes",
        "qwen3",
        '<think>\nThe city is\n\nParis.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "Paris"}}\n</tool_call>',
        (_PARIS,),
        "",
        "The city is\n\nParis.",
    ),
    Output(
        "hermes",
        "qwen3",
        "Sure.\n</think>\n\nHi there.\n",
        (),
        "Hi there.\n",
        "Sure.",
        "<|im_start|>assistant\n<think>\n",
    ),
    Output("hermes", "qwen3", "No thought </think>.", (), "No thought </think>."),
    Output("hermes", "qwen3", "Hi <think>", (), "Hi <think>", "", "<think>\n\n</think>\n\n"),
    Output("hermes", "qwen3", "  as it is \n", (), "  as it is \n"),
]
LLAMA = [
    Output(
        "llama3_json",
        "none",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        (_PARIS,),
        verbatim=('{"city": "Paris"}',),
    ),
    Output(
        "llama3_json",
        "none",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
        _TWO,
    ),
    Output(
        "llama3_json", "none", '{"type": "function", "name": "get_weather", "parameters": ' + _WIDE_JSON + "}", (_WIDE,)
    ),
    Output(
        "llama3_json",
        "none",
        '{"name": "Bob", "parameters": {"age": 3}}',
        (),
        '{"name": "Bob", "parameters": {"age": 3}}',
    ),
    Output("llama3_json", "none", '{"name": "now", "age": 3}', (), '{"name": "now", "age": 3}'),
    Output("llama3_json", "none", "The set {1, 2}.", (), "The set {1, 2}."),
]
MISTRAL = [
    Output(
        "mistral",
        "none",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        _TWO,
    ),
    Output("mistral", "none", f"[TOOL_CALLS]get_weather[ARGS]{_WIDE_JSON}", (_WIDE,), verbatim=(_WIDE_JSON,)),
    Output(
        "mistral",
        "none",
        'Yes.[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}',
        _TWO,
        "Yes.",
    ),
    Output("mistral", "mistral", "[THINK]Well.[/THINK]A list: [1, [2]].", (), "A list: [1, [2]].", "Well."),
]
QWEN_CODER = [
    Output(
        "qwen3_coder",
        "none",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        _TWO,
    ),
    Output(
        "qwen3_coder",
        "none",
        'I look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nÇeşme, "old"\n{town}\n</parameter>\n'
        '<parameter=days>\n3\n</parameter>\n<parameter=exact>\ntrue\n</parameter>\n<parameter=more>\n{"a": [1, null]}\n</parameter>\n'
        '<parameter=list>\n["x", "y"]\n</parameter>\n</function>\n</tool_call>',
        (_WIDE,),
        "I look.",
    ),
    Output(
        "qwen3_coder",
        "none",
        "<function=get_weather>\n<parameter=city>\n5\n</parameter>\n</function>",
        (("get_weather", {"city": "5"}),),
    ),
    Output("qwen3_coder", "none", "See <tool_call> there.", (), "See <tool_call> there."),
]
PYTHONIC = [
    Output("pythonic", "none", "[get_weather(city='Paris'), now()]", _TWO),
    Output(
        "pythonic",
        "none",
        '<|python_start|>[get_weather(city="Çeşme, \\"old\\"\\n{town}", days=3, exact=true, more={\'a\': [1, None]}, '
        "list=['x', \"y\"])]<|python_end|>",
        (_WIDE,),
    ),
    Output("pythonic", "none", "[1, 2](see)", (), "[1, 2](see)"),
    Output("pythonic", "none", "[other(1)]", (), "[other(1)]"),
]
DEEPSEEK = [
    Output(
        "deepseek_v3",
        "none",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        _TWO,
        verbatim=('{"city": "Paris"}', "{}"),
    ),
    Output(
        "deepseek_v3",
        "deepseek_r1",
        "Hm.</think>\n\nWait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        + _WIDE_JSON
        + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (_WIDE,),
        "Wait.",
        "Hm.",
        "<｜Assistant｜>",
    ),
    Output("deepseek_v3", "deepseek_r1", "Hi.", (), "Hi.", "", "<｜Assistant｜></think>"),
    Output("none", "deepseek_r1", "<think>\nHm.\n</think>\nHi.", (), "Hi.", "Hm.", "<｜Assistant｜><think>\n"),
]
GEMMA = [
    Output(
        "functiongemma",
        "none",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>",
        _TWO,
    ),
    Output(
        "gemma4",
        "gemma4",
        '<|channel>thought\nHm.<channel|><|tool_call>call:get_weather{city:<|"|>Çeşme, "old"\n{town}<|"|>,days:3,'
        'exact:true,more:{a:[1,null]},list:[<|"|>x<|"|>,<|"|>y<|"|>]}<tool_call|>',
        (_WIDE,),
        "",
        "Hm.",
    ),
    Output("gemma4", "gemma4", "Hi <there>.", (), "Hi <there>."),
]
HARMONY = [
    Output("openai", "openai_gptoss", "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>commentary "
           "to=functions.get_weather <|constrain|>json<|message|>{\"city\": \"Paris\"}<|call|>", (_PARIS,), "", "Need the weather.",
           "<|start|>assistant", ('{"city": "Paris"}',)),
    Output("openai", "openai_gptoss", "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>", (), "Hi.",
           "A.", "<|start|>assistant"),
    Output("openai", "openai_gptoss", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary"
           f" json<|message|>{_WIDE_JSON}<|end|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{{}}", (_WIDE, ("now", {})), "I look.",
           "", "<|start|>assistant"),
]  # fmt: skip
OUTPUTS = [*HERMES, *LLAMA, *MISTRAL, *QWEN_CODER, *PYTHONIC, *DEEPSEEK, *GEMMA, *HARMONY]
