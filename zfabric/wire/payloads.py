"""What a client and a worker say to each other. The controller passes these bodies on unread.

These structs are also the public vocabulary of the library: `SamplingParams` goes in, `Delta` comes out, and a backend
sees exactly what the client's caller wrote. On the wire each is a MessagePack array in field order (docs/protocol.md §6).
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from msgspec import Raw, Struct, structs

from zfabric.errors import (
    Detail,
    ParameterRangeError,
    RequestError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.limits import DIMENSIONS_MAX, LOGIT_BIAS_MAX, SAMPLING_ITEMS_MAX
from zfabric.wire.messages import NIL

FinishReason = Literal["stop", "length", "abort"]

#: A chat message, as tokenizer chat templates take it: {"role": …, "content": str | parts, …}.
Message = dict[str, Any]


class SamplingParams(Struct, array_like=True, frozen=True, kw_only=True):
    """How an answer is drawn. One meaning and one default on every backend; a backend refuses by name what it lacks.

    Attributes:
        temperature: 0 is greedy. 0 … 100.
        top_p: Nucleus mass, 0 < top_p ≤ 1.
        top_k: Candidates kept; -1 keeps all.
        min_p: Least probability relative to the likeliest token, 0 … 1.
        typical_p: Locally typical mass, 0 < typical_p ≤ 1.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in prompt or answer
            (Keskar et al. 2019), 0.01 … 100. 1 is off.
        presence_penalty: Subtracted once from logits of tokens in the answer, -2 … 2.
        frequency_penalty: Subtracted per occurrence from logits of tokens in the answer, -2 … 2.
        max_new_tokens: Tokens of the answer at most; None is what the context leaves.
        min_new_tokens: No end before so many tokens.
        stop: Strings that end the answer; they are not part of it.
        stop_token_ids: Tokens that end the answer; they are not part of its text.
        ignore_eos: Go on past the model's own end token.
        seed: Same seed, same text, whoever shares the batch. None draws a fresh one.
        n: Choices per request; their deltas carry `index`.
        best_of: Choices drawn, of which the n likeliest are given.
        use_beam_search: Beam search of width best_of (or n).
        logprobs: None for none, else the number of alternatives per token beside the drawn one (0 is allowed).
        prompt_logprobs: The same for the prompt's tokens.
        echo: The answer's text begins with the prompt.
        logit_bias: Token id → added to its logit, -100 … 100, or -inf.
        bad_words: Strings that must not appear.
        guided_json, guided_regex, guided_choice, guided_grammar: Constrain the text; one at most.
        truncate_prompt: Keep only the last tokens of a prompt that is too long, instead of an error.
        skip_special_tokens: Leave special tokens out of the text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int | None = 256
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    logit_bias: dict[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    guided_json: str | None = None
    guided_regex: str | None = None
    guided_choice: tuple[str, ...] = ()
    guided_grammar: str | None = None
    truncate_prompt: bool = False
    skip_special_tokens: bool = True

    def changed(self) -> list[str]:
        """Names of the parameters that differ from their defaults, in field order."""
        values = zip(_SAMPLING_FIELDS, structs.astuple(self), _SAMPLING_DEFAULTS, strict=True)
        return [field for field, value, default in values if value != default]

    def require(self, supported: frozenset[str], backend: str) -> None:
        """Refuse by name what a backend cannot honour.

        Raises:
            UnsupportedParameterError: The first changed parameter that is not in `supported`.
        """
        for name in self.changed():
            if name not in supported:
                raise UnsupportedParameterError(
                    f"parameter {name!r} is not supported by {backend}", parameter=name, backend=backend
                )

    def validate(self) -> None:
        """Check ranges. What has its default is in range, so only the rest is looked at.

        Raises:
            ParameterRangeError: Names the parameter, its value and its bounds.
        """
        for name in self.changed():
            bounds = _RANGES.get(name)
            value = getattr(self, name)
            if bounds is None or (value is None and name == "max_new_tokens"):
                continue
            low, high = bounds
            try:
                inside = low <= value <= high
            except TypeError:
                inside = False
            if not inside:
                raise _out_of_range(name, value, f"{low} … {high}")
            if value == 0 and name in _POSITIVE:
                raise _out_of_range(name, value, "greater than 0" if low == 0 else "-1 or at least 1")
        self._check_together()

    def _check_together(self) -> None:
        """What one parameter demands of another. Raises: ParameterRangeError."""
        if self.best_of is not None and self.best_of < self.n:
            raise _out_of_range("best_of", self.best_of, f"at least n, which is {self.n}")
        for name, bound in _LENGTHS.items():
            items = getattr(self, name)
            if items and len(items) > bound:
                raise ParameterRangeError(
                    f"{name} has {len(items)} items, limit is {bound}", parameter=name, limit=bound
                )
        for name in ("stop", "bad_words"):
            if "" in getattr(self, name):
                raise _out_of_range(name, "", "non-empty strings")
        for token, bias in (self.logit_bias or {}).items():
            # Float32 has no sums of larger ones, and no engine's logits come near.
            if not (-_BIAS_MAX <= bias <= _BIAS_MAX or bias == -math.inf):
                raise _out_of_range("logit_bias", bias, f"{-_BIAS_MAX} … {_BIAS_MAX}, or -inf, of token {token}")
        guides = [name for name in _GUIDES if getattr(self, name)]
        if len(guides) > 1:
            raise _out_of_range(guides[1], "set", f"unset beside {guides[0]}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise _out_of_range("min_new_tokens", self.min_new_tokens, f"at most max_new_tokens={self.max_new_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the answer is a function of the prompt alone."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def reproducible(self) -> bool:
        """Whether another worker would draw the same text: what an exact continuation needs."""
        return (
            (self.greedy or self.seed is not None)
            and self.n == 1
            and self.best_of in (None, 1)
            and (not self.use_beam_search)
        )


#: Below this a softmax is a one-hot in float32; FastChat draws the same line.
GREEDY_TEMPERATURE: Final = 1e-5

#: OpenAI's bound. Whoever wants a token never to come gives it minus infinity.
_BIAS_MAX: Final = 100
_GUIDES: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "max_new_tokens": (1, 2**31 - 1),
    "min_new_tokens": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "n": (1, 128),
    "best_of": (1, 128),
    "logprobs": (0, 1_000),
    "prompt_logprobs": (0, 1_000),
}
#: How many items a parameter may have.
_LENGTHS: Final = {
    "stop": SAMPLING_ITEMS_MAX,
    "stop_token_ids": SAMPLING_ITEMS_MAX,
    "bad_words": SAMPLING_ITEMS_MAX,
    "guided_choice": SAMPLING_ITEMS_MAX,
    "logit_bias": LOGIT_BIAS_MAX,
}
#: Zero is within the bounds, but not allowed.
_POSITIVE: Final = frozenset({"top_p", "top_k", "typical_p"})
_SAMPLING_FIELDS: Final = tuple(SamplingParams.__struct_fields__)
_SAMPLING_DEFAULTS: Final = structs.astuple(SamplingParams())

#: Every parameter name, for backends that honour all of them.
ALL_PARAMETERS: Final = frozenset(_SAMPLING_FIELDS)


def _out_of_range(name: str, value: object, bound: str) -> ParameterRangeError:
    return ParameterRangeError(f"{name} is {value!r}, it must be {bound}", parameter=name, value=str(value))


class Usage(Struct, array_like=True, frozen=True):
    """Exact token counts. A continued answer counts its prompt and its tokens once.

    `estimated` marks counts that a backend made itself because its engine reports none.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Logprob(Struct, array_like=True, frozen=True, gc=False):
    """One token's natural-log probability by the model itself, before temperature and all else; `rank` counts from 1."""

    token_id: int
    logprob: float
    text: str = ""
    rank: int | None = None


class TokenLogprobs(Struct, array_like=True, frozen=True):
    """The drawn token and the likeliest alternatives, most likely first."""

    token: Logprob
    top: list[Logprob] = []


class Delta(Struct, kw_only=True, gc=False):
    """What an engine step adds to one choice of an answer.

    Attributes:
        text: New text, never half a character. May be empty while a stop string might still be completed.
        token_ids: New tokens. Backends whose engine tells none leave it empty.
        index: The choice, 0 … n-1.
        logprobs: One entry per token of `token_ids`, if asked for.
        finish_reason: Set on the last delta of its choice: "stop", "length" or "abort".
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

    @property
    def units(self) -> int:
        """How far this moves the stream's offset: its tokens, or one when it carries none."""
        return len(self.token_ids) or 1


class ChunkExtra(Struct, array_like=True, kw_only=True, gc=False):
    """The rare parts of a chunk, kept out of the common one.

    `exact`, on the first chunk of an attempt: another worker would draw the same text from the request as the client has
    it, so the answer can be continued elsewhere. The worker alone knows whether it honours the client's drawn seed.
    """

    units: int | None = None
    worker: str | None = None
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    exact: bool = False


class Chunk(Struct, array_like=True, gc=False):
    """A run of one stream on the wire: units [offset, offset + units) of attempt `attempt` of `request`.

    `offset` counts over all choices of the request. `units` is len(token_ids) unless `extra` says otherwise.
    """

    request: int
    attempt: int
    index: int
    offset: int
    text: str
    token_ids: list[int]
    extra: ChunkExtra | None = None


class Outcome(Struct, array_like=True, kw_only=True):
    """How a request ended: the rest of its terminal, in the order of the envelope's ends.

    `units` is the offset at the end of the stream. `result` holds what a unary operation returns.
    """

    units: int = 0
    usage: Usage | None = None
    message: str = ""
    details: dict[str, Detail] = {}
    result: Raw = NIL


class EndsBody(Struct, array_like=True, kw_only=True):
    """Body of ENDS: the last chunks of a step, then one outcome per end."""

    chunks: list[Chunk] = []
    outcomes: list[Outcome] = []


class GenerateRequest(Struct, array_like=True, kw_only=True):
    """A request for text, as a backend receives it. Exactly one of the three kinds of prompt is set.

    Attributes:
        prompt, messages, prompt_token_ids: Text, chat messages (the tokenizer's template is applied), or tokens.
        sampling: How to draw.
        tools, response_format: Passed to the chat template or the remote API, where the backend can.
        resume_token_ids: Tokens of the answer that its reader already has: go on after them.
        resume_characters: Length of the text that the reader already has, in code points.
        drawn_seed: A seed of the client's own drawing, for a model that honours seeds where `sampling` has none: so an
            answer with the defaults can be continued elsewhere. The worker puts it in `sampling`; backends do not look.
        model, request_id, priority, deadline_ms: Set by the fabric on arrival. `deadline_ms` is what is left, None for
            no deadline; of what waits, the lowest priority number is served first.
    """

    prompt: str | None = None
    messages: list[Message] | None = None
    prompt_token_ids: list[int] | None = None
    sampling: SamplingParams = SamplingParams()
    tools: list[dict[str, Any]] | None = None
    response_format: dict[str, Any] | None = None
    resume_token_ids: list[int] = []
    resume_characters: int = 0
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None
    drawn_seed: int | None = None

    def validate(self) -> None:
        """Raises: RequestError, ParameterRangeError."""
        _require_one_prompt(self.prompt, self.messages, self.prompt_token_ids)
        self.sampling.validate()
        if self.drawn_seed is not None and not -(2**63) <= self.drawn_seed < 2**63:
            raise _out_of_range("drawn_seed", self.drawn_seed, "a seed")

    def plain_text(self) -> str:
        """The prompt, or what is text in the messages, one after the other: for backends without a chat template.

        Raises:
            UnsupportedOperationError: The prompt is given as token ids.
        """
        if self.prompt_token_ids is not None:
            raise UnsupportedOperationError("this model reads text, not token ids", operation="generate")
        return _plain_text(self.prompt, self.messages)


class EmbedRequest(Struct, array_like=True, kw_only=True):
    """Texts (or token ids) to embed.

    Attributes:
        inputs: Texts, or lists of token ids.
        dimensions: Cut vectors to so many values (models trained for it), None for all.
        normalize: Give vectors of length 1.
        truncate: What to do with an input beyond the context: "error", "cut" or "chunk" (mean of its pieces).
        pooling: None is the model's own; else "mean", "cls" or "last".
    """

    inputs: list[str | list[int]]
    dimensions: int | None = None
    normalize: bool = True
    truncate: Literal["error", "cut", "chunk"] = "error"
    pooling: Literal["mean", "cls", "last"] | None = None
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError for no inputs, ParameterRangeError."""
        if not self.inputs:
            raise RequestError("inputs is empty, one text at least is needed", parameter="inputs")
        if self.dimensions is not None and not 1 <= self.dimensions <= DIMENSIONS_MAX:
            raise _out_of_range("dimensions", self.dimensions, f"1 … {DIMENSIONS_MAX}")


class CountRequest(Struct, array_like=True, kw_only=True):
    """A prompt whose tokens are to be counted as `generate` would count them."""

    prompt: str | None = None
    messages: list[Message] | None = None
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError."""
        _require_one_prompt(self.prompt, self.messages, None)

    def plain_text(self) -> str:
        """The prompt, or what is text in the messages, as `GenerateRequest.plain_text` has it."""
        return _plain_text(self.prompt, self.messages)


class OperateRequest(Struct, array_like=True, kw_only=True):
    """An operator's call to one worker, such as loading an adapter. What there is to call is the backend's own."""

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


AnyRequest = GenerateRequest | EmbedRequest | CountRequest | OperateRequest


class EmbedResult(Struct, array_like=True):
    """Vectors as one buffer: float32, little-endian, row-major, of shape (rows, dimensions)."""

    rows: int
    dimensions: int
    data: bytes


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
