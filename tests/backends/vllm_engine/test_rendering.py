"""Messages become the same tokens by vLLM's renderer, as its worker uses it, and by the front of all other backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.backends.tiny import byte_tokenizer
from zfabric.backends.front.prompts import PromptTokens
from zfabric.backends.vllm_engine.prompts import Prompts
from zfabric.errors import UnsupportedOperationError
from zfabric.wire.chat import ChatOptions, Message
from zfabric.wire.payloads import CountRequest

#: In the manner of models that write calls as JSON within tags, and that think unless told otherwise.
TAGGED = (
    "{%- if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}<tools>"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{%- elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}<|im_start|>user\n"
    "<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{%- elif m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    '{%- for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>{%- endfor %}<|im_end|>\n{%- endif %}{%- endfor %}'
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{%- endif %}{%- endif %}"
)
#: In the manner of models whose messages are parts, results of tools included.
PARTS = (
    "{%- for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{%- endfor %}"
    "{%- for m in messages %}<{{ m.role }}>"
    "{%- for part in m.content %}{%- if part.type == 'text' %}{{ part.text }}|"
    "{%- endif %}{%- endfor %}{%- endfor %}{%- if add_generation_prompt %}<assistant>{%- endif %}"
)
#: The same, where results of tools are texts.
PARTS_AND_TEXTS = (
    "{%- for m in messages %}<{{ m.role }}>{%- if m.role == 'tool' %}{{ m.content }}{%- else %}"
    "{%- for part in m.content %}{%- if part.type == 'text' %}{{ part.text }}|"
    "{%- endif %}{%- endfor %}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<assistant>{%- endif %}"
)
#: Takes either, and begins with blanks and an end of a line, which the template's language leaves out.
EITHER = (
    "  {% for m in messages %}\n<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: One for each kind of request.
SEVERAL = {
    "default": "default" + TAGGED,
    "tool_use": "tool_use" + TAGGED,
    "rag": "rag{% for d in documents %}[{{ d.title }}: {{ d.text }}]{% endfor %}" + TAGGED,
}
TEMPLATES: dict[str, Any] = {
    "tagged": TAGGED, "parts": PARTS, "parts and texts": PARTS_AND_TEXTS, "either": EITHER, "several": SEVERAL,
}  # fmt: skip

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
USER: Message = {"role": "user", "content": "How is the weather in Zürich?"}
TWO: Message = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Zürich"}'}}
    ],
}
RESULT: Message = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
RESULT_PARTS: Message = {
    "role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}, {"type": "text", "text": "7 °C"}],
}  # fmt: skip
DOCUMENTS = [{"title": "Lakes", "text": "Zürich lies at one."}]

#: Messages, tools, and what the template is told.
CHATS: dict[str, tuple[list[Message], list[dict[str, Any]] | None, ChatOptions | None]] = {
    "user": ([USER], None, None),
    "system": ([SYSTEM, USER], None, None),
    "developer": ([{"role": "developer", "content": "Be brief."}, USER], None, None),
    "parts": ([SYSTEM, TWO], None, None),
    "turns": ([USER, {"role": "assistant", "content": "Wet."}, USER], None, None),
    "tools": ([SYSTEM, USER], [TOOL], None),
    "empty list of tools": ([USER], [], None),
    "result": ([USER, CALL, RESULT], [TOOL], None),
    "result of parts": ([USER, CALL, RESULT_PARTS, USER], [TOOL], None),
    "documents": ([USER], None, ChatOptions(documents=DOCUMENTS)),
    "documents and tools": ([USER], [TOOL], ChatOptions(documents=DOCUMENTS)),
    "no thoughts": ([USER], None, ChatOptions(chat_template_kwargs={"enable_thinking": False})),
    "thoughts": ([USER], None, ChatOptions(chat_template_kwargs={"enable_thinking": True})),
    "no beginning": ([USER], None, ChatOptions(add_generation_prompt=False)),
}  # fmt: skip

Make = Callable[[Any], tuple[Prompts, PromptTokens, Any]]


@pytest.fixture(scope="module")
def make(vllm_llama: Path) -> Make:
    """vLLM's renderer without an engine, and the front, for a template or several."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.hf import HfRenderer

    config = EngineArgs(model=str(vllm_llama), dtype="float32", max_model_len=512).create_engine_config()

    def made(template: Any) -> tuple[Prompts, PromptTokens, Any]:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        engine = SimpleNamespace(renderer=HfRenderer(config, tokenizer), vllm_config=config)
        return (
            Prompts(engine, 512, None),
            PromptTokens(tokenizer, vocabulary_size=1_000, context_length=None),
            tokenizer,
        )

    return made


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
async def test_both_make_the_same_tokens(make: Make, template: str, chat: str) -> None:
    vllm, front, tokenizer = make(TEMPLATES[template])
    messages, tools, told = CHATS[chat]
    theirs = await vllm.of_count(CountRequest(messages=messages, tools=tools, chat=told))
    ours = front.make(None, messages, None, tools, told)
    assert tokenizer.decode(theirs) == tokenizer.decode(ours)
    assert theirs == ours


@pytest.mark.parametrize(
    ("chat", "name"),
    [
        ("user", "default"),
        ("empty list of tools", "default"),
        ("tools", "tool_use"),
        ("documents", "rag"),
        ("documents and tools", "tool_use"),
    ],
)
async def test_vllm_takes_the_template_that_is_for_the_request(make: Make, chat: str, name: str) -> None:
    vllm, _, tokenizer = make(SEVERAL)
    messages, tools, told = CHATS[chat]
    tokens = await vllm.of_count(CountRequest(messages=messages, tools=tools, chat=told))
    assert tokenizer.decode(tokens).startswith(name)


async def test_without_a_default_template_only_what_has_one_is_served(make: Make) -> None:
    vllm, front, tokenizer = make({"tool_use": SEVERAL["tool_use"]})
    assert vllm.chat
    tokens = await vllm.of_count(CountRequest(messages=[USER], tools=[TOOL]))
    assert tokenizer.decode(tokens).startswith("tool_use")
    with pytest.raises(UnsupportedOperationError, match="tool_use"):
        await vllm.of_count(CountRequest(messages=[USER]))
    with pytest.raises(UnsupportedOperationError, match="tool_use"):
        front.make(None, [USER], None)
