"""Requests for vectors, classes, scores and rewards."""

from __future__ import annotations

from typing import Any


def pooling_params(task: str, *, activate: bool, segments: int | None = None) -> Any:
    """Parameters of one pooling request.

    Args:
        task: embed, token_embed, classify or token_classify.
        activate: Give vectors of length 1, or probabilities, instead of what the model computes.
        segments: Where the second text of a pair begins, for models that tell the two apart.
    """
    from vllm import PoolingParams

    extra = None if segments is None else {"compressed_token_type_ids": segments}
    return PoolingParams(task=task, use_activation=activate, extra_kwargs=extra)


def label_names(engine: Any) -> list[str]:
    """What the classes of a model with a head are called, in their order."""
    names = getattr(engine.vllm_config.model_config.hf_config, "id2label", None) or {}
    return [str(names[index]) for index in sorted(names)]


def render_pair(engine: Any, query: str, document: str) -> tuple[list[int], int | None]:
    """Token ids of two texts that a cross-encoder compares, and where the second begins if the model wants to know."""
    tokenizer = engine.renderer.get_tokenizer()
    if not engine.vllm_config.model_config.use_sep_token:
        return list(tokenizer(query + document)["input_ids"]), None
    encoded = tokenizer(text=query, text_pair=document)
    segments = encoded.get("token_type_ids") or []
    return list(encoded["input_ids"]), segments.index(1) if 1 in segments else None
