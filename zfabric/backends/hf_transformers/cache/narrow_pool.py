"""Keys and values in 8 bits: rounded as they are written, and made numbers of the model's type again as they are read.

"int8" has a scale for each token and head, in bfloat16: the greatest number of the token's vector is 127 of it. "fp8" is
float8_e4m3fn without a scale, as vLLM's is by default: three bits of mantissa, and what is greater than 448 becomes 448. What a
token leaves depends on the token's own vectors alone, so that sharing, pauses and parts of prompts change no text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.cache.paged_attention import Pool
from zfabric.backends.hf_transformers.cache.paged_pass import Stretches
from zfabric.backends.hf_transformers.options import Narrow

_FP8: Final = torch.float8_e4m3fn
_FP8_MAX: Final = 448.0
_INT8_MAX: Final = 127
#: Of all numbers' size, and never zero: what is divided by it stays finite.
_SCALE: Final = torch.bfloat16
_SCALE_MIN: Final = 1e-30

#: Makes memory for a shape and type, on the device that this is for.
Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def token_bytes(cache: Any, kind: Narrow) -> int:
    """Bytes that one token takes in such pools, of all layers.

    Args:
        cache: One that holds some tokens, as the model itself wrote them.
    """
    beside = _SCALE.itemsize if kind == "int8" else 0
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.shape[0] * tensor.shape[1] * (tensor.shape[3] + beside) for tensor in tensors)


class NarrowPool(Pool):
    """Keys and values of one layer in 8 bits.

    Args:
        kind: Which.
        places: Of the pool.
        like_keys, like_values: Of some tokens, (1, heads, tokens, size), in the type that they are read in.
        block_tokens: Places of a block.
        allocate: Makes their memory.
    """

    def __init__(
        self,
        kind: Narrow,
        places: int,
        like_keys: torch.Tensor,
        like_values: torch.Tensor,
        block_tokens: int,
        allocate: Allocate,
    ) -> None:
        keys, values = (allocate((places, one.shape[1], one.shape[3]), torch.int8) for one in (like_keys, like_values))
        super().__init__(keys, values, block_tokens)
        self._dtype = like_keys.dtype
        # A row is copied when it is read, so this is what decides whether it is by itself or beside others.
        self.token_bytes *= self._dtype.itemsize
        self._scales: tuple[torch.Tensor, ...] = ()
        if kind == "int8":
            self._scales = tuple(allocate((places, self.heads), _SCALE) for _ in range(2))
        self._pair = self.blocks
        self._block_scales = tuple(one.unflatten(0, (-1, block_tokens)) for one in self._scales)
        self.blocks = (*self._pair, *self._block_scales)

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens, (1, heads, tokens, size)."""
        for number, (stored, given) in enumerate(((self.keys, keys), (self.values, values))):
            vectors = given[0].transpose(0, 1)
            if not self._scales:
                stored.index_copy_(0, slots, vectors.clamp(-_FP8_MAX, _FP8_MAX).to(_FP8).view(torch.int8))
                continue
            scales = (vectors.abs().amax(-1) / _INT8_MAX).clamp(min=_SCALE_MIN).to(_SCALE)
            numbers = vectors.float() / scales.float().unsqueeze(-1)
            stored.index_copy_(0, slots, numbers.round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8))
            self._scales[number].index_copy_(0, slots, scales)

    def view(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A stretch, copied: keys and values, (1, heads, tokens, size)."""
        keys, values = (
            self._read(number, stored[begin:end], [one[begin:end] for one in self._scales])
            for number, stored in enumerate((self.keys, self.values))
        )
        return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)

    def gather(self, its: Stretches) -> tuple[torch.Tensor, torch.Tensor]:
        """All of a row, copied: (1, heads, tokens, size)."""
        if its.blocks is None:
            return self.view(*its.runs[0])
        index, span = its.blocks, slice(its.first, its.first + its.tokens)
        parts = [one.index_select(0, index).flatten(0, 1)[span] for one in self.blocks]
        keys, values = (self._read(number, parts[number], parts[2:]).transpose(0, 1) for number in range(2))
        return keys.unsqueeze(0), values.unsqueeze(0)

    def side_by_side(self, index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of several rows, copied: (rows, heads, places, size)."""
        parts = [one.index_select(0, index) for one in self.blocks]
        keys, values = (
            self._read(number, parts[number], parts[2:])
            .view(rows, -1, self.heads, parts[number].shape[3])
            .transpose(1, 2)
            for number in range(2)
        )
        return keys, values

    def _read(self, number: int, stored: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor:
        """What bytes stand for.

        Args:
            number: 0 for keys, 1 for values.
            scales: Of both, where there are any, without the last dimension.
        """
        if scales:
            # In float32: a product of two rounded numbers is rounded once.
            wide = torch.float32 if self._dtype == torch.float16 else self._dtype
            return stored.to(wide).mul_(scales[number].to(wide).unsqueeze(-1)).to(self._dtype)
        if stored.device.type != "cpu":
            return stored.view(_FP8).to(self._dtype)
        # A CPU converts these one by one, in five times the time.
        places = stored.contiguous().view(torch.uint8).flatten().int()
        return _numbers(self._dtype).index_select(0, places).view(stored.shape)


@cache
def _numbers(dtype: torch.dtype) -> torch.Tensor:
    """What each byte stands for."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(_FP8).to(dtype)
