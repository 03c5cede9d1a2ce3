"""OpenAI's /v1/responses (https://platform.openai.com/docs/api-reference/responses), of which nothing is stored."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from zfabric.errors import ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.decode import decode, decoder, refuse_set
from zfabric.gateway.generation import Ask, answer
from zfabric.gateway.responses_input import Input, messages_of
from zfabric.gateway.responses_wording import ResponsesWording
from zfabric.gateway.sampling import TextFields, text_options


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """How much to think. Summaries are not made: what is thought is given as it is."""

    effort: str | None = None
    generate_summary: str | None = None
    summary: str | None = None


class TextForm(msgspec.Struct, forbid_unknown_fields=True):
    """What the text has to be."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(TextFields, forbid_unknown_fields=True, kw_only=True):
    """The body. Fields beside OpenAI's own are vLLM's."""

    input: str | list[Input]
    include: list[str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextForm | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    top_logprobs: int | None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Of tools that OpenAI's service runs itself, of which there are none here.
    max_tool_calls: int | None = None
    # What needs answers that are kept: refused by name, but for values that say nothing.
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    previous_response_id: str | None = None
    prompt: dict[str, Any] | None = None


_DECODER: Final = decoder(ResponsesRequest)
_KEPT: Final = ("background", "conversation", "previous_response_id", "prompt")
#: Fields of the other APIs, and what they are called here.
_ELSEWHERE: Final = {
    "max_tokens": "max_output_tokens", "response_format": "text.format", "n": None, "best_of": None, "prompt_logprobs": None,
    "return_token_ids": None, "use_beam_search": None,
}  # fmt: skip
_LOGPROBS: Final = "message.output_text.logprobs"
#: What may be wanted beside the answer. Reasoning is given in the clear, so that there is nothing to encrypt.
_INCLUDED: Final = (_LOGPROBS, "reasoning.encrypted_content")


async def responses(call: Call) -> None:
    """Answer a call."""
    request = decode(_DECODER, call.body)
    call.check_model(request.model)
    ask = Ask(request.model, None, responses_options(request))
    await answer(call, [ask], ResponsesWording(shown(request), call), stream=bool(request.stream))


ENDPOINTS: Final = (Endpoint("POST", "/v1/responses", responses),)


def responses_options(request: ResponsesRequest) -> dict[str, Any]:
    """The options of `AsyncClient.stream`. Raises: RequestError: Fields contradict one another, or are none of the fabric's."""
    for name in _KEPT:
        if getattr(request, name):
            raise UnsupportedParameterError(f"{name!r} is not supported: no answer is kept", parameter=name)
    refuse_set(request, _ELSEWHERE, "a response")
    options = text_options(request)
    options["messages"] = messages_of(request.input, request.instructions)
    options["max_tokens"] = request.max_output_tokens
    wanted = _included(request)
    if wanted or request.top_logprobs is not None:
        options["logprobs"] = request.top_logprobs or 0
    if request.parallel_tool_calls is False:
        options["parallel_tool_calls"] = False
    template = dict(request.chat_template_kwargs or {})
    if request.reasoning is not None and request.reasoning.effort is not None:
        template.setdefault("reasoning_effort", request.reasoning.effort)
    if template:
        options["chat_template_kwargs"] = template
    if request.text is not None and request.text.format is not None:
        form = _form(request.text.format)
        if form is not None:
            options["response_format"] = form
    return options | _tool_options(request)


def shown(request: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    form = request.text.format if request.text is not None else None
    effort = request.reasoning.effort if request.reasoning is not None else None
    return {
        "model": request.model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": request.temperature,
        "text": {"format": form or {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


def _included(request: ResponsesRequest) -> bool:
    """Whether log-probabilities are wanted."""
    for item in request.include or ():
        if item not in _INCLUDED:
            raise ParameterRangeError(
                f"include has {item!r}, it must be of {', '.join(_INCLUDED)}", parameter="include"
            )
    return _LOGPROBS in (request.include or ())


def _form(form: dict[str, Any]) -> dict[str, Any] | None:
    """A form of this API as the others have it."""
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "json_object"}
        case "json_schema":
            return {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    raise ParameterRangeError(
        f"text.format.type is {form.get('type')!r}, it must be text, json_object or json_schema",
        parameter="text.format",
    )


def _tool_options(request: ResponsesRequest) -> dict[str, Any]:
    """Tools and the choice among them. Raises: RequestError, UnsupportedParameterError."""
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "auto", "none"):
            raise RequestError("tool_choice is given without tools", parameter="tool_choice")
        return {}
    tools = [_tool(position, tool) for position, tool in enumerate(request.tools)]
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            allowed = choice.get("tools")
            if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
                raise RequestError("tool_choice.tools must be a list of tools", parameter="tool_choice.tools")
            names = [tool.get("name") for tool in allowed]
            tools = [tool for tool in tools if tool["function"]["name"] in names]
            choice = choice.get("mode")
        elif choice.get("type") == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        else:
            raise ParameterRangeError(
                f"tool_choice.type is {choice.get('type')!r}, it must be function or allowed_tools",
                parameter="tool_choice",
            )
    if choice == "none" or not tools:
        return {}
    return {"tools": tools} if choice in (None, "auto") else {"tools": tools, "tool_choice": choice}


def _tool(position: int, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise UnsupportedParameterError(
            f"tools[{position}].type is {tool.get('type')!r}: only functions are called, by the caller",
            parameter=f"tools[{position}].type",
        )
    if not isinstance(tool.get("name"), str):
        raise RequestError(f"tools[{position}].name must be a text", parameter=f"tools[{position}].name")
    function = {name: tool[name] for name in tool if name != "type" and tool[name] is not None}
    return {"type": "function", "function": function}
