"""What a client and a worker say to each other. The controller passes these bodies on unread.

These structs are also the public vocabulary of the library: `SamplingParams` goes in, `Delta` comes out, and a backend
sees exactly what the client's caller wrote. On the wire each is a MessagePack array in field order (docs/protocol/messages.md).
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from zfabric.errors import (
    RequestError,
    UnsupportedOperationError,
)
from zfabric.wire.chat import ChatOptions, Message, check_chat, check_response_format, options_of
from zfabric.wire.extra import check_extra
from zfabric.wire.sampling import SamplingOptions, SamplingParams, out_of_range
from zfabric.wire.tasks import (
    ClassifyRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedTokensRequest,
    RewardRequest,
    ScoreRequest,
)
from zfabric.wire.tool_calls import ToolCallDelta

FinishReason = Literal["stop", "length", "abort", "tool_calls"]


class Usage(Struct, array_like=True, frozen=True):
    """Exact token counts. A continued answer counts its prompt and its tokens once.

    Attributes:
        prompt_tokens: Of the prompt.
        completion_tokens: Of the answer, all choices together.
        cached_tokens: Of the prompt's, those that a cache had.
        estimated: The backend made the counts itself, because its engine reports none.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Logprob(Struct, array_like=True, frozen=True, gc=False):
    """One token's probability by the model itself, before temperature and all else.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability.
        text: What it reads as alone.
        rank: Its place among all tokens, from 1; None where the engine does not tell.
    """

    token_id: int
    logprob: float
    text: str = ""
    rank: int | None = None


class TokenLogprobs(Struct, array_like=True, frozen=True):
    """One position of a text.

    Attributes:
        token: The token that stands there.
        top: The likeliest alternatives, most likely first.
    """

    token: Logprob
    top: list[Logprob] = []


class Delta(Struct, kw_only=True, gc=False):
    """What an engine step adds to one choice of an answer.

    Attributes:
        text: New text, never half a character. May be empty while a stop string might still be completed.
        token_ids: New tokens. Backends whose engine tells none leave it empty.
        index: The choice, 0 … n-1.
        logprobs: One entry per token of `token_ids`, if asked for.
        finish_reason: Set on the last delta of its choice: "stop", "length", "abort", or "tool_calls" where the answer
            ended with calls that the caller is to make.
        reasoning: New text of what the model says to itself, where its backend tells that from the answer.
        tool_calls: New pieces of tool calls, where its backend tells those from text.
        extra: What the engine tells of the request besides, by its own names, as `kv_transfer_params` or `system_fingerprint`.
        stop_reason: Beside `finish_reason`: the stop string, or the token of `stop_token_ids`, that ended the choice. None
            where something else did, or where the engine does not tell.
        prompt_logprobs: On the first delta, if asked for; None for the first prompt token.
        usage: Backends set it on the last delta of the request.
    """

    text: str = ""
    token_ids: list[int] = []
    index: int = 0
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    usage: Usage | None = None
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] | None = None
    extra: dict[str, Any] | None = None
    stop_reason: str | int | None = None

    @property
    def units(self) -> int:
        """How far this moves the stream's offset: its tokens, or one when it carries none."""
        return len(self.token_ids) or 1


class TextRequest(Struct, array_like=True, kw_only=True):
    """A request for text, as a client sends it. Exactly one of the three kinds of prompt is set.

    Attributes:
        prompt: Text.
        messages: Chat messages; the tokenizer's template is applied.
        prompt_token_ids: Tokens.
        sampling: How to draw, as far as the caller says.
        tools: Descriptions of functions, passed to the chat template or the remote API, where the backend can.
        response_format: What the text has to be, passed to the remote API, where the backend can.
        resume_token_ids: Tokens of the answer that its reader already has: go on after them.
        resume_characters: Length of what the reader already has, in code points: of text, of reasoning, and of names and
            arguments of calls, all together.
        drawn_seed: A seed of the client's own drawing, for a model that honours seeds where `sampling` has none: so an
            answer with the defaults can be continued elsewhere. The worker puts it in `sampling`; backends do not look.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH; of what waits, the lowest number is served first.
        deadline_ms: Set by the worker from the DISPATCH: what is left in milliseconds, None for no deadline.
        chat: What the chat template is told beside messages and tools.
        extra: Values for keys that the model announces in `ModelInfo.extra`; see `zfabric.wire.extra`.
    """

    prompt: str | None = None
    messages: list[Message] | None = None
    prompt_token_ids: list[int] | None = None
    sampling: SamplingOptions = SamplingOptions()
    tools: list[dict[str, Any]] | None = None
    response_format: dict[str, Any] | None = None
    resume_token_ids: list[int] = []
    resume_characters: int = 0
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None
    drawn_seed: int | None = None
    chat: ChatOptions | None = None
    extra: dict[str, Any] = {}

    def validate(self) -> None:
        """Raises: RequestError, ParameterRangeError, TooLargeError."""
        _require_one_prompt(self.prompt, self.messages, self.prompt_token_ids)
        check_chat(self.chat, self.messages, self.tools)
        check_response_format(self.response_format)
        self.sampling.validate()
        if self.extra:
            check_extra(self.extra)
        if self.drawn_seed is not None and not -(2**63) <= self.drawn_seed < 2**63:
            raise out_of_range("drawn_seed", self.drawn_seed, "a seed")

    @property
    def options(self) -> dict[str, Any]:
        """What is asked for of `OPTIONS`, by name."""
        return options_of(self.tools, self.chat, self.response_format)

    def plain_text(self) -> str:
        """The prompt, or what is text in the messages, one after the other: for backends without a chat template.

        Raises:
            UnsupportedOperationError: The prompt is given as token ids.
        """
        if self.prompt_token_ids is not None:
            raise UnsupportedOperationError("this model reads text, not token ids", operation="generate")
        return _plain_text(self.prompt, self.messages)


class GenerateRequest(TextRequest, array_like=True, kw_only=True):
    """A request for text, as a backend receives it: `TextRequest` with a value for every parameter.

    Attributes:
        sampling: How to draw.
    """

    sampling: SamplingParams = SamplingParams()


class CountRequest(Struct, array_like=True, kw_only=True):
    """A prompt whose tokens are to be counted as `generate` would count them.

    Attributes:
        prompt: Text; or else messages.
        messages: Chat messages.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH.
        deadline_ms: Set by the worker from the DISPATCH.
        tools: As of a request for text.
        chat: As of a request for text.
    """

    prompt: str | None = None
    messages: list[Message] | None = None
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None
    tools: list[dict[str, Any]] | None = None
    chat: ChatOptions | None = None

    def validate(self) -> None:
        """Raises: RequestError."""
        _require_one_prompt(self.prompt, self.messages, None)
        check_chat(self.chat, self.messages, self.tools)

    @property
    def options(self) -> dict[str, Any]:
        """What is asked for of `OPTIONS`, by name."""
        return options_of(self.tools, self.chat, None)

    def plain_text(self) -> str:
        """The prompt, or what is text in the messages, as `GenerateRequest.plain_text` has it."""
        return _plain_text(self.prompt, self.messages)


class OperateRequest(Struct, array_like=True, kw_only=True):
    """An operator's call to one worker, such as loading an adapter.

    Attributes:
        call: What to do; what there is to call is the backend's own.
        arguments: By name, the backend's own as well.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH.
        deadline_ms: Set by the worker from the DISPATCH.
    """

    call: str
    arguments: dict[str, Any] = {}
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError for an empty call."""
        if not self.call:
            raise RequestError("call is empty", parameter="call")


AnyRequest = (
    TextRequest
    | EmbedRequest
    | EmbedTokensRequest
    | CountRequest
    | DetokenizeRequest
    | ScoreRequest
    | ClassifyRequest
    | RewardRequest
    | OperateRequest
)


def _plain_text(prompt: str | None, messages: list[Message] | None) -> str:
    if prompt is not None:
        return prompt
    texts: list[Any] = []
    for message in messages or ():
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        texts += [part.get("text") if isinstance(part, dict) else part for part in parts]
    return " ".join([text for text in texts if isinstance(text, str)])


def _require_one_prompt(text: str | None, messages: list[Message] | None, token_ids: list[int] | None) -> None:
    given = (text is not None) + (messages is not None) + (token_ids is not None)
    if given != 1:
        raise RequestError(
            f"{given} of prompt, messages, prompt_token_ids are given, exactly one is needed", given=given
        )
    if not (text or messages or token_ids):
        raise RequestError("the prompt is empty")
