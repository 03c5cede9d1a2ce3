"""The flags that say how an answer is drawn, for every command that asks for one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import cyclopts


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """What is not given is left to the fabric's own defaults. The library has more: choices, logprobs, constraints.

    Attributes:
        max_new_tokens: Tokens of the answer at most.
        min_new_tokens: No end before so many tokens.
        temperature: 0 is greedy.
        top_p: Nucleus mass.
        top_k: Candidates kept; -1 keeps all.
        min_p: Least probability relative to the likeliest token.
        repetition_penalty: On tokens of prompt and answer; 1 is off.
        presence_penalty: Once, on tokens of the answer.
        frequency_penalty: Per occurrence, on tokens of the answer.
        stop: A string that ends the answer; repeat for several.
        stop_token_ids: A token that ends the answer; repeat for several.
        ignore_eos: Go on past the model's own end.
        seed: Same seed, same text.
        deadline_ms: The request ends with an error after so long.
        priority: Of the requests that wait, those with the lowest number are served first; -1000 to 1000, 0 is usual.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: Annotated[bool | None, cyclopts.Parameter(negative=())] = None
    seed: int | None = None
    deadline_ms: int | None = None
    priority: int | None = None

    def given(self, **defaults: Any) -> dict[str, Any]:
        """Only what was set, so that a backend need not support the rest; `defaults` where nothing was."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**defaults, **{name: value for name, value in found.items() if value is not None}}


#: As a parameter of a command: its fields are the flags.
Answer = Annotated[AnswerFlags, cyclopts.Parameter(name="*")]
#: For commands that are called without any.
NO_FLAGS = AnswerFlags()
