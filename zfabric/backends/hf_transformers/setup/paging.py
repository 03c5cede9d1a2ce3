"""The pool of pages that a model gets, and how long a text and how large a batch it holds."""

from __future__ import annotations

from dataclasses import replace

from zfabric.backends.hf_transformers.cache.kv_layout import KVLayout
from zfabric.backends.hf_transformers.cache.paged_cache import block_tokens
from zfabric.backends.hf_transformers.loading.cache_room import HELD_TOKENS, batch_size
from zfabric.backends.hf_transformers.loading.model_loader import Loaded
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner
from zfabric.backends.hf_transformers.runner.tensor_parallel import LeadingRunner, Ranks


def fitted(loaded: Loaded, layout: KVLayout, options: TransformersOptions) -> Loaded:
    """What was loaded, with a context as long as windows make it and a batch as large as pages do: `load` counts each token in
    each layer, and all that a row may ever have."""
    device, size = loaded.model.device, block_tokens(loaded.model.device)
    blocks = layout.blocks(loaded.kv_tokens_max, size)
    held = layout.cells(layout.taken(HELD_TOKENS, size), size)
    return replace(
        loaded,
        context_length=layout.longest(loaded.length, blocks, size) if any(layout.windows) else loaded.context_length,
        batch_size_max=options.max_batch_size or batch_size(device.type, loaded.kv_tokens_max, held),
    )


def paged_runner(
    loaded: Loaded, model: ModelRunner, layout: KVLayout, options: TransformersOptions, ranks: Ranks | None
) -> PagedRunner:
    """Blocks for as many tokens as the cache may hold."""
    size = block_tokens(model.device)
    blocks = layout.blocks(loaded.kv_tokens_max, size)
    if ranks is not None:
        return LeadingRunner(model, blocks, size, options.narrow, layout, ranks)
    return PagedRunner(model, blocks, size, options.narrow, layout)
