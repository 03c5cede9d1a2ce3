"""Counts of tokens while an answer is made: vLLM's `continuous_usage_stats`, which load tools count by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from zfabric.gateway.call import Call
from zfabric.gateway.generation import Ask
from zfabric.gateway.sampling import TextFields
from zfabric.gateway.together import together
from zfabric.wire.payloads import Delta

#: What a template is told; a prompt's length depends on it.
_TEMPLATE: Final = (
    "add_generation_prompt", "chat_template_kwargs", "continue_final_message", "documents", "tools",
)  # fmt: skip


class RunningUsage:
    """What each choice has so far.

    Args:
        prompts: Tokens of each prompt.
    """

    def __init__(self, prompts: Sequence[int]) -> None:
        self._prompts = prompts
        self._made: Counter[tuple[int, int]] = Counter()

    def of(self, position: int, index: int, delta: Delta | None = None) -> dict[str, int]:
        """The usage of a choice of the request at `position`, with what `delta` adds."""
        self._made[position, index] += len(delta.token_ids) if delta is not None else 0
        prompt, made = self._prompts[position], self._made[position, index]
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


async def running_usage(call: Call, request: TextFields, asks: Sequence[Ask]) -> RunningUsage | None:
    """Counts for a stream that is to have them in every event: one more question a prompt, before the answer begins.

    Raises:
        FabricError: The model cannot count, or the caller went away.
    """
    if request.stream_options is None or not request.stream_options.continuous_usage_stats:
        return None
    return RunningUsage(await call.unless_left(together(prompt_tokens(call, ask) for ask in asks)))


async def prompt_tokens(call: Call, ask: Ask) -> int:
    """Tokens of a prompt, as its model counts them. Raises: FabricError: It cannot."""
    options: dict[str, Any] = ask.options
    if "prompt_token_ids" in options:
        return len(options["prompt_token_ids"])
    template = {name: options[name] for name in _TEMPLATE if name in options}
    return await call.client.count_tokens(ask.model, ask.prompt, messages=options.get("messages"), **template)
