"""A decoder layer of the most usual form in few calls, for passes over pages on a CPU.

A step of a few rows is some thousand small operations, and what torch and Python do around them takes a good part of its time.
So products of one input are one, queries and keys are turned together, and what nobody else holds is changed in place. Each
value is rounded as the layer's own code rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from transformers.activations import SiLUActivation

from zfabric.backends.hf_transformers.cache.paged_cache import current
from zfabric.backends.hf_transformers.parameters.merged_linear import is_plain, merge
from zfabric.backends.hf_transformers.parameters.packing import product
from zfabric.backends.hf_transformers.runner.kernel_layer import KernelLayer, Products

_SILU: Final = (torch.nn.SiLU, SiLUActivation)

Norm = Callable[[torch.Tensor], torch.Tensor]


class Form(NamedTuple):
    """What differs between layers.

    Attributes:
        normed: Whether queries and keys are normed, head by head.
        window: Tokens that each sees, itself included; None for all before it.
        rms: Whether its norms are root mean squares with a weight.
        gated: Whether its feed-forward part is a gated one.
    """

    normed: bool
    window: int | None
    rms: bool
    gated: bool


class Turns:
    """Cosines and sines by which a pass turns queries and keys, in the form in which they are used: once for all layers."""

    def __init__(self) -> None:
        self._given: Any = None
        self._made: Any = None
        self._lined: Any = None
        self._lines: Any = None

    def of(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines of which the first half is negative: (1, tokens, 1, size)."""
        if given is not self._given:
            cosines, sines = given
            first, second = sines.chunk(2, dim=-1)
            self._made = cosines.unsqueeze(2), torch.cat((-first, second), dim=-1).unsqueeze(2)
            self._given = given
        made: tuple[torch.Tensor, torch.Tensor] = self._made
        return made

    def lines(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, (1, tokens, size), contiguous."""
        if given is not self._lined:
            self._lines = given[0].contiguous(), given[1].contiguous()
            self._lined = given
        made: tuple[torch.Tensor, torch.Tensor] = self._lines
        return made


class ShortLayer:
    """A decoder layer.

    Args:
        layer: Of transformers, whose own code goes on doing all other passes. Its products of one input are merged.
        turns: Of its model.
    """

    def __init__(self, layer: Any, form: Form, turns: Turns) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._plain: Final = layer.forward
        self._attention, self._mlp, self._turns, self._form = attention, mlp, turns, form
        self._projected: Final = Product(attention, ("q_proj", "k_proj", "v_proj"))
        #: Heads of queries, keys and values.
        self._counts: Final = [size // attention.head_dim for size in self._projected.sizes]
        self._out: Final = Product(attention, ("o_proj",))
        self._first_norm = quick_norm(layer.input_layernorm, form.rms)
        self._second_norm = quick_norm(layer.post_attention_layernorm, form.rms)
        if form.normed:
            self._query_norm, self._key_norm = (
                quick_norm(attention.q_norm, form.rms),
                quick_norm(attention.k_norm, form.rms),
            )
        self._watchers = hooks(attention)
        self._by_kernels: KernelLayer | None = None
        if form.gated:
            self._watchers += [*hooks(mlp), *hooks(mlp.act_fn)]
            self._widened: Final = Product(mlp, ("gate_proj", "up_proj"))
            self._narrowed: Final = Product(mlp, ("down_proj",))
            if form.rms and isinstance(mlp.act_fn, _SILU):
                products = Products(self._projected, self._out, self._widened, self._narrowed)
                self._by_kernels = KernelLayer(layer, products, self._counts, normed=form.normed, window=form.window)

    @property
    def by_kernels(self) -> bool:
        """Whether kernels take its states."""
        return self._by_kernels is not None and self._by_kernels.takes_states

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        """As the layer's own, (1, tokens, size)."""
        pages = current()
        # Somebody may want to see a part called.
        if pages is None or pages is not past_key_values or others or any(self._watchers):
            plain: torch.Tensor = self._plain(
                hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **others
            )
            return plain
        if self._by_kernels is not None:
            made = self._by_kernels.forward(hidden_states, pages, self._turns.lines(position_embeddings))
            if made is not None:
                return made
        attention, form = self._attention, self._form
        queries, keys, values = self._heads(self._first_norm(hidden_states), position_embeddings)
        pages.write(keys.transpose(1, 2), values.transpose(1, 2), attention.layer_idx)
        seen = pages.attend(queries.transpose(1, 2), attention.layer_idx, attention.scaling, form.window)
        states = self._out(seen.flatten(2)).add_(hidden_states)
        given = self._second_norm(states)
        if not form.gated:
            return states + self._mlp(given)
        gate, up = self._widened(given).chunk(2, dim=-1)
        return self._narrowed(self._mlp.act_fn(gate).mul_(up)).add_(states)

    def _heads(self, given: torch.Tensor, turns: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, (1, tokens, heads, size)."""
        counts = self._counts
        heads = self._projected(given).unflatten(-1, (-1, self._attention.head_dim))
        cosines, sines = self._turns.of(turns)
        if self._form.normed:
            queries, keys, values = heads.split(counts, dim=2)
            queries, keys = self._query_norm(queries), self._key_norm(keys)
            return _turned(queries, cosines, sines), _turned(keys, cosines, sines), values
        both, values = heads.split((counts[0] + counts[1], counts[2]), dim=2)
        queries, keys = _turned(both, cosines, sines).split(counts[:2], dim=2)
        return queries, keys, values


class Product:
    """What linear layers of one input make, one behind the other.

    Args:
        parent: Has them.
        names: Of these. They are merged, if they can be.
    """

    def __init__(self, parent: Any, names: Sequence[str]) -> None:
        only = getattr(parent, names[0])
        whole = merge(parent, names) if len(names) > 1 else only if is_plain(only) else None
        self._layers = [getattr(parent, name) for name in names]
        self.sizes = [int(layer.out_features) for layer in self._layers]
        #: Weight and bias; None for layers of other kinds, which are called.
        self._tensors = None if whole is None else (whole.weight, whole.bias)
        self._watchers = [one for layer in self._layers for one in hooks(layer)]

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """(1, tokens, all their values), contiguous, which nobody else holds."""
        if self._tensors is not None and not any(self._watchers):
            return product(given, *self._tensors)
        made = [layer(given) for layer in self._layers]
        return torch.cat(made, dim=-1)


def quick_norm(module: Any, rms: bool) -> Norm:
    """What it does; its own call, if its code is another."""
    if not rms or module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return module.__call__
    watchers = hooks(module)
    weight, epsilon = module.weight, module.variance_epsilon

    def normed(states: torch.Tensor) -> torch.Tensor:
        if any(watchers) or states.dtype is not weight.dtype:
            called: torch.Tensor = module(states)
            return called
        if states.dtype is torch.float32:
            return torch.nn.functional.rms_norm(states, weight.shape, weight, epsilon)
        wide = states.float()
        wide.mul_(wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_())
        return wide.to(states.dtype).mul_(weight)

    return normed


def hooks(module: Any) -> list[Any]:
    """What is called when it is, now and later: these tables stay."""
    return [module._forward_hooks, module._forward_pre_hooks]


def _turned(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Each operation rounds as that of transformers does: what is summed is the same, bit for bit."""
    return (heads * cosines).add_(heads.roll(heads.shape[-1] // 2, -1) * sines)
