"""A model's own way of drawing: what its generation_config.json says, where a request leaves it open.

It has one meaning on all backends that read it: of two engines that read the same file differently, what both can do is done.
Values are taken as `generate` takes them. A model that says nothing of sampling is drawn as it is, at temperature 1; one that
says `"do_sample": false` is greedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import structs

from zfabric.errors import ParameterRangeError
from zfabric.wire.sampling import UNSETTABLE, SamplingOptions, SamplingParams

#: What changes a text and is done by no backend here: its names are shown to operators.
_NOT_DONE: Final = (
    "num_beams", "num_beam_groups", "penalty_alpha", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "diversity_penalty", "exponential_decay_length_penalty", "epsilon_cutoff", "eta_cutoff",
    "top_h", "sequence_bias", "guidance_scale", "dola_layers", "watermarking_config", "stop_strings",
)  # fmt: skip
#: Values of those that change nothing.
_NEUTRAL: Final = (None, 0, 0.0, 1, 1.0, False)


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a model says of its answers.

    Attributes:
        parameters: Its values of sampling parameters: `ModelInfo.defaults`.
        max_length, min_length: Tokens of prompt and answer together, at most (None for no bound) and at least.
        suppressed, suppressed_first: Tokens that never come, and those that do not begin an answer.
        forced_first, forced_last: Of which tokens one begins an answer, and is the last of one that reaches its bound; empty for
            any. The first is for models with an encoder alone.
        bad_words: Token sequences that never come.
        not_done: Settings that no backend here follows.
    """

    parameters: dict[str, float] = field(default_factory=dict)
    max_length: int | None = None
    min_length: int = 0
    suppressed: frozenset[int] = frozenset()
    suppressed_first: frozenset[int] = frozenset()
    forced_first: frozenset[int] = frozenset()
    forced_last: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    not_done: tuple[str, ...] = ()

    def lengths(self, sampling: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """Bounds of an answer to a prompt of so many tokens, where the request leaves them open."""
        changes: dict[str, Any] = {}
        if self.max_length is not None and "max_new_tokens" in sampling.unset:
            changes["max_new_tokens"] = max(1, self.max_length - prompt_tokens)
        if self.min_length > prompt_tokens and "min_new_tokens" in sampling.unset:
            changes["min_new_tokens"] = self.min_length - prompt_tokens
        return structs.replace(sampling, **changes) if changes else sampling


def read(config: Mapping[str, Any], honoured: Iterable[str]) -> GenerationDefaults:
    """What a model's configuration says.

    Args:
        config: Of transformers' `GenerationConfig.to_diff_dict`: what differs from the library's own defaults.
        honoured: Sampling parameters of the backend; others are left out.
    """
    known = set(honoured)
    found: dict[str, float] = {}
    for name in UNSETTABLE:
        value = config.get(name)
        if name == "top_k" and value == 0:
            value = -1
        if name in known and isinstance(value, (int, float)) and not isinstance(value, bool) and _in_range(name, value):
            found[name] = value
    if config.get("do_sample") is False and "temperature" in known:
        found["temperature"] = 0.0
    return GenerationDefaults(
        parameters=found,
        max_length=_count(config, "max_length") or None,
        min_length=_count(config, "min_length"),
        suppressed=frozenset(config.get("suppress_tokens") or ()),
        suppressed_first=frozenset(config.get("begin_suppress_tokens") or ()),
        forced_first=_tokens(config, "forced_bos_token_id"),
        forced_last=_tokens(config, "forced_eos_token_id"),
        bad_words=tuple(tuple(words) for words in config.get("bad_words_ids") or () if words),
        not_done=tuple(name for name in _NOT_DONE if config.get(name) not in _NEUTRAL),
    )


def _tokens(config: Mapping[str, Any], name: str) -> frozenset[int]:
    """A token, or several."""
    value = config.get(name)
    return frozenset([value] if isinstance(value, int) else value or ())


def _in_range(name: str, value: float) -> bool:
    try:
        structs.replace(SamplingOptions(), **{name: value}).validate()
    except ParameterRangeError:
        return False
    return True


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else 0
