"""OpenAI's /v1/chat/completions (https://platform.openai.com/docs/api-reference/chat): decode → client options → events."""

from __future__ import annotations

from typing import Any, Final

from zfabric.client.results import Choice, Completion
from zfabric.errors import ContextOverflowError, FabricError, ParameterRangeError, RequestError
from zfabric.gateway import sse
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.clock import created
from zfabric.gateway.counts import RunningUsage, running_usage
from zfabric.gateway.decode import decode, decoder, without_nulls
from zfabric.gateway.errors import error_body
from zfabric.gateway.generation import Ask, answer
from zfabric.gateway.lengths import check_lengths
from zfabric.gateway.sampling import TextFields, check_stops, text_options
from zfabric.gateway.words import all_besides, besides, chat_logprobs, stopped_by, usage_object
from zfabric.wire.payloads import Delta
from zfabric.wire.tool_calls import ToolCallDelta


class ChatRequest(TextFields, forbid_unknown_fields=True, kw_only=True):
    """The body. Fields beside OpenAI's own are vLLM's."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    modalities: list[str] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    include_reasoning: bool | None = None


_DECODER: Final = decoder(ChatRequest)
#: Values that say what holds anyway; others go to the client library, which refuses by name what the fabric lacks.
_USUAL: Final[dict[str, Any]] = {
    "parallel_tool_calls": True, "add_generation_prompt": True, "continue_final_message": False, "tool_choice": "auto",
}  # fmt: skip
_PASSED: Final = (*_USUAL, "chat_template", "chat_template_kwargs", "documents")


async def chat(call: Call) -> None:
    """Answer a call."""
    request = decode(_DECODER, call.body)
    call.check_model(request.model)
    ask = Ask(request.model, None, chat_options(request))
    await check_lengths(call, [ask])
    wording = ChatWording(request, f"chatcmpl-{call.id}", await running_usage(call, request, [ask]))
    await answer(call, [ask], wording, stream=bool(request.stream))


def _errors(error: FabricError, status: int, _request_id: str) -> bytes:
    """OpenAI's words; what is too long in a chat are its messages."""
    if isinstance(error, ContextOverflowError):
        error.details.setdefault("parameter", "messages")
    return error_body(error, status)


ENDPOINTS: Final = (Endpoint("POST", "/v1/chat/completions", chat, _errors),)


def chat_options(request: ChatRequest) -> dict[str, Any]:
    """The options of `AsyncClient.stream`. Raises: RequestError: Fields contradict one another."""
    check_stops(request)
    options = text_options(request)
    options["messages"] = [_message(message) for message in request.messages]
    # Not given is what the context leaves, as in OpenAI's API.
    lengths = [length for length in (request.max_completion_tokens, request.max_tokens) if length is not None]
    if lengths and lengths[0] != lengths[-1]:
        raise RequestError(
            f"max_completion_tokens is {lengths[0]} and max_tokens is {lengths[-1]}, give one", parameter="max_tokens"
        )
    options["max_tokens"] = lengths[0] if lengths else None
    if request.logprobs:
        options["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs is not None:
        raise RequestError("top_logprobs is given without logprobs", parameter="top_logprobs")
    if any(modality != "text" for modality in request.modalities or ()):
        raise ParameterRangeError(f"modalities is {request.modalities}, it must be text", parameter="modalities")
    if request.tools:
        options["tools"] = request.tools
    elif request.tool_choice is not None and not request.tools:
        raise RequestError("tool_choice is given without tools", parameter="tool_choice")
    for name in _PASSED:
        value = getattr(request, name)
        if value is not None and value != _USUAL.get(name):
            options[name] = value
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "continue_final_message goes on with the last message, add_generation_prompt begins another: set one of them",
            parameter="continue_final_message",
        )
    if request.reasoning_effort is not None:
        # Templates that know it take it by this name, as vLLM gives it to them.
        options["chat_template_kwargs"] = {
            "reasoning_effort": request.reasoning_effort, **(request.chat_template_kwargs or {}),
        }  # fmt: skip
    return options


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates have it. "developer" is OpenAI's newer word for "system"."""
    taken = without_nulls(message)
    if taken.get("role") == "assistant":
        # An answer of nothing but calls has none, and most templates take a text for given.
        taken.setdefault("content", "")
    elif "content" in message:
        taken["content"] = message["content"]
    if taken.get("role") == "developer":
        taken["role"] = "system"
    return taken


class ChatWording:
    """How an answer reads, as a stream and whole."""

    def __init__(self, request: ChatRequest, name: str, running: RunningUsage | None = None) -> None:
        self._request = request
        self._running = running
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        self._reasoning = request.include_reasoning is not False
        self._head = {
            "id": name,
            "object": "chat.completion.chunk",
            "created": created(),
            "model": request.model,
        }
        #: For each choice that has begun.
        self._texts: dict[int, sse.TextEvents] = {}
        self._called: set[int] = set()
        self._plain = not request.return_token_ids and running is None

    def delta(self, position: int, delta: Delta) -> bytes:
        texts = self._texts.get(delta.index)
        begin = b""
        if texts is None:
            begin = self._begin(delta.index)
            texts = self._texts[delta.index]
        if (
            self._plain
            and delta.finish_reason is None
            and delta.logprobs is None
            and not delta.reasoning
            and not delta.tool_calls
            and not delta.extra
        ):
            return begin + texts.of(delta.text) if delta.text else begin
        return begin + self._rich(delta)

    def ending(self, completions: list[Completion]) -> bytes:
        if not self._usage:
            return sse.DONE
        return sse.event({**self._head, "choices": [], "usage": usage_object(completions)}) + sse.DONE

    def failure(self, error: FabricError) -> bytes:
        return sse.failure(error)

    def whole(self, completions: list[Completion]) -> bytes:
        [completion] = completions
        return sse.encode(
            {
                **self._head,
                "object": "chat.completion",
                "choices": [self._choice(choice) for choice in completion.choices],
                "usage": usage_object(completions),
                **all_besides(completions),
            }
        )

    def _begin(self, index: int) -> bytes:
        """The first event of a choice, which has its role."""
        head = sse.encode(self._head)[:-1]
        usage = b',"usage":null' if self._usage else b""
        if self._running is not None:
            usage = b',"usage":' + sse.encode(self._running.of(0, index))
        after = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}"
        before = head + b',"choices":[{"index":%d,"delta":{' % index
        self._texts[index] = sse.TextEvents(before + b'"content":', after)
        return b"data: " + before + b'"role":"assistant","content":""' + after + b"\n\n"

    def _rich(self, delta: Delta) -> bytes:
        said: dict[str, Any] = {}
        if delta.text:
            said["content"] = delta.text
        if delta.reasoning and self._reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            said["tool_calls"] = [_call_piece(piece) for piece in delta.tool_calls]
            self._called.add(delta.index)
        logprobs = (
            chat_logprobs(delta.logprobs, self._request.top_logprobs or 0) if delta.logprobs is not None else None
        )
        choice = {
            "index": delta.index,
            "delta": said,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            **stopped_by(delta),
        }
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        elif (
            not said and logprobs is None and delta.finish_reason is None and self._running is None and not delta.extra
        ):
            return b""
        usage: dict[str, Any] = {"usage": None} if self._usage else {}
        if self._running is not None:
            usage = {"usage": self._running.of(0, delta.index, delta)}
        return sse.event({**self._head, "choices": [choice], **usage, **besides(delta.extra or {})})

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            message = {**message, **choice.message}
        if choice.reasoning and self._reasoning:
            message["reasoning_content"] = choice.reasoning
        logprobs = None
        if choice.logprobs is not None:
            logprobs = chat_logprobs(choice.logprobs, self._request.top_logprobs or 0)
        said = {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        said |= stopped_by(choice)
        return {**said, "token_ids": choice.token_ids} if self._request.return_token_ids else said


def _call_piece(piece: ToolCallDelta) -> dict[str, Any]:
    if piece.id is None and piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
