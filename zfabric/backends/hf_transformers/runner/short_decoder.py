"""What a decoder of short layers does around them, for passes over pages: its embedding, turns, last norm and head.

A model's own forward goes through several wrappers, makes masks that pages do not need and objects that nobody asks for, and
computes cosines and sines that are the same in every step. On a CPU that is 0.2 ms of a step, a third of one of a tiny model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.cpu_kernels.available import kernels, takes
from zfabric.backends.hf_transformers.runner.short_layer import hooks, quick_norm

#: Places whose cosines and sines are computed at first; as many again whenever a text is longer.
_PLACES_FIRST: Final = 2_048


class ShortDecoder:
    """A decoder of the form that `decoder_layers.short_decoder` looks for.

    Args:
        model: Of transformers; the layers of its decoder are `ShortLayer`.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.model
        layers = decoder.layers[: decoder.config.num_hidden_layers]
        self._embedding, self._rotary, self._head = decoder.embed_tokens, decoder.rotary_emb, model.lm_head
        self._layers: Final[list[Callable[..., torch.Tensor]]] = [layer.forward for layer in layers]
        # Without kernels all that is said is what the model's own code says, bit for bit.
        self._norm = _LastNorm(decoder.norm, by_kernel=all(layer.forward.__self__.by_kernels for layer in layers))
        #: Cosines and sines of each place, (places, size); none yet.
        self._turns: tuple[torch.Tensor, torch.Tensor] | None = None
        # Somebody may want to see one called.
        seen = [model, decoder, self._embedding, self._rotary, *layers]
        self._watchers: Final = [one for module in seen for one in hooks(module)]

    def __call__(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        farthest: int,
        cache: PagedCache,
        mask: torch.Tensor,
        kept: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Logits as of `ModelRunner.line`, (wanted, vocabulary); None, and nothing is done, if the model's own forward is to.

        Args:
            mask: What layers get that have to be computed by their own code.
        """
        if any(self._watchers):
            return None
        states = torch.nn.functional.embedding(ids.unsqueeze(0), self._embedding.weight)
        turns, positions = self._turning(places, farthest, states), places.unsqueeze(0)
        for forward in self._layers:
            states = forward(states, mask, positions, cache, True, turns)
        states = states if kept is None else states[:, kept]
        logits: torch.Tensor = self._head(self._norm(states))[0]
        return logits

    def _turning(self, places: torch.Tensor, farthest: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of these places, (1, tokens, size)."""
        turns = self._turns
        if turns is None or turns[0].dtype is not states.dtype or turns[0].shape[0] <= farthest:
            count = _PLACES_FIRST
            while count <= farthest:
                count *= 2
            every = torch.arange(count, device=places.device).unsqueeze(0)
            cosines, sines = self._rotary(states, position_ids=every)
            self._turns = turns = cosines[0], sines[0]
        return turns[0].index_select(0, places).unsqueeze(0), turns[1].index_select(0, places).unsqueeze(0)


class _LastNorm:
    """A root mean square with a weight, by a kernel where it can be."""

    def __init__(self, norm: Any, *, by_kernel: bool) -> None:
        weight = norm.weight
        self._weight, self._epsilon = weight, float(norm.variance_epsilon)
        taken = by_kernel and takes(weight.device, weight.dtype, weight.shape[0])
        self._dtype: Final = weight.dtype if taken else None
        self._otherwise = quick_norm(norm, True)
        self._watchers: Final = hooks(norm)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        fast = kernels()
        if fast is None or states.dtype is not self._dtype or any(self._watchers):
            return self._otherwise(states)
        return fast.add_and_norm(states.contiguous(), None, self._weight, self._epsilon)
