"""What the details of a model tell of how it is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zfabric.backends.front.embed_inputs import told_prompts
from zfabric.backends.front.sounds import seconds_heard
from zfabric.backends.hf_transformers.cache.kv_layout import KVLayout
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.errors import Detail
from zfabric.sounds import HEARS_SECONDS

if TYPE_CHECKING:
    from zfabric.backends.hf_transformers.loading.model_loader import Loaded
    from zfabric.backends.hf_transformers.setup.assembly import Assembled


def cache_told(assembled: Assembled, options: TransformersOptions) -> dict[str, Detail]:
    """Of which kind a model's cache is, how many sizes of steps are recorded, and whether pictures are seen at once."""
    layout = assembled.layout
    if not isinstance(layout, KVLayout):
        return {"kv_cache": "padded", "kv_cache_padded_because": str(layout)}
    stored, graphs = options.narrow, assembled.graphs
    told: dict[str, Detail] = (
        {"kv_cache": "paged"} if stored is None else {"kv_cache": "paged", "kv_cache_dtype": stored}
    )
    if len(layout.windows) > 1:
        told |= {"kv_tables": len(layout.windows)}
    if layout.kept_because is not None:
        told |= {"kv_windows_kept_because": layout.kept_because}
    if assembled.vision is not None and not assembled.vision.apart:
        told["pictures_at_once"] = True
    return {**told, "step_graphs": graphs} if isinstance(graphs, int) else told


def speculation_told(options: TransformersOptions) -> dict[str, Detail]:
    """Who guesses."""
    told: dict[str, Detail] = {} if options.speculation is None else {"speculation": options.speculation}
    return told if options.assistant is None else {**told, "assistant": options.assistant}


def hearing_told(loaded: Loaded) -> dict[str, Detail]:
    """How long a sound may be, for those who cut longer ones."""
    return {HEARS_SECONDS: seconds_heard(loaded.processor)} if loaded.kind == "speech" else {}


def vectors_told(loaded: Loaded) -> dict[str, Detail]:
    """What a model's details say of how it makes vectors, or of its classes."""
    if loaded.head is not None:
        return {"classes": len(loaded.head.labels)}
    sentences = loaded.sentences
    return {"pooling": ", ".join(loaded.pooler.modes), **told_prompts(sentences.prompts, sentences.prompt_name)}
