"""Positions of a decoder that counts them from the first column of the cache, as Bart's does.

Such a decoder has a vector for each place, and looks it up by the number of columns that its cache holds. Those are the same for
all rows of a batch, and in a left-padded row some of them are padding. Here each row has the vectors of its own places. Which
modules count so is told by what they take: the number of columns that came before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

#: The argument by which such a module is told of columns.
_COUNTED: Final = "past_key_values_length"
#: By this one a caller tells it places that it has counted. Of these, a list of places alone is sure to be taken as one; what has
#: another shape can be left out, since the module counts as well.
_PLACES: Final = "position_ids"


class DecoderPositions:
    """The modules of one decoder that count columns; false if it has none. `rows` belongs to the thread that runs the model.

    Args:
        decoder: Of transformers.
    """

    def __init__(self, decoder: Any) -> None:
        self._tables = [found for module in decoder.modules() if (found := _table_of(module)) is not None]

    def __bool__(self) -> bool:
        return bool(self._tables)

    @contextmanager
    def rows(self, places: torch.Tensor, count: int) -> Iterator[None]:
        """For one pass.

        Args:
            places: Of each token in its row, (rows, columns), on the decoder's device; anything for padding.
            count: All places are below.
        """
        for table in self._tables:
            table.places, table.count = places, count
        try:
            yield
        finally:
            for table in self._tables:
                table.places = None


def row_places(columns: int, lengths: Sequence[int]) -> list[list[int]]:
    """Places of the newest columns of left-padded rows of these lengths; 0 for padding."""
    return [[max(0, place) for place in range(length - columns, length)] for length in lengths]


def _table_of(module: Any) -> _Table | None:
    """What stands for a module that counts columns, which may be there already; None for any other module."""
    if isinstance(module.forward, _Table):
        return module.forward
    return _Table(module) if _COUNTED in inspect.signature(module.forward).parameters else None


class _Table:
    """One such module, whose `forward` is replaced."""

    def __init__(self, module: Any) -> None:
        self._forward: Callable[..., Any] = module.forward
        self._signature = inspect.signature(module.forward)
        #: A token that has no place, in tables that read tokens.
        self._nowhere: int | None = getattr(module, "padding_idx", None)
        self.places: torch.Tensor | None = None
        self.count = 0
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        places = self.places
        if places is None:
            own: torch.Tensor = self._forward(*args, **kwargs)
            return own
        given = self._signature.bind(*args, **kwargs).arguments
        # Made anew for each pass: weights may be exchanged, and a vector a place is little beside a pass.
        told = given.get(_PLACES)
        if told is not None and told.dim() != 1:
            del given[_PLACES]
        whole = self._forward(**{name: self._alone(name, value) for name, value in given.items()})
        found = whole.reshape(self.count, -1)[places]
        tokens = next((value for value in given.values() if _is_tokens(value)), None)
        if tokens is None or self._nowhere is None:
            return found
        missing = (tokens == self._nowhere).unsqueeze(-1)
        return torch.where(missing, self._forward(*args, **kwargs).reshape(found.shape), found)

    def _alone(self, name: str, value: Any) -> Any:
        """An argument as it would be for one row that has all places, and nothing before it."""
        if name == _COUNTED:
            return 0
        if isinstance(value, (torch.Size, tuple)):
            return torch.Size((1, self.count, *value[2:]))
        if not isinstance(value, torch.Tensor):
            return value
        if name == _PLACES:
            return torch.arange(self.count, device=value.device)
        if _is_tokens(value):
            return value.new_full((1, self.count), int(self._nowhere == 0))
        return value.new_zeros(1).expand(1, self.count, *value.shape[2:])


def _is_tokens(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype == torch.long
