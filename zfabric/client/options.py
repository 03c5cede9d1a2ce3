"""Keyword arguments of the client's calls, and the form of chat messages, for type checkers and readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, Required, TypedDict

from zfabric.core.client.pending import Resume


class ChatMessage(TypedDict, total=False):
    """One message of a chat, as the model's template takes it. Keys that a template knows beyond these may be given too.

    Attributes:
        role: "system", "user", "assistant", "tool", or whatever else the template knows.
        content: A text, or parts: `{"type": "text", "text": …}`, `{"type": "image", "image": bytes or data URI}`.
        name: Of the speaker or of the tool.
        tool_calls, tool_call_id: Of models that call tools.

    Example:
        >>> messages: list[ChatMessage] = [{"role": "user", "content": "Hello!"}]
    """

    role: Required[str]
    content: str | Sequence[Mapping[str, Any]] | None
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str


#: Messages of one chat: checked as `ChatMessage`s where they are written as such.
Messages = Sequence[ChatMessage | Mapping[str, Any]]


class SharedOptions(TypedDict, total=False):
    """Keyword arguments of every request.

    Attributes:
        timeout: Seconds for the whole answer; then DeadlineExceededError, and the engine stops.
        deadline_ms: The same in milliseconds; give one of the two.
        priority: -1000 … 1000. Of the requests that wait for a model, those with the lowest number are served first; 0 is usual.
        affinity: A key of up to 64 characters, such as the name of a session: with a policy that goes by it, requests of one key
            run at one worker while that has room, since what they have in common is cached there (docs/dispatch.md).
    """

    timeout: float | None
    deadline_ms: int | None
    priority: int
    affinity: str


class TemplateOptions(TypedDict, total=False):
    """What a chat template is told beside messages. What a model does not honour is refused by name.

    Attributes:
        tools: Descriptions of functions, as OpenAI's API has them.
        chat_template_kwargs: Values that the model's template knows by these names, as `{"enable_thinking": False}`.
        add_generation_prompt: Whether the prompt ends with the beginning of the assistant's turn; it does by default.
        continue_final_message: The last message is gone on with, instead of being answered.
        documents: Texts to answer from, for templates that know them.
        tool_choice: "auto" by default; "none" keeps tools from being called, "required" and
            `{"type": "function", "function": {"name": …}}` have one called.
        parallel_tool_calls: False for one call at most.
    """

    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    documents: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None


class AnswerOptions(SharedOptions, TemplateOptions, total=False):
    """Keyword arguments of everything that asks for text: what `chat` and `generate_many` take.

    Attributes:
        resume: What happens when a worker is lost in mid-stream: see `zfabric.core.client.pending.Resume`.
        response_format: For engines and remote APIs that know it.
        max_tokens: Another name for `max_new_tokens`.
        extra: Values for keys that one engine alone knows and the model announces (`model_details(name).extra`), such as
            `{"cache_salt": "team-7"}`; see `zfabric.wire.extra` for those that have one meaning everywhere.

    All others are fields of `SamplingOptions`. What is not given, and what is None, is left to the model's own defaults; but
    `max_new_tokens=None` is an answer that only the context bounds. Arrays and numbers of NumPy and torch are taken
    for the lists and numbers that they are.
    """

    resume: Resume
    response_format: Mapping[str, Any] | None
    extra: Mapping[str, Any] | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    max_new_tokens: int | None
    max_tokens: int | None
    min_new_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: int | Sequence[int]
    ignore_eos: bool
    seed: int | None
    n: int
    best_of: int | None
    use_beam_search: bool
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    logit_bias: Mapping[int, float] | None
    bad_words: str | Sequence[str]
    guided_json: str | None
    guided_regex: str | None
    guided_choice: str | Sequence[str]
    guided_grammar: str | None
    truncate_prompt: bool
    skip_special_tokens: bool


class GenerateOptions(AnswerOptions, total=False):
    """Keyword arguments of `stream` and `generate`: those of `AnswerOptions`, and other kinds of prompts.

    Attributes:
        messages, prompt_token_ids: Instead of a prompt. Messages go through the model's chat template.
        prefix_hints: Send hashes of the prompt's first blocks along, so that a controller with the policy `prefix_aware` finds
            a worker that has them cached (docs/dispatch.md). It costs about 30 µs for each 1,000 characters or 250
            tokens, up to 32,768 or 8,192 of them, nothing for less than a block, and is off by default.
    """

    messages: Messages | None
    prompt_token_ids: Sequence[int] | None
    prefix_hints: bool


class EmbedOptions(SharedOptions, total=False):
    """Keyword arguments of `embed`.

    Attributes:
        dimensions: Cut vectors to so many values (models trained for it), None for all.
        normalize: Give vectors of length 1, which is the default.
        truncate: What to do with an input beyond the context: "error", "cut" or "chunk" (mean of its pieces).
        pooling: None is the model's own; else "mean", "cls" or "last".
        prompt_name: Which of the model's own prompts is put before each text, such as "query"; None for the one that it
            uses by default. `zfabric models` shows their names.
    """

    dimensions: int | None
    normalize: bool
    truncate: Literal["error", "cut", "chunk"]
    pooling: Literal["mean", "cls", "last"] | None
    prompt_name: str | None


class EmbedTokensOptions(SharedOptions, total=False):
    """Keyword arguments of `embed_tokens`; they mean what they do for `embed`.

    Attributes:
        truncate: What to do with an input beyond the context: "error" or "cut".
    """

    dimensions: int | None
    normalize: bool
    truncate: Literal["error", "cut"]
    prompt_name: str | None


class SubmitOptions(TypedDict):
    """What the envelope of a request needs."""

    deadline_ms: int | None
    priority: int
    affinity: NotRequired[str]
    prefix: NotRequired[bytes]
    prefix_block: NotRequired[int]
    resume: NotRequired[Resume]
