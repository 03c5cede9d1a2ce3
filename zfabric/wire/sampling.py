"""How an answer is drawn: the parameters, their bounds, and which of them a backend has to honour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct, structs

from zfabric.errors import (
    ParameterRangeError,
    UnsupportedParameterError,
)
from zfabric.limits import LOGIT_BIAS_MAX, SAMPLING_ITEMS_MAX


class SamplingOptions(Struct, array_like=True, frozen=True, kw_only=True):
    """How an answer is to be drawn, as a caller says it. One meaning on every backend, which refuses by name what it lacks.

    What is None here is unset, where that is no value of its own: the model's own default holds (of its
    generation_config.json), and without one what `SamplingParams` says.

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
        max_new_tokens: Tokens of the answer at most; 0 for what the context leaves.
        min_new_tokens: No end before so many tokens.
        stop: Strings that end the answer; they are not part of it.
        stop_token_ids: Tokens that end the answer; they are not part of its text.
        ignore_eos: Go on past the model's own end token.
        seed: Same seed, same text, whoever shares the batch. None draws a fresh one.
        n: Choices per request; their deltas carry `index`.
        best_of: Choices drawn, of which the n likeliest are given; None for n.
        use_beam_search: Beam search of width best_of (or n).
        logprobs: None for none, else the number of alternatives per token beside the drawn one (0 is allowed).
        prompt_logprobs: The same for the prompt's tokens.
        echo: The answer's text begins with the prompt.
        logit_bias: Token id → added to its logit, -100 … 100, or -inf.
        bad_words: Strings that must not appear.
        guided_json: JSON schema that the text has to follow. Of the four guides one at most.
        guided_regex: Regular expression that the text has to match.
        guided_choice: Texts of which the answer is one.
        guided_grammar: Grammar that the text has to follow, in the engine's own notation.
        truncate_prompt: Keep only the last tokens of a prompt that is too long, instead of an error.
        skip_special_tokens: Leave special tokens out of the text.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
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
        """Names of the parameters that are set, and make a difference to a backend that knows none, in field order."""
        values = zip(_SAMPLING_FIELDS, structs.astuple(self), _SAMPLING_DEFAULTS, strict=False)
        # Most values are their defaults, or None: to see that costs less than to compare.
        return [
            field for field, value, default in values if value is not default and value is not None and value != default
        ]

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
        changed = self.changed()
        for name in changed:
            bounds = RANGES.get(name)
            value = getattr(self, name)
            if bounds is None:
                continue
            low, high = bounds
            try:
                inside = low <= value <= high
            except TypeError:
                inside = False
            if not inside:
                raise out_of_range(name, value, f"{low} … {high}")
            if value == 0 and name in POSITIVE:
                raise out_of_range(name, value, "greater than 0" if low == 0 else "-1 or at least 1")
        if not _CHECKED_TOGETHER.isdisjoint(changed):
            self._check_together()

    def _check_together(self) -> None:
        """What one parameter demands of another. Raises: ParameterRangeError."""
        if self.best_of is not None and self.best_of < self.n:
            raise out_of_range("best_of", self.best_of, f"at least n, which is {self.n}")
        for name, bound in ITEMS_MAX.items():
            items = getattr(self, name)
            if items and len(items) > bound:
                raise ParameterRangeError(
                    f"{name} has {len(items)} items, limit is {bound}", parameter=name, limit=bound
                )
        for name in ("stop", "bad_words"):
            if "" in getattr(self, name):
                raise out_of_range(name, "", "non-empty strings")
        for token, bias in (self.logit_bias or {}).items():
            # Float32 has no sums of larger ones, and no engine's logits come near.
            if not (-_BIAS_MAX <= bias <= _BIAS_MAX or bias == -math.inf):
                raise out_of_range("logit_bias", bias, f"{-_BIAS_MAX} … {_BIAS_MAX}, or -inf, of token {token}")
        guides = [name for name in _GUIDES if getattr(self, name)]
        if len(guides) > 1:
            raise out_of_range(guides[1], "set", f"unset beside {guides[0]}")
        if self.max_new_tokens and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise out_of_range("min_new_tokens", self.min_new_tokens, f"at most max_new_tokens={self.max_new_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the answer is known to be a function of the prompt alone."""
        return self.temperature is not None and self.temperature < GREEDY_TEMPERATURE

    @property
    def single(self) -> bool:
        """Whether one text is drawn, a token at a time: nothing else can go on from its tokens."""
        return self.n == 1 and self.best_of in (None, 1) and not self.use_beam_search

    @property
    def reproducible(self) -> bool:
        """Whether another worker would draw the same text: what an exact continuation needs."""
        return self.single and (self.greedy or self.seed is not None)

    def resolved(self, defaults: Mapping[str, float]) -> SamplingParams:
        """The same with a value for everything.

        Args:
            defaults: The model's own, for parameters of `UNSETTABLE`.

        Example:
            >>> SamplingOptions(top_p=0.5).resolved({"temperature": 0.6, "top_p": 0.9}).temperature
            0.6
        """
        given = zip(_SAMPLING_FIELDS, structs.astuple(self), strict=False)
        values: dict[str, Any] = {name: value for name, value in given if value is not None}
        if self.use_beam_search:
            # A search draws nothing: what shapes draws is no matter of it, and not refused where nobody asked for it.
            defaults = {name: value for name, value in defaults.items() if name not in _OF_DRAWS}
        unset = [name for name in UNSETTABLE if name not in values]
        if defaults:
            values |= {name: defaults[name] for name in unset if defaults.get(name) is not None}
            unset = [name for name in unset if name not in values]
        if values.get("max_new_tokens") == WHAT_THE_CONTEXT_LEAVES:
            values["max_new_tokens"] = None
        return SamplingParams(**values, unset=tuple(unset))


class SamplingParams(SamplingOptions, array_like=True, frozen=True, kw_only=True):
    """How an answer is drawn, as a backend is told it: `SamplingOptions` with all values known.

    Attributes:
        max_new_tokens: Tokens of the answer at most; None is what the context leaves.
        unset: Parameters that neither the caller nor the model's own defaults set. They have the values that change nothing;
            an engine that has defaults of its own may go by those.
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
    unset: tuple[str, ...] = ()


#: `max_new_tokens` as a caller's options have it, for an answer that only the context bounds.
WHAT_THE_CONTEXT_LEAVES: Final = 0
#: Tokens of an answer that can be asked for.
TOKENS_MAX: Final = 2**31 - 1

#: Parameters that a caller may leave to the model.
UNSETTABLE: Final = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "max_new_tokens", "min_new_tokens",
)  # fmt: skip
_OF_DRAWS: Final = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p"})

#: Below this a softmax is a one-hot in float32; FastChat draws the same line.
GREEDY_TEMPERATURE: Final = 1e-5

#: OpenAI's bound. Whoever wants a token never to come gives it minus infinity.
_BIAS_MAX: Final = 100
_GUIDES: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
#: The least and the greatest value of a number.
RANGES: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "max_new_tokens": (WHAT_THE_CONTEXT_LEAVES, TOKENS_MAX),
    "min_new_tokens": (0, TOKENS_MAX),
    "seed": (-(2**63), 2**63 - 1),
    "n": (1, 128),
    "best_of": (1, 128),
    "logprobs": (0, 1_000),
    "prompt_logprobs": (0, 1_000),
}
#: How many items a parameter may have.
ITEMS_MAX: Final = {
    "stop": SAMPLING_ITEMS_MAX,
    "stop_token_ids": SAMPLING_ITEMS_MAX,
    "bad_words": SAMPLING_ITEMS_MAX,
    "guided_choice": SAMPLING_ITEMS_MAX,
    "logit_bias": LOGIT_BIAS_MAX,
}
#: Parameters that `SamplingOptions._check_together` looks at: without any of them there is nothing to find.
_CHECKED_TOGETHER: Final = frozenset({"best_of", "logit_bias", "min_new_tokens", *ITEMS_MAX, *_GUIDES})
#: Zero is within the bounds, but not allowed.
POSITIVE: Final = frozenset({"top_p", "top_k", "typical_p"})
_SAMPLING_FIELDS: Final = tuple(SamplingOptions.__struct_fields__)
_SAMPLING_DEFAULTS: Final = structs.astuple(SamplingParams())[: len(_SAMPLING_FIELDS)]

#: Every parameter name, for backends that honour all of them.
ALL_PARAMETERS: Final = frozenset(_SAMPLING_FIELDS)


def out_of_range(name: str, value: object, bound: str) -> ParameterRangeError:
    return ParameterRangeError(f"{name} is {value!r}, it must be {bound}", parameter=name, value=str(value))
