"""vLLM's own view of reasoning, which holds a constraint back until the answer begins."""

from __future__ import annotations

import inspect
from collections.abc import Collection
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
    except (OSError, ValueError):
        # The engine says what is wrong with it.
        return None


def watch_reasoning(arguments: Any, name: str, tokenizer: Any, marks: Collection[str]) -> None:
    """Have an engine see where reasoning ends.

    Args:
        arguments: An `AsyncEngineArgs`, not used yet.
        name: Of vLLM's parser, and ours.
        marks: Of reasoning: vLLM's parser looks for their tokens, and the engine would not start without them.
    """
    vocabulary = tokenizer.get_vocab()
    if all(mark in vocabulary for mark in marks):
        arguments.reasoning_parser = name


def reasoning_options(engine: Any, *, ended: bool) -> dict[str, Any]:
    """Arguments of the engine's `add_request` for a constrained text.

    Args:
        ended: Whether the text begins with the answer.
    """
    known = "reasoning_ended" in inspect.signature(engine.add_request).parameters
    return {"reasoning_ended": True} if ended and known else {}
