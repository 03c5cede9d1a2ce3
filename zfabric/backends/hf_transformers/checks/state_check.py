"""What a model whose layers keep a state can do, found out by asking it.

Its rows have to say side by side what it says of each text alone, or it is refused. Whether prompts of different lengths may be
computed together, and whether a prompt may be computed in parts, differs from model to model: a state that padding is written
into, or that a second part does not go on from, is wrong without a word. So both are tried, against the same answers, and what
fails is not done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch

from zfabric.backends.hf_transformers.checks.self_check import check_distance, difference, tolerance, two_texts
from zfabric.backends.hf_transformers.failures import named, out_of_memory
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.errors import ConfigurationError
from zfabric.wire.payloads import GenerateRequest

_NOBODY: Final = [Answer(GenerateRequest()) for _ in range(2)]
#: Where the parts of a text end, counted from its end: the second is short, so that a state which it does not go on from is
#: missed, and the last is a single token, as in a step.
_PARTS_END: Final = (3, 1, 0)
#: How far a state of the first layer that has one may be from the right one, by its size. Nothing before it enlarges what
#: rounding does, so this tells a state that is lost or padded in half precision, too, where logits may differ more.
_STATE_TOLERANCE: Final = 0.01


class Found(NamedTuple):
    """What a model makes of a text.

    Attributes:
        states: Of the first layers that have any, when all but the last token is read.
        logits: After the text.
    """

    states: list[torch.Tensor]
    logits: torch.Tensor


def check_states(model: ModelRunner, raw: Any, tokenizer: Any, name: str) -> None:
    """Ask a decoder, and tell its runner what it can do: `model.pads` and `model.parts` are set.

    Arguments and errors as of `self_check.check_rows`.
    """
    texts = two_texts(tokenizer)
    model.pads = model.parts = False
    with named(name), torch.inference_mode():
        expected = [_alone(model, raw, text, 1) for text in texts]
        longer = [*texts[0], int(expected[0].argmax())]
        after = _alone(model, raw, longer, 2)
        found, last = _side_by_side(model, texts, longer[-1], name)
    for right, got in zip([*expected, after], [*(one.logits for one in found), last], strict=True):
        check_distance(difference(right, got), raw, name)
    with torch.inference_mode():
        model.pads = _same(lambda: _padded(model, texts), found, tolerance(raw))
        model.parts = _same(lambda: [_in_parts(model, text) for text in texts], found, tolerance(raw))


def _alone(model: ModelRunner, raw: Any, text: Sequence[int], steps: int) -> torch.Tensor:
    """The model's own logits after a text of which it has stepped the last tokens, with its own cache: some models say
    something else of a text that they read in one pass."""
    assert model.state_cache is not None
    cache = model.state_cache.of_its_own(raw.config)
    ends = [*range(len(text) - steps, len(text) + 1)]
    for begin, end in zip([0, *ends], ends, strict=False):
        places = {"position_ids": torch.arange(begin, end, device=raw.device).unsqueeze(0)}
        ids = torch.tensor([text[begin:end]], dtype=torch.long, device=raw.device)
        given = {model.cache_name: cache, "use_cache": True, **(places if model.takes_positions else {})}
        made = raw(input_ids=ids, **given)
        cache = getattr(made, model.cache_name, None) or cache
    last: torch.Tensor = made.logits[0, -1]
    return last[: model.vocabulary_size]


def _same(ask: Callable[[], Sequence[Found]], expected: Sequence[Found], limit: float) -> bool:
    """Whether a model can do something: it does not fail, and comes to the same states and the same answers."""
    try:
        found = ask()
    except Exception as error:
        if out_of_memory(error):
            raise
        return False
    return all(
        difference(right.logits, got.logits) <= limit
        and all(_apart(one, other) <= _STATE_TOLERANCE for one, other in zip(right.states, got.states, strict=True))
        for right, got in zip(expected, found, strict=True)
    )


def _apart(right: torch.Tensor, got: torch.Tensor) -> float:
    """How far a state is from the right one, by the size of that one."""
    wanted, given = right.float(), got.float()
    return float((wanted - given).norm() / wanted.norm().clamp(min=1e-9))


def _states(cache: Any, row: int) -> list[torch.Tensor]:
    """Copies of what a row has in the first layer with a convolution's state, and in the first with another."""
    layers = [layer for layer in cache.layers if hasattr(layer, "states")]
    conv = next(([*layer.conv_states.values()] for layer in layers if _any(layer.conv_states)), [])
    other = next(([*layer.recurrent_states.values()] for layer in layers if _any(layer.recurrent_states)), [])
    return [state[row].clone() for state in (*conv, *other) if state is not None]


def _any(states: dict[int, Any]) -> bool:
    return any(state is not None for state in states.values())


def _side_by_side(
    model: ModelRunner, texts: list[list[int]], token: int, name: str
) -> tuple[list[Found], torch.Tensor]:
    """What is made of both, that join once all but their last token is computed; and logits after the first text and a token,
    once the second one has left and the first one has a copy of itself."""
    caches = []
    for text in texts:
        caches.append(model.start(_NOBODY[:1]))
        model([text[:-1]], [len(text) - 1], caches[-1], answers=_NOBODY[:1])
    states = [_states(one, 0) for one in caches]
    cache, lengths = caches[0], [len(text) for text in texts]
    cache.merge(caches[1])
    _check_rows_of(cache, 2, name)
    both = model([[text[-1]] for text in texts], lengths, cache, answers=_NOBODY)
    cache.select([0, 0], max(lengths) - lengths[0])
    last = model([[token], [token]], [lengths[0] + 1] * 2, cache, answers=_NOBODY)
    return [*map(Found, states, both)], last[1]


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


def _padded(model: ModelRunner, texts: list[list[int]]) -> list[Found]:
    """What is made of both, which are computed together but for their last token."""
    width = max(map(len, texts)) - 1
    cache = model.start(_NOBODY)
    rows = [[0] * (width + 1 - len(text)) + text[:-1] for text in texts]
    model(rows, [len(text) - 1 for text in texts], cache, answers=_NOBODY)
    states = [_states(cache, row) for row in range(len(texts))]
    both = model([[text[-1]] for text in texts], [len(text) for text in texts], cache, answers=_NOBODY)
    return [*map(Found, states, both)]


def _in_parts(model: ModelRunner, text: list[int]) -> Found:
    """What is made of a text that is computed in parts."""
    cache = model.start(_NOBODY[:1])
    begin, states, logits = 0, list[torch.Tensor](), torch.empty(0)
    for end in (len(text) - back for back in _PARTS_END):
        states = _states(cache, 0) if end == len(text) else []
        logits = model([text[begin:end]], [end], cache, answers=_NOBODY[:1])
        begin = end
    return Found(states, logits[0])
