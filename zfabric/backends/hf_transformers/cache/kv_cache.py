"""A key-value cache that grows in place.

The cache of transformers appends by copying all that it holds, at every step and in every layer. This one keeps spare
columns and copies only when they are used up, so a step writes one column whatever the length of the context.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

#: Spare columns: one copy in so many steps, and this much more memory per row.
_SPARE_COLUMNS: Final = 128


class KVCacheLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, columns, size). The newest column is the last.

    What is in use is a number, and no view that is kept: a compiled step could not take two tensors over one memory.

    Attributes:
        index: By what a layer of sparse attention chooses keys, as keys without values; None in other layers.
    """

    def __init__(self) -> None:
        self.index: KVCacheLayer | None = None
        self._keys: Any = None
        self._values: Any = None
        self._columns = 0
        super().__init__()

    @property
    def keys(self) -> Any:
        """Those in use; None before the first."""
        return None if self._keys is None else self._keys[:, :, : self._columns]

    @keys.setter
    def keys(self, _: Any) -> None:
        """The base class has attributes; here `update` alone writes."""

    @property
    def values(self) -> Any:
        """Those in use; None before the first."""
        return None if self._values is None else self._values[:, :, : self._columns]

    @values.setter
    def values(self, _: Any) -> None:
        """As for keys."""

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self._columns

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append columns. Returns all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        present = self._columns
        columns = present + key_states.shape[2]
        if self._keys is None:
            self._grow(key_states, value_states, columns)
        else:
            self.reserve(columns)
        self._keys[:, :, present:columns] = key_states
        self._values[:, :, present:columns] = value_states
        self._columns = columns
        return self._keys[:, :, :columns], self._values[:, :, :columns]

    def update_indexer(self, indexer_key_states: Any) -> Any:
        """Append columns, (rows, columns, size), of what keys are chosen by. Returns all."""
        if self.index is None:
            self.index = KVCacheLayer()
        added = indexer_key_states.unsqueeze(1)
        return self.index.update(added, added[..., :0])[0].squeeze(1)

    def reserve(self, columns: int) -> None:
        """Have room for so many columns."""
        if columns > self._keys.shape[2]:
            self._grow(self._keys, self._values, columns)
        if self.index is not None:
            self.index.reserve(columns)

    def _grow(self, keys: Any, values: Any, columns: int) -> None:
        """Move to a larger place, of as many rows as these have, and their type."""
        present = self._columns
        larger = (
            _store(keys, keys.shape[0], columns, self.keys if present else None),
            _store(values, values.shape[0], columns, self.values if present else None),
        )
        # Both or none: memory may suffice for one of them alone.
        self._keys, self._values = larger

    def crop_to(self, columns: int) -> None:
        """Forget what was appended after so many columns."""
        self._columns = min(self._columns, columns)
        if self.index is not None:
            self.index.crop_to(columns)

    def select(self, rows: list[int], skip: int) -> None:
        """Go on with these rows, in this order, and without the first `skip` columns. A row may come twice."""
        chosen = torch.tensor(rows, device=self.keys.device)
        columns = self.keys.shape[2] - skip
        self._replace(
            [(self.keys[:, :, skip:].index_select(0, chosen), self.values[:, :, skip:].index_select(0, chosen))],
            columns,
        )
        if self.index is not None:
            self.index.select(rows, skip)

    def merge(self, other: KVCacheLayer) -> None:
        """Add the rows of another layer below these, or nothing if the memory does not suffice. The shorter ones are padded with
        zeros on the left."""
        rows, present = self.keys.shape[0], self.get_seq_length()
        self._replace([(self.keys, self.values), (other.keys, other.values)], max(present, other.get_seq_length()))
        if self.index is None or other.index is None:
            return
        try:
            self.index.merge(other.index)
        except RuntimeError:
            index, self.index = self.index, None
            self.undo_merge(rows, present)
            self.index = index
            raise

    def undo_merge(self, rows: int, columns: int) -> None:
        """Go back to the first rows and the last columns. Allocates nothing."""
        skip = self.get_seq_length() - columns
        self._keys = self._keys[:rows, :, skip:]
        self._values = self._values[:rows, :, skip:]
        self._columns = columns
        if self.index is not None:
            self.index.undo_merge(rows, columns)

    def _replace(self, parts: list[tuple[Any, Any]], columns: int) -> None:
        rows = sum(keys.shape[0] for keys, _ in parts)
        all_keys, all_values = (_store(one, rows, columns, None) for one in parts[0])
        begin = 0
        for keys, values in parts:
            end = begin + keys.shape[0]
            all_keys[begin:end, :, columns - keys.shape[2] : columns] = keys
            all_values[begin:end, :, columns - values.shape[2] : columns] = values
            begin = end
        self._keys, self._values, self._columns = all_keys, all_values, columns


class KVCache(Cache):
    """All layers of one attention, their columns going together; layers are added as the model asks for them."""

    #: Columns that each row has beside those of its own tokens.
    source_columns = 0
    #: Whether it can forget what was appended.
    rewinds = True

    def __init__(self) -> None:
        # By its name: a model's own kind of cache may stand between.
        Cache.__init__(self, layer_class_to_replicate=KVCacheLayer)

    @property
    def rows(self) -> int:
        """How many there are."""
        return int(self.layers[0].keys.shape[0])

    def merge(self, other: KVCache) -> None:
        """Add the rows of another below these: in all layers, or in none if the memory does not suffice."""
        rows, columns = self.rows, self.get_seq_length()
        merged: list[Any] = []
        try:
            for mine, its in zip(self.layers, other.layers, strict=True):
                mine.merge(its)
                merged.append(mine)
        except RuntimeError:
            for layer in merged:
                layer.undo_merge(rows, columns)
            raise

    def undo_merge(self, rows: int, columns: int) -> None:
        """Go back to the first rows and the last columns."""
        for layer in self.layers:
            layer.undo_merge(rows, columns)

    def select(self, rows: list[int], skip: int) -> None:
        """Go on with these rows, in this order, and without the first `skip` columns."""
        for layer in self.layers:
            layer.select(rows, skip)

    def reserve(self, columns: int) -> None:
        """Have room for so many columns, so that the next passes up to there write and move nothing."""
        for layer in self.layers:
            layer.reserve(columns)

    def crop_to(self, columns: int) -> None:
        """Forget what was appended after so many columns."""
        for layer in self.layers:
            layer.crop_to(columns)


class EncoderDecoderKVCache(EncoderDecoderCache):
    """What a decoder remembers of its own tokens, and of those that the encoder read.

    Args:
        sources: How many of each row's source columns are in use; those to the left of them are padding.

    Attributes:
        encoded: What the encoder made of them, (rows, columns, size), until the decoder has taken it in.
        encoded_size: Its last dimension.
    """

    rewinds = True

    def __init__(self, sources: list[int]) -> None:
        super().__init__(KVCache(), KVCache())
        self.sources = sources
        self.encoded: Any = None
        self.encoded_size = 0

    def take_in(self, encoded: Any) -> None:
        """What the encoder made of the sources."""
        self.encoded, self.encoded_size = encoded, encoded.shape[2]

    @property
    def source_columns(self) -> int:
        """Columns that each row has beside those of its own tokens."""
        return max(self.sources)

    def merge(self, other: EncoderDecoderKVCache) -> None:
        """Add the rows of another below these, or nothing if the memory does not suffice."""
        own = self.self_attention_cache
        rows, columns = len(self.sources), own.get_seq_length()
        own.merge(other.self_attention_cache)
        try:
            self.cross_attention_cache.merge(other.cross_attention_cache)
        except RuntimeError:
            own.undo_merge(rows, columns)
            raise
        self.sources = [*self.sources, *other.sources]

    def select(self, rows: list[int], skip: int) -> None:
        """Go on with these rows, in this order, and without the first `skip` columns of their own."""
        self.self_attention_cache.select(rows, skip)
        self.sources = [self.sources[row] for row in rows]
        unused = self.cross_attention_cache.get_seq_length() - max(self.sources)
        self.cross_attention_cache.select(rows, unused)

    def crop_to(self, columns: int) -> None:
        """Forget what was appended after so many columns."""
        self.self_attention_cache.crop_to(columns)


def _store(like: Any, rows: int, columns: int, present: Any) -> Any:
    """Zeros with room to spare: what padding holds must be finite, since a masked cell is multiplied by zero."""
    made = torch.zeros(
        (rows, like.shape[1], columns + _SPARE_COLUMNS, like.shape[3]), dtype=like.dtype, device=like.device
    )
    if present is not None:
        made[:, :, : present.shape[2]] = present
    return made
