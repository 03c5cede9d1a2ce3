"""What a model whose layers keep a state can do, found out by asking it.

Its rows have to say side by side what it says of each text alone, or it is refused. Whether prompts of different lengths may be
computed together, and whether a prompt may be computed in parts, differs from model to model: a state that padding is written
into, or that a second part does not go on from, is wrong without a word. So both are tried, against the same answers, and what
fails is not done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from transformers import DynamicCache

from zfabric.backends.hf_transformers.failures import out_of_memory
from zfabric.backends.hf_transformers.model_runner import ModelRunner
from zfabric.backends.hf_transformers.self_check import check_distance, difference, named, tolerance, two_texts
from zfabric.backends.hf_transformers.sequence import Answer
from zfabric.errors import ConfigurationError
from zfabric.wire.payloads import GenerateRequest

_NOBODY: Final = [Answer(GenerateRequest()) for _ in range(2)]
#: Where the parts of a text end, counted from its end: the last is a single token, as in a step.
_PARTS_END: Final = (6, 1, 0)
#: Least distance that counts, and how much farther than in the batch itself an answer may be: rounding is about the same
#: everywhere, and what is wrongly allowed would be wrong in every answer.
_LEAST: Final = 0.01
_FARTHER: Final = 4.0


def check_states(model: ModelRunner, raw: Any, tokenizer: Any, name: str) -> None:
    """Ask a decoder, and tell its runner what it can do: `model.pads` and `model.parts` are set.

    Args:
        model: As the engine runs it.
        raw: The same model of transformers.
        tokenizer: Makes the texts' tokens.
        name: For messages.

    Raises:
        ConfigurationError: Rows of a batch differ from the texts alone, or the model cannot run one.
    """
    texts = two_texts(tokenizer)
    model.pads = model.parts = False
    with named(name), torch.inference_mode():
        expected = [_alone(model, raw, text, 1) for text in texts]
        longer = [*texts[0], int(expected[0].argmax())]
        after = _alone(model, raw, longer, 2)
        found, last = _side_by_side(model, texts, longer[-1], name)
    distance = max(map(difference, [*expected, after], [*found, last]))
    check_distance(distance, raw, name)
    limit = min(tolerance(raw), max(_LEAST, _FARTHER * distance))
    with torch.inference_mode():
        model.pads = _close(lambda: _padded(model, texts), expected, limit)
        model.parts = _close(lambda: [_in_parts(model, text) for text in texts], expected, limit)


def _alone(model: ModelRunner, raw: Any, text: Sequence[int], steps: int) -> torch.Tensor:
    """The model's own logits after a text of which it has stepped the last tokens, with its own cache: some models say
    something else of a text that they read in one pass."""
    cache = DynamicCache(config=raw.config)
    ends = [*range(len(text) - steps, len(text) + 1)]
    for begin, end in zip([0, *ends], ends, strict=False):
        places = {"position_ids": torch.arange(begin, end, device=raw.device).unsqueeze(0)}
        ids = torch.tensor([text[begin:end]], dtype=torch.long, device=raw.device)
        given = {model.cache_name: cache, "use_cache": True, **(places if model.takes_positions else {})}
        last: torch.Tensor = raw(input_ids=ids, **given).logits[0, -1]
    return last[: model.vocabulary_size]


def _close(ask: Callable[[], Sequence[torch.Tensor]], expected: Sequence[torch.Tensor], limit: float) -> bool:
    """Whether a model can do something: it does not fail, and comes to the same answers."""
    try:
        return max(map(difference, expected, ask())) <= limit
    except Exception as error:
        if out_of_memory(error):
            raise
        return False


def _side_by_side(
    model: ModelRunner, texts: list[list[int]], token: int, name: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits after both, that join once all but their last token is computed; then after the first text and a token, once the
    second one has left and the first one has a copy of itself."""
    caches = []
    for text in texts:
        caches.append(model.start(_NOBODY[:1]))
        model([text[:-1]], [len(text) - 1], caches[-1], answers=_NOBODY[:1])
    cache, lengths = caches[0], [len(text) for text in texts]
    cache.merge(caches[1])
    _check_rows_of(cache, 2, name)
    both = model([[text[-1]] for text in texts], lengths, cache, answers=_NOBODY)
    cache.select([0, 0], max(lengths) - lengths[0])
    last = model([[token], [token]], [lengths[0] + 1] * 2, cache, answers=_NOBODY)
    return list(both), last[1]


def _check_rows_of(cache: Any, rows: int, name: str) -> None:
    """Raises: ConfigurationError: Not every state has so many rows."""
    for number, layer in enumerate(cache.layers):
        for state in getattr(layer, "states", ()):
            if state.shape[0] != rows:
                raise ConfigurationError(
                    f"{name!r} keeps a state of shape {tuple(state.shape)} for {rows} rows in layer {number}, which cannot be "
                    f"split into rows",
                    model=name,
                )


def _padded(model: ModelRunner, texts: list[list[int]]) -> list[torch.Tensor]:
    """Logits after both, which are computed together but for their last token."""
    width = max(map(len, texts)) - 1
    cache = model.start(_NOBODY)
    rows = [[0] * (width + 1 - len(text)) + text[:-1] for text in texts]
    model(rows, [len(text) - 1 for text in texts], cache, answers=_NOBODY)
    return list(model([[text[-1]] for text in texts], [len(text) for text in texts], cache, answers=_NOBODY))


def _in_parts(model: ModelRunner, text: list[int]) -> torch.Tensor:
    """Logits after a text that is computed in parts, the first of them a single token or more."""
    cache = model.start(_NOBODY[:1])
    begin, logits = 0, torch.empty(0)
    for end in (len(text) - back for back in _PARTS_END):
        logits = model([text[begin:end]], [end], cache, answers=_NOBODY[:1])
        begin = end
    return logits[0]
