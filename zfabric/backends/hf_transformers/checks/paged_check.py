"""Whether a model can be computed over pages: it takes its attention from transformers' interface, and answers as alone.

What its configuration says of windows has to be what its layers ask attention for; the rest the model itself is asked, as for
padded rows: two texts, in parts of several lengths and in one line, against its own answer to each of them alone and whole.
"""

from __future__ import annotations

import re
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.cache.attention import SCORED
from zfabric.backends.hf_transformers.cache.block_table import table_of
from zfabric.backends.hf_transformers.cache.kv_layout import KVLayout, layout_of
from zfabric.backends.hf_transformers.checks.picture_check import why_whole
from zfabric.backends.hf_transformers.checks.self_check import alone, difference, tolerance, two_texts
from zfabric.backends.hf_transformers.failures import out_of_memory
from zfabric.backends.hf_transformers.loading.model_loader import Loaded
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner, Part
from zfabric.errors import ConfigurationError
from zfabric.wire.payloads import GenerateRequest

#: Settings that may keep a token from seeing all before it, if they are not as small as to show in the answers; windows that
#: slide are looked at layer by layer, and experts are no bound.
_BOUNDED: Final = re.compile(r"window|chunk|local|sparse|block_size|index_topk|stride")
_OTHERS: Final = re.compile(r"_?(use_)?sliding_window.*|max_window_layers|num_local_experts")
#: Layers whose attention is followed over pages.
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BLOCK_TOKENS: Final = 4
#: What each pass computes of the two texts (of 7 and 12 tokens): from where to where.
_PASSES: Final = (((0, 3), (0, 5)), ((3, 4), (5, 11)), ((4, 7), (11, 12)))


def layout_or_reason(loaded: Loaded, model: ModelRunner, options: TransformersOptions) -> KVLayout | str:
    """Which layers of a model share blocks, or why its rows are padded and not paged.

    Raises:
        ConfigurationError: They are to be paged, and cannot be.
    """
    narrow = options.kv_cache_dtype != "auto"
    if options.kv_cache == "padded":
        if narrow:
            raise ConfigurationError(
                f"kv_cache_dtype {options.kv_cache_dtype!r} goes with a paged cache, not a padded one"
            )
        return "it is asked for"
    found = _unfit(loaded, model, options) or _tried_out(loaded, model, options)
    if isinstance(found, KVLayout) and loaded.kind == "vision":
        found = why_whole(loaded, model) or _with_pictures(found, model)
    if isinstance(found, KVLayout):
        return found
    if narrow:
        raise ConfigurationError(
            f"{options.model!r} cannot have keys and values in {options.kv_cache_dtype!r}, which are for pages: {found}",
            model=options.model,
        )
    if options.kv_cache == "paged" or options.tensor_parallel > 1:
        raise ConfigurationError(f"{options.model!r} cannot have a paged cache: {found}", model=options.model)
    return found


def _with_pictures(layout: KVLayout, model: ModelRunner) -> KVLayout:
    """The same for prompts with pictures: tokens that see one another have one pass, which may be longer than any part."""
    spans = model.vision is not None and model.vision.spans
    return KVLayout(kept_because="tokens of its pictures see one another") if spans and any(layout.windows) else layout


def _unfit(loaded: Loaded, model: ModelRunner, options: TransformersOptions) -> str | None:
    """What the settings say."""
    config = loaded.model.config.get_text_config()
    if loaded.kind not in ("causal", "vision"):
        return f"its kind is {loaded.kind}"
    if model.states:
        return "its layers keep a state of each row"
    if options.device_map is not None:
        return "it is spread over devices"
    if model.ropes is not None:
        return "its positions' frequencies change with a text's length"
    if config._attn_implementation not in ("sdpa", SCORED):
        return f"its attention is {config._attn_implementation}"
    if not model.takes_positions:
        return "it takes no positions"
    others = set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING}
    if others:
        return f"it has layers of kind {', '.join(sorted(others))}"
    bounded = sorted(
        name
        for name, value in config.to_dict().items()
        if value and _BOUNDED.search(name) and not _OTHERS.fullmatch(name) and not _tried(value)
    )
    return f"its attention may be bounded by {', '.join(bounded)}" if bounded else None


def _tried(value: Any) -> bool:
    """Whether a setting, such as a number of experts, would show in the answers if it were a bound: a text exceeds it."""
    return type(value) is int and value < _PASSES[-1][1][1]


def _tried_out(loaded: Loaded, model: ModelRunner, options: TransformersOptions) -> KVLayout | str:
    """What the model itself says."""
    texts = two_texts(loaded.tokenizer)
    runner = PagedRunner(model, 8, _BLOCK_TOKENS)
    try:
        with torch.inference_mode():
            expected = [alone(loaded.model, text) for text in texts]
            found = _in_line(runner, texts)
    except Exception as error:
        if out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    distance = max(difference(right, got) for right, got in zip(expected, found, strict=True))
    if not distance <= tolerance(loaded.model):
        return f"it answers otherwise over pages than alone, by {distance:.2g} times the spread of its answers"
    cache = runner.cache
    other = _other_windows(loaded.model.config.get_text_config(), cache.windows)
    if other is not None:
        return other
    # A part of a prompt, or the newest token and what may follow it; and one that is begun before that is known.
    ahead = options.prefill_chunk_tokens + options.num_speculative_tokens + 2
    return layout_of(cache.windows, loaded.length, ahead=ahead, alike=cache.alike)


def _in_line(runner: PagedRunner, texts: list[list[int]]) -> list[torch.Tensor]:
    """Logits after both, whose blocks alternate."""
    nobody = Answer(GenerateRequest())
    tables = [table_of([0, 2]), table_of([1, 3, 5])]
    last: list[torch.Tensor] = []
    for both in _PASSES:
        parts = [
            Part(nobody, text[begin:end], end, its, "last")
            for text, its, (begin, end) in zip(texts, tables, both, strict=True)
        ]
        order = sorted(range(2), key=lambda place: len(parts[place].tokens) > 1)
        logits = runner.forward([parts[place] for place in order])
        last = [logits[order.index(place)] for place in range(2)]
    return last


def _other_windows(config: Any, asked: dict[int, int | None]) -> str | None:
    """Whether layers ask for the windows that the configuration gives them."""
    window = getattr(config, "sliding_window", None) or None
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        told = dict.fromkeys(asked, window)
    else:
        told = {layer: window if kinds[layer] == _SLIDING else None for layer in asked}
    wrong = sorted(layer for layer, its in asked.items() if its != told[layer])
    return f"layers {wrong} ask for other windows than its configuration gives" if wrong else None
