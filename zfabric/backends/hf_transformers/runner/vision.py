"""Pictures of a prompt: each is seen in a pass of its own, and what was seen becomes vectors of the prompt's tokens.

Theory of operation. A vision-language model is a tower that sees, and a language model that reads vectors. Here both are run
apart. `see` runs the tower. `read` has the model itself put what was seen among the vectors of a prompt's tokens, and catches
what it would hand to its language model: vectors, positions of several dimensions, tokens that see later ones, and what some
models add in their first layers. All of that belongs to single tokens, so the language model can be given it part by part, beside
tokens of other rows (`reading`). Nothing here knows models by name: what cannot be cut so is refused by what is caught.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner

#: How a model is given what was seen before.
_SEEN: Final = "mm_encoder_outputs"
_PIXELS: Final = "pixel_values"
#: Height and width of each picture in patches, which lie in one line.
_GRID: Final = "image_grid_thw"
#: Of what the tower says, what is put among the vectors.
_SAID: Final = ("pooler_output", "deepstack_features")
#: What first layers add to the vectors of picture tokens, and which tokens those are.
_DEEP, _DEEP_PLACES = "deepstack_visual_embeds", "visual_pos_masks"
#: What a language model is given, and whoever gives it parts tells it anew.
_GIVEN: Final = frozenset(
    {"attention_mask", "cache_position", "inputs_embeds", "past_key_values", "position_ids", _DEEP, _DEEP_PLACES}
)

Media = Mapping[str, Any]


class Embedded(NamedTuple):
    """What a prompt with pictures is to a language model.

    Attributes:
        vectors: Of each token, (tokens, size).
        positions: Of each, (dimensions, tokens); None if they are its place.
        spans: Tokens that see each other whichever comes first, as begins and ends: none of these is cut.
        places: Tokens that first layers add something to.
        deep: What each of these layers adds, (places, size).
    """

    vectors: torch.Tensor
    positions: torch.Tensor | None
    spans: list[tuple[int, int]]
    places: list[int]
    deep: list[torch.Tensor]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self.vectors.shape[0])

    def end(self, begin: int, end: int) -> int:
        """Where a part that begins and might end there ends: before a span it would cut, or behind it if it begins there."""
        for first, last in self.spans:
            if first < end < last:
                return first if first > begin else last
        return end


class Insert(NamedTuple):
    """A part of such a prompt in a line of tokens.

    Attributes:
        at: Its first token in the line.
        begin, end: Its tokens of the prompt.
    """

    at: int
    begin: int
    end: int
    embedded: Embedded


class Vision:
    """What sees for one model.

    Args:
        model: Its forward pass.

    Attributes:
        apart: Whether the pictures of a request are seen one by one, and not all at once.
        spans: Whether a prompt was read that has spans.

    Raises:
        NotImplementedError: It takes nothing that was seen before.
    """

    def __init__(self, model: ModelRunner) -> None:
        self._model = model
        whole: Any = getattr(model.raw, "model", None)
        language = getattr(whole, "language_model", None)
        self._whole = whole
        if language is None or _SEEN not in inspect.signature(whole.forward).parameters:
            raise NotImplementedError("it takes no pictures that were seen before")
        self._accepted = frozenset(inspect.signature(whole.forward).parameters)
        self._tower_takes = frozenset(inspect.signature(whole.get_image_features).parameters)
        self._door = _Door(language)
        self.apart = True
        self.spans = False

    def pieces(self, media: Media, pictures: int) -> list[Media]:
        """What the tower is given for so many pictures: of each alone, or of all at once where nobody can tell them apart."""
        given = {name: value for name, value in media.items() if name in self._tower_takes}
        found = _apart(given, pictures) if self.apart and pictures > 1 else None
        return found or [given]

    def see(self, piece: Media, answer: Answer) -> Any:
        """What the tower says of a piece."""
        with self._model.lora.rows([answer.adapter]):
            return self._whole.get_image_features(**self._model.sent(piece), return_dict=True)

    def read(self, answer: Answer, seen: Sequence[Any]) -> Embedded:
        """Put what was seen of all pieces among the prompt's tokens; `answer.shift` is set.

        Raises:
            NotImplementedError: The language model is given what cannot be cut into parts.
        """
        model, media = self._model, answer.media or {}
        columns = len(answer.prompt)
        given = {name: value for name, value in model.sent(media, columns).items() if name in self._accepted}
        arguments = {"input_ids": model.send([answer.prompt]), **given}
        arguments["position_ids"] = model.seen_positions(answer, arguments)
        if arguments["position_ids"] is None:
            arguments["position_ids"] = torch.arange(columns, device=model.device).unsqueeze(0)
        arguments.pop(_PIXELS, None)
        arguments[_SEEN] = {"image": seen[0] if len(seen) == 1 else _joined(seen)}
        with model.lora.rows([answer.adapter]):
            caught = self._door.caught(self._whole, arguments)
        found = _embedded(caught)
        self.spans = self.spans or bool(found.spans)
        return found

    @contextmanager
    def reading(self, inserts: Sequence[Insert]) -> Iterator[None]:
        """For one pass of the model over a line of tokens, what some of them are."""
        self._door.inserts = inserts
        try:
            yield
        finally:
            self._door.inserts = ()


class Sight:
    """The pictures of one prompt on their way.

    Attributes:
        embedded: What the prompt is to the language model, once all are seen.
    """

    def __init__(self, vision: Vision, answer: Answer) -> None:
        self._vision, self._answer = vision, answer
        self._left = vision.pieces(answer.media or {}, answer.pictures)
        self._seen: list[Any] = []
        self.embedded: Embedded | None = None

    def advance(self) -> None:
        """See one more; after the last of them, the prompt is read."""
        self._seen.append(self._vision.see(self._left[len(self._seen)], self._answer))
        if len(self._seen) == len(self._left):
            self.embedded = self._vision.read(self._answer, self._seen)
            self._left, self._seen = [], []


class _Door:
    """Stands before a language model, whose `forward` is replaced."""

    def __init__(self, language: Any) -> None:
        self._forward = language.forward
        self._caught: dict[str, Any] | None = None
        self._catches = False
        self.inserts: Sequence[Insert] = ()
        language.forward = self

    def caught(self, whole: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the language model would be given, if its model were given these."""
        self._caught, self._catches = None, True
        try:
            whole(**arguments)
        finally:
            self._catches, found = False, self._caught
            self._caught = None
        if found is None or found.get("inputs_embeds") is None:
            raise NotImplementedError("its language model is given no vectors")
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._catches:
            self._caught = kwargs
            return BaseModelOutputWithPast(last_hidden_state=kwargs.get("inputs_embeds"))
        if self.inserts:
            kwargs.update(_inserted(kwargs["inputs_embeds"], kwargs["position_ids"], self.inserts))
        return self._forward(*args, **kwargs)


def _inserted(vectors: torch.Tensor, places: torch.Tensor, inserts: Sequence[Insert]) -> dict[str, Any]:
    """Arguments of a language model for a line of tokens, (1, tokens, size) and (1, tokens), some of them of such prompts."""
    vectors = vectors.clone()
    dimensions = next((len(one.embedded.positions) for one in inserts if one.embedded.positions is not None), 0)
    positions = places.expand(dimensions, *places.shape).clone() if dimensions else places
    seen = torch.zeros(places.shape, dtype=torch.bool)
    deep: list[list[torch.Tensor]] = []
    for at, begin, end, embedded in inserts:
        vectors[0, at : at + end - begin] = embedded.vectors[begin:end]
        if embedded.positions is not None:
            positions[:, 0, at : at + end - begin] = embedded.positions[:, begin:end]
        first, last = bisect_left(embedded.places, begin), bisect_left(embedded.places, end)
        if first < last:
            seen[0, [at + place - begin for place in embedded.places[first:last]]] = True
            deep.append([layer[first:last] for layer in embedded.deep])
    found = {"inputs_embeds": vectors, "position_ids": positions}
    if not deep:
        return found
    added = [torch.cat(parts) for parts in zip(*deep, strict=True)]
    return {**found, _DEEP: added, _DEEP_PLACES: seen.to(vectors.device)}


def _embedded(given: dict[str, Any]) -> Embedded:
    """What a language model is given for one prompt. Raises: NotImplementedError: Not all of it is of single tokens."""
    others = sorted(name for name, value in given.items() if name not in _GIVEN and _holds_tensors(value))
    if others:
        raise NotImplementedError(f"its language model takes {', '.join(others)} beside vectors")
    vectors = given["inputs_embeds"][0]
    positions = given.get("position_ids")
    if positions is not None:
        positions = positions[:, 0] if positions.dim() == 3 else None
    masks = given.get("attention_mask")
    spans = {tuple(_spans(mask)) for mask in (masks.values() if isinstance(masks, dict) else [masks])}
    if len(spans) > 1:
        raise NotImplementedError("not all its layers let the same tokens see later ones")
    mask = given.get(_DEEP_PLACES)
    places = [] if mask is None else mask[0].nonzero().flatten().tolist()
    return Embedded(vectors, positions, list(spans.pop()), places, list(given.get(_DEEP) or []) if places else [])


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def _spans(mask: Any) -> list[tuple[int, int]]:
    """Which tokens see later ones, by what a layer's attention is given: (1, 1, tokens, tokens), or nothing at all.

    Raises:
        NotImplementedError: They do so otherwise than in spans whose tokens see one another.
    """
    if mask is None or mask.dim() != 4:
        return []
    shown = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    later = shown.triu(1).sum(dim=1).tolist()
    found: list[tuple[int, int]] = []
    for place, count in enumerate(later):
        if count and not (found and place < found[-1][1]):
            found.append((place, place + count + 1))
    for begin, end in found:
        if later[begin:end] != list(range(end - begin - 1, -1, -1)):
            raise NotImplementedError("its tokens see later ones otherwise than in spans")
    return found


def _apart(given: Media, pictures: int) -> list[Media] | None:
    """What belongs to each picture; None if nobody can tell."""
    patches: list[int] = given[_GRID].prod(dim=-1).tolist() if _GRID in given else []
    found: list[Media] = [{} for _ in range(pictures)]
    for name, value in given.items():
        if patches and len(patches) == pictures and value.shape[0] == sum(patches):
            parts = value.split(patches)
        elif value.shape[0] == pictures:
            parts = value.split(1)
        elif value.dim() > 1 and tuple(value.shape[:2]) == (1, pictures):
            parts = value.split(1, dim=1)
        else:
            return None
        found = [{**its, name: part} for its, part in zip(found, parts, strict=True)]
    return found


def _joined(seen: Sequence[Any]) -> Any:
    """What the tower would have said of all at once, as far as it is put among the vectors."""
    said: dict[str, Any] = {}
    for name in _SAID:
        values = [getattr(one, name, None) for one in seen]
        if name == "deepstack_features" and values[0] is not None:
            said[name] = [_one_after_the_other(layers) for layers in zip(*values, strict=True)]
        elif values[0] is not None:
            said[name] = _one_after_the_other(values)
    return type(seen[0])(**said)


def _one_after_the_other(values: Sequence[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return [part for value in values for part in value]
