"""A request as an engine is given it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Addition(NamedTuple):
    """One request.

    Attributes:
        request_id: Its name.
        given: vLLM's input.
        parameters: vLLM's `SamplingParams`.
        adapter: vLLM's `LoRARequest`.
        priority: The lesser goes first.
        headers: By which the engine goes on with the request's trace.
        constrained: More arguments of vLLM's for a text that is constrained.
        continued: The prompt ends with these tokens of its answer, which are not prompt to its text; and how many characters of
            their text have been given out.
        marks: Special tokens that the text has to have, by id: for whoever reads it by them.
    """

    request_id: str
    given: Any
    parameters: Any
    adapter: Any = None
    priority: int = 0
    headers: Mapping[str, str] | None = None
    constrained: Mapping[str, Any] = {}
    continued: tuple[list[int], int] | None = None
    marks: Mapping[int, str] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """What vLLM is told by name."""
        told = {"lora_request": self.adapter, "priority": self.priority, "trace_headers": self.headers or None}
        return {**told, **self.constrained}
