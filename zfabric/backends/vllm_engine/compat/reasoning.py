"""vLLM's own view of reasoning, which holds a constraint back until the answer begins."""

from __future__ import annotations

import inspect
from typing import Any


def tokenizer_of(arguments: Any) -> Any:
    """The tokenizer that an engine with these arguments will have, before there is one; None where that is not known.

    Args:
        arguments: An `AsyncEngineArgs`.
    """
    from vllm.tokenizers import cached_get_tokenizer

    if arguments.skip_tokenizer_init:
        return None
    try:
        return cached_get_tokenizer(
            arguments.tokenizer or arguments.model,
            tokenizer_mode=arguments.tokenizer_mode,
            revision=arguments.tokenizer_revision or arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
    except Exception:  # noqa: BLE001 — the engine says what is wrong with it
        return None


def watch_reasoning(arguments: Any, name: str, tokenizer: Any) -> None:
    """Have an engine see where reasoning ends, if vLLM has a parser of that name that takes this tokenizer.

    Args:
        arguments: An `AsyncEngineArgs`, not used yet.
        name: Of vLLM's parser, and ours.
    """
    from vllm.reasoning import ReasoningParserManager

    try:
        # An engine makes it at its first request with a constraint, and would not survive its refusal.
        ReasoningParserManager.get_reasoning_parser(name)(tokenizer)
    except Exception:  # noqa: BLE001 — whatever it lacks, constraints hold from the first token then
        return
    arguments.reasoning_parser = name


def reasoning_options(engine: Any, *, ended: bool) -> dict[str, Any]:
    """Arguments of the engine's `add_request` for a constrained text.

    Args:
        ended: Whether the text begins with the answer.
    """
    known = "reasoning_ended" in inspect.signature(engine.add_request).parameters
    return {"reasoning_ended": True} if ended and known else {}
