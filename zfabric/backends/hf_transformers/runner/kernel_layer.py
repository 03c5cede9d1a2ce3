"""A decoder layer by kernels for a CPU: four products, and a few passes over memory between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.cpu_kernels.available import kernels, takes

Product = Callable[[torch.Tensor], torch.Tensor]
Turns = tuple[torch.Tensor, torch.Tensor]


class Products(NamedTuple):
    """Of a layer.

    Attributes:
        projected: Queries, keys and values of what is normed.
        out: What attention adds.
        widened: Both sides of the gated part.
        narrowed: What that adds.
    """

    projected: Product
    out: Product
    widened: Product
    narrowed: Product


class KernelLayer:
    """A decoder layer whose norms are root mean squares with a weight, and whose gate is SiLU.

    Args:
        layer: Of transformers.
        products: Its own, merged.
        counts: Heads of queries, keys and values.
        window: Tokens that each sees, itself included; None for all before it.
    """

    def __init__(self, layer: Any, products: Products, counts: list[int], *, normed: bool, window: int | None) -> None:
        attention = layer.self_attn
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [attention.q_norm, attention.k_norm] if normed else []
        self._attention, self._products, self._counts, self._window = attention, products, counts, window
        self._first, self._second, *its = [norm.weight for norm in norms]
        self._head_norms: Final = (its[0], its[1]) if normed else None
        self._epsilon: Final = float(norms[0].variance_epsilon)
        self._size: Final = int(attention.head_dim)
        #: Of states that the kernels take; None if they take none.
        self._dtype: Final = self._taken(norms, self._size // 2, int(layer.mlp.down_proj.in_features))
        # These tables stay.
        self._watchers: Final = [one for norm in norms for one in (norm._forward_hooks, norm._forward_pre_hooks)]

    def _taken(self, norms: list[Any], *sizes: int) -> torch.dtype | None:
        if len({(norm.weight.dtype, float(norm.variance_epsilon)) for norm in norms}) > 1:
            return None
        dtype = self._first.dtype
        return dtype if takes(self._first.device, dtype, self._first.shape[0], *sizes) else None

    @property
    def takes_states(self) -> bool:
        """Whether its states are such as kernels take."""
        return self._dtype is not None

    def forward(self, states: torch.Tensor, pages: PagedCache, turns: Turns) -> torch.Tensor | None:
        """The layer, (1, tokens, size); None, and nothing is done, if the kernels do not take this pass.

        Args:
            turns: Cosines and sines, (1, tokens, size of a head), contiguous.
        """
        fast, layer = kernels(), self._attention.layer_idx
        if fast is None or states.dtype is not self._dtype or pages.passed is None or any(self._watchers):
            return None
        slots, pool = pages.places(layer)
        if pool is None or pool.dense is not states.dtype or not all(map(self._turning, turns)):
            return None
        # A kernel reads what lies at an address for what it is told that it is: adapters may make numbers of another type.
        products, counts, states, dtype = self._products, self._counts, states.contiguous(), states.dtype
        made = products.projected(fast.add_and_norm(states, None, self._first, self._epsilon)).to(dtype)
        heads = made.view(-1, sum(counts), self._size)
        fast.turn_and_write(heads, turns, slots, pool.keys, pool.values, self._head_norms, self._epsilon)
        queries = heads[:, : counts[0]].transpose(0, 1).unsqueeze(0)
        seen = pages.attend(queries, layer, self._attention.scaling, self._window)
        after = products.out(seen.flatten(2)).to(dtype)
        given = fast.add_and_norm(after, states, self._second, self._epsilon)
        return products.narrowed(fast.gate(products.widened(given).to(dtype))).add_(after)

    def _turning(self, turns: torch.Tensor) -> bool:
        """Whether these are cosines or sines as the kernels take them."""
        return turns.dtype is self._dtype and turns.shape[-1] == self._size
