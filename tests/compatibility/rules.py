"""Who is right, for each kind of difference, by OpenAI's reference (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from tests.compatibility.compare import ABSENT, Difference

Right = Literal["gateway", "vLLM", "both", "neither"]


@dataclass(frozen=True)
class Rule:
    """A kind of difference.

    Attributes:
        aspects: What differs, as a regular expression.
        right: Who does what OpenAI's reference says; "both" where it leaves that open.
        why: What the reference says, and what it means for callers.
        cases: The requests that it is about, as a regular expression.
        theirs: What vLLM's server says, as a regular expression.
    """

    aspects: str
    right: Right
    why: str
    cases: str = ".*"
    theirs: str = ".*"

    def holds(self, difference: Difference) -> bool:
        """Whether it is about this difference."""
        pairs = ((self.aspects, difference.aspect), (self.cases, difference.case), (self.theirs, difference.theirs))
        return all(re.fullmatch(pattern, value, re.DOTALL) for pattern, value in pairs)


#: The first that holds has the word.
RULES: Final = (
    # Statuses.
    Rule(
        "status", "gateway", "A model has to be named. vLLM's server takes its only one.", cases="chat: no model",
    ),
    Rule("status", "gateway", "A field that is none is refused by name; vLLM drops it.", cases=".*: unknown field"),
    Rule(
        "status", "gateway",
        "vLLM's server drops `best_of`, and its engine has none. A model that honours it takes it through the gateway.",
        cases="completions: best_of",
    ),
    Rule(
        "status", "vLLM",
        "Only some models can shorten their vectors. The fabric cuts and normalizes those of any that is asked to.",
        cases="embeddings: dimensions",
    ),
    Rule(
        "status", "gateway",
        "A prompt and `max_tokens` may not be more than the context together. vLLM's server shortens the answer.",
        cases="completions: prompt and length beyond the context",
    ),
    Rule(
        "status", "both", "Not of OpenAI's API. vLLM gives an empty text for a token that the model does not have.",
        cases="detokenize: beyond the vocabulary",
    ),
    # Errors.
    Rule(r"error\.type", "gateway", "Wrong requests are of the type `invalid_request_error`."),
    Rule(r"error\.code", "gateway", "A code is a word or null; vLLM repeats the status there, as a number."),
    Rule(
        r"error\.(fabric_code|retryable)", "both",
        "More than the reference has: the fabric's own number, and whether trying again helps.",
    ),
    Rule(
        r"error\.param", "gateway", "The parameter of a chat that is too long is `messages`, and that of a text is none.",
        theirs="input_(tokens|text)",
    ),
    Rule(
        r"error\.param", "gateway", "A model that is not there is told with no parameter.", cases=".*unknown model",
    ),
    Rule(
        r"error\.param", "gateway", "The parameter is named as the caller wrote it, without `body.` or the server's types.",
        theirs=r"body\b.*",
    ),
    Rule(r"error\.param", "gateway", "The parameter is named.", theirs="null"),
    Rule(
        r"error\.param", "both", "Which name a parameter has where the request as a whole is wrong is left open.",
    ),
    # Fields.
    Rule(
        r"(data\[\]\.)?(choices\[\]\.)?(message\.|delta\.)?(annotations|audio|function_call|service_tier)", "both",
        "Optional in the reference: the fabric has none of it.",
    ),
    Rule(
        r"system_fingerprint", "both", "Optional, and deprecated. vLLM writes its version there; the gateway writes null once "
        "and nothing in streams.",
    ),
    Rule(
        r"usage", "gateway", "With `include_usage` every chunk has the field, null but for the last.", theirs=ABSENT,
    ),
    Rule(
        r"usage\.(completion_tokens_details|prompt_tokens_details(\.cached_tokens)?)", "gateway",
        "`cached_tokens` is told. vLLM's server tells it with a flag of its own alone.",
    ),
    Rule(
        r"choices\[\]\.logprobs\.refusal", "gateway", "Log-probabilities have `content` and `refusal`.",
    ),
    Rule(
        r"data\[\]\.(parent|permission.*|capabilities.*)", "both",
        "More than the reference has, each its own: of vLLM what OpenAI had once, of the gateway what a model can do.",
    ),
    Rule(
        r"id|created|usage\.completion_tokens", "gateway", "Vectors have no name, no time and no new tokens.",
        cases="embeddings: .*",
    ),
    Rule(
        r".*\b(reasoning|routed_experts|stop_reason|token_ids|prompt_token_ids|prompt_text|prompt_logprobs(\[\])?|metrics|"
        r"ec_transfer_params|kv_transfer_params)", "both",
        "vLLM's own, null unless asked for. Through the gateway `return_token_ids` adds `token_ids`, and reasoning is "
        "`reasoning_content`.",
    ),
    # Orders and values.
    Rule(
        r"usage\.(completion|total)_tokens", "gateway",
        "A prompt that is given back alone has no new token. vLLM's server counts the one that it draws and leaves out.",
        cases="completions: echo, no token",
    ),
    Rule(
        r"usage\.(prompt|total)_tokens", "neither",
        "OpenAI refuses an empty text. vLLM counts the marks around it; the gateway counts none.", cases="embeddings: empty text",
    ),
    Rule("content type", "both", "Not of OpenAI's API. vLLM's server says nothing but the status.", cases="HTTP: health"),
)  # fmt: skip


def rule_of(difference: Difference) -> Rule | None:
    """The rule that is about a difference."""
    return next((rule for rule in RULES if rule.holds(difference)), None)
