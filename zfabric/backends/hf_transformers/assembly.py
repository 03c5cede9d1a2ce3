"""Puts an engine together: model, intake, batch and the queue of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zfabric.backends.hf_transformers.batch import Model
from zfabric.backends.hf_transformers.embed_queue import EmbedQueue
from zfabric.backends.hf_transformers.embedding import Embedder
from zfabric.backends.hf_transformers.engine import Engine, Step
from zfabric.backends.hf_transformers.intake import Intake
from zfabric.backends.hf_transformers.loading import Loaded, load
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.pace import Pace
from zfabric.backends.hf_transformers.sequence import Answer
from zfabric.errors import FabricError
from zfabric.wire.payloads import EmbedRequest


def assemble(
    options: TransformersOptions,
    *,
    on_step: Callable[[Step], None],
    on_failure: Callable[[Answer, FabricError], None],
    on_death: Callable[[FabricError], None],
) -> tuple[Loaded, Engine, Embedder, EmbedQueue]:
    """Load, start the engine and warm it up. Takes as long as that takes.

    Raises:
        ConfigurationError: See `load`.
    """
    loaded = load(options)
    model = Model(loaded.model)
    intake = Intake(
        loaded.tokenizer,
        vocabulary_size=model.vocabulary_size,
        context_length=loaded.context_length,
        end_tokens=_end_tokens(loaded.model, loaded.tokenizer),
        seed=options.seed,
    )
    engine = Engine(
        model,
        intake,
        loaded.tokenizer,
        batch_size_max=options.max_batch_size,
        kv_tokens_max=loaded.kv_tokens_max,
        pace=Pace(options.prefill_chunk_tokens, options.prefill_wait_ms / 1_000),
        on_step=on_step,
        on_failure=on_failure,
        on_death=on_death,
    )
    embedder = Embedder(
        loaded.model if not loaded.generates else loaded.model.base_model,
        loaded.tokenizer,
        context_length=loaded.context_length,
        pooling=loaded.pooling,
        dimensions=loaded.dimensions,
    )
    queue = EmbedQueue(embedder, engine.run_job, options.embed_batch_tokens)
    engine.start()
    # What is made at first use is there before the worker says that it is ready.
    if loaded.generates:
        engine.run_job(model.warm_up).result()
    queue.submit(embedder.pieces(EmbedRequest(inputs=["warm-up"]))).result()
    return loaded, engine, embedder, queue


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, by the generation settings and the tokenizer."""
    found: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for value in (getattr(settings, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(value)
    return frozenset(found)
