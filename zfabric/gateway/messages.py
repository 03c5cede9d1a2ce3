"""Anthropic's /v1/messages and its count of tokens (https://docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from zfabric.errors import ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.decode import decode, decoder, refuse_set
from zfabric.gateway.generation import Ask, answer
from zfabric.gateway.messages_input import chat_of
from zfabric.gateway.messages_wording import MessagesWording, error_envelope, message_status
from zfabric.gateway.sampling import TextFields, text_options
from zfabric.gateway.sse import encode


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    """Whether to think before the answer. How long is the model's own matter: `max_tokens` bounds both."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized"] | None = None


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    """How much to think, and what the text has to be."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class ChatFields(TextFields, forbid_unknown_fields=True, kw_only=True):
    """What a prompt is made of."""

    messages: list[dict[str, Any]]
    cache_control: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    system: str | list[dict[str, Any]] | None = None
    thinking: Thinking | None = None
    tool_choice: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(ChatFields, forbid_unknown_fields=True, kw_only=True):
    """The body. Fields beside Anthropic's own are vLLM's."""

    max_tokens: int
    metadata: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None


_MESSAGES: Final = decoder(MessagesRequest)
_COUNT: Final = decoder(ChatFields)
#: Fields of the other APIs, and what they are called here.
_ELSEWHERE: Final = {
    "stop": "stop_sequences", "response_format": "output_config.format", "n": None, "best_of": None, "prompt_logprobs": None,
    "return_token_ids": None, "stream_options": None, "use_beam_search": None, "user": "metadata.user_id",
}  # fmt: skip
_CHOICES: Final = ("auto", "any", "tool", "none")


async def messages(call: Call) -> None:
    """Answer a call."""
    request = decode(_MESSAGES, call.body)
    call.check_model(request.model)
    ask = Ask(request.model, None, message_options(request))
    await answer(call, [ask], MessagesWording(request.model, call), stream=bool(request.stream))


async def count_tokens(call: Call) -> None:
    """Answer a call with the tokens that an answer would start from."""
    request = decode(_COUNT, call.body)
    model = call.check_model(request.model)
    # Who counts is not sent to where a prompt's cache is.
    for name in text_options(request).keys() - {"affinity"}:
        raise UnsupportedParameterError(f"{name!r} is not a parameter of a count", parameter=name)
    options = _chat_options(request)
    for name in ("response_format", "tool_choice", "parallel_tool_calls"):
        # They say nothing to a template.
        options.pop(name, None)
    tokens = await call.unless_left(call.client.count_tokens(model, **options))
    await call.response.whole(200, encode({"input_tokens": tokens}))


def message_options(request: MessagesRequest) -> dict[str, Any]:
    """The options of `AsyncClient.stream`. Raises: RequestError: Fields contradict one another, or are none of the fabric's."""
    refuse_set(request, _ELSEWHERE, "a message")
    options = text_options(request) | _chat_options(request)
    options["max_tokens"] = request.max_tokens
    if request.stop_sequences:
        options["stop"] = request.stop_sequences
    return options


def _chat_options(request: ChatFields) -> dict[str, Any]:
    options: dict[str, Any] = {"messages": chat_of(request.messages, request.system)}
    if request.messages and request.messages[-1].get("role") == "assistant":
        # Here the answer begins where the caller's last message of the assistant ends.
        options["continue_final_message"] = True
    template = dict(request.chat_template_kwargs or {})
    if request.thinking is not None and request.thinking.type != "adaptive":
        template.setdefault("enable_thinking", request.thinking.type == "enabled")
    config = request.output_config or OutputConfig()
    if config.effort is not None:
        template.setdefault("reasoning_effort", config.effort)
    if template:
        options["chat_template_kwargs"] = template
    if config.format is not None:
        options["response_format"] = _form(config.format)
    return options | _tool_options(request)


def _form(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise ParameterRangeError(
            f"output_config.format.type is {form.get('type')!r}, it must be json_schema, with a schema",
            parameter="output_config.format",
        )
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form["schema"]}}


def _tool_options(request: ChatFields) -> dict[str, Any]:
    """Tools and the choice among them. Raises: RequestError, UnsupportedParameterError."""
    choice = request.tool_choice or {"type": "auto"}
    kind = choice.get("type")
    if not request.tools:
        if kind not in ("auto", "none"):
            raise RequestError("tool_choice is given without tools", parameter="tool_choice")
        return {}
    tools = [_tool(position, tool) for position, tool in enumerate(request.tools)]
    if kind not in _CHOICES:
        raise ParameterRangeError(
            f"tool_choice.type is {kind!r}, it must be auto, any, tool or none", parameter="tool_choice.type"
        )
    if kind == "none":
        return {}
    options: dict[str, Any] = {"tools": tools}
    if kind == "tool":
        options["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind == "any":
        options["tool_choice"] = "required"
    if choice.get("disable_parallel_tool_use"):
        options["parallel_tool_calls"] = False
    return options


def _tool(position: int, tool: dict[str, Any]) -> dict[str, Any]:
    where = f"tools[{position}]"
    if tool.get("type") not in (None, "custom"):
        raise UnsupportedParameterError(
            f"{where}.type is {tool['type']!r}: only tools with an input_schema of their own are known",
            parameter=f"{where}.type",
        )
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
        raise RequestError(f"{where} must have a name and an input_schema", parameter=where)
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": function}


ENDPOINTS: Final = tuple(
    Endpoint("POST", path, handle, error_envelope, message_status, b"request-id")
    for path, handle in (("/v1/messages", messages), ("/v1/messages/count_tokens", count_tokens))
)
