"""What drawing needs to know of one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zfabric.backends.hf_transformers.request.structured_outputs import Guide
from zfabric.wire.sampling import SamplingParams


class History:
    """A row's place in `TokenHistories`, which is given back when nobody holds this any more.

    Attributes:
        slot: Which.
        length: Columns that it fills.
        position: Tokens that its answer has, on the device.
    """

    __slots__ = ("free", "length", "position", "slot")

    def __init__(self, slot: int, free: list[int]) -> None:
        self.slot, self.free = slot, free
        self.length = self.position = 0

    def __del__(self) -> None:
        self.free.append(self.slot)


@dataclass(slots=True, eq=False)
class Row:
    """What drawing needs to know of one sequence. All but its output stays as it is made.

    Attributes:
        prompt: Its prompt's tokens.
        output: Tokens of its answer so far.
        end_tokens: Tokens that end it; masked before `min_new_tokens`.
        bad_words: Token sequences that must not appear.
        guide: What the text has to follow.
        suppressed: Tokens that the model is never to draw, and those that are not to begin an answer.
        allowed: The only tokens that may be drawn; empty for all of them.
        forced: At these places of the answer, one of these tokens comes whatever the model says.
        alternatives: How many are told beside each drawn token; None if not even its own log-probability is.
        greedy: Whether the likeliest token is taken.
        banned: Tokens that may come nowhere.
        phased: Whether tokens are banned at some places of the answer alone.
        worded: Whether tokens are banned after others alone.
        plain: Whether its logits are drawn from as they are.
        independent: Whether its draws depend on logits, seed and position alone, not on which tokens the answer has.
        host_bound: Whether the host has to know its newest token before the next can be drawn.
        penalized: Whether tokens that it has count for less, or more.
        counts_tokens: Whether it matters how often its answer has them.
        warps: Whether not all tokens are candidates.
        line: What it asks for, as numbers in a row; empty until somebody wants it so.
        tensors: Tokens that it names, where they are on the device, by what it names them for.
        history: Where its own tokens are kept there.
    """

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int]
    end_tokens: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    guide: Guide | None = None
    suppressed: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    allowed: tuple[int, ...] = ()
    forced: Mapping[int, frozenset[int]] = field(default_factory=dict)
    alternatives: int | None = field(init=False)
    greedy: bool = field(init=False)
    banned: frozenset[int] = field(init=False)
    phased: bool = field(init=False)
    worded: bool = field(init=False)
    plain: bool = field(init=False)
    independent: bool = field(init=False)
    host_bound: bool = field(init=False)
    penalized: bool = field(init=False)
    counts_tokens: bool = field(init=False)
    warps: bool = field(init=False)
    line: bytes = field(init=False, default=b"")
    tensors: dict[Any, Any] = field(init=False, default_factory=dict)
    history: History | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        p = self.params
        self.alternatives = p.logprobs
        self.counts_tokens = bool(p.presence_penalty or p.frequency_penalty)
        self.penalized = self.counts_tokens or p.repetition_penalty != 1.0
        self.greedy = p.greedy
        self.banned = self.suppressed[0].union(word[0] for word in self.bad_words if len(word) == 1)
        self.phased = bool(p.min_new_tokens or self.suppressed[1])
        self.worded = any(len(word) > 1 for word in self.bad_words)
        self.host_bound = self.guide is not None or self.worded
        self.independent = not (self.penalized or self.host_bound)
        banned = bool(self.banned or self.phased or self.worded or self.allowed)
        self.plain = not (self.penalized or p.logit_bias or banned or self.guide is not None or self.forced)
        self.warps = p.top_k > 0 or p.top_p < 1 or p.min_p > 0 or p.typical_p < 1
