"""Decoder layers of the most usual form in fewer calls, for passes over pages on a CPU.

A step of a few rows is some thousand small operations, and what torch and Python do around them takes a good part of its time.
Layers whose code is, word for word, that of Llama, Mistral or Qwen are computed here with half as many around their products,
bit for bit as their own code does it. Their products, norms and feed-forward parts are called as ever: whatever is hooked to
these, or takes their place, has its say.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import torch

from zfabric.backends.hf_transformers.cache.paged_cache import current


class Form(NamedTuple):
    """What differs between kinds of attention.

    Attributes:
        normed: Whether queries and keys are normed, head by head.
        window: Tokens that each sees, itself included, given the attention; None for all before it.
    """

    normed: bool
    window: Callable[[Any], int | None]


#: Of code as `_digest` has it: what is not known to be the same is left alone.
_LAYER: Final = "1a8125909341e389"
_ATTENTION: Final = {
    # Llama, Mistral, Qwen2, Qwen3.
    "865d17a1b6edd273": Form(normed=False, window=lambda attention: None),
    "38eb7a675fc00c3f": Form(normed=False, window=lambda attention: getattr(attention.config, "sliding_window", None)),
    "467d2e0bba2fd378": Form(normed=False, window=lambda attention: attention.sliding_window),
    "e0b15d778eecc3a8": Form(normed=True, window=lambda attention: attention.sliding_window),
}
_ROTATION: Final = {"apply_rotary_pos_emb": "f0e978aab1df6bb0", "rotate_half": "7b6c9b425ca04287"}


def shorten(model: Any) -> int:
    """Have layers of a known form computed here in passes over pages. Returns how many there are."""
    found, turns = 0, Turns()
    for layer in model.modules():
        form = _form(layer)
        if form is not None:
            layer.forward = ShortLayer(layer, form, turns).forward
            found += 1
    return found


class Turns:
    """Cosines and sines by which a pass turns queries and keys, in the form in which they are used: once for all layers."""

    def __init__(self) -> None:
        self._given: Any = None
        self._made: Any = None

    def of(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines of which the first half is negative: (1, tokens, 1, size)."""
        if given is not self._given:
            cosines, sines = given
            first, second = sines.chunk(2, dim=-1)
            self._made = cosines.unsqueeze(2), torch.cat((-first, second), dim=-1).unsqueeze(2)
            self._given = given
        made: tuple[torch.Tensor, torch.Tensor] = self._made
        return made


class ShortLayer:
    """A decoder layer.

    Args:
        layer: Of transformers, whose own code goes on doing all other passes.
        turns: Of its model.
    """

    def __init__(self, layer: Any, form: Form, turns: Turns) -> None:
        attention = layer.self_attn
        self._plain: Final = layer.forward
        self._layer, self._attention, self._turns = layer, attention, turns
        self._normed, self._window = form.normed, form.window(attention)

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
        if pages is None or pages is not past_key_values or others or self._watched():
            plain: torch.Tensor = self._plain(
                hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **others
            )
            return plain
        layer, attention = self._layer, self._attention
        given = layer.input_layernorm(hidden_states)
        shape = (*given.shape[:-1], -1, attention.head_dim)
        queries = attention.q_proj(given).view(shape)
        keys = attention.k_proj(given).view(shape)
        values = attention.v_proj(given).view(shape)
        if self._normed:
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        cosines, sines = self._turns.of(position_embeddings)
        queries, keys = _turned(queries, cosines, sines), _turned(keys, cosines, sines)
        pages.write(keys.transpose(1, 2), values.transpose(1, 2), attention.layer_idx)
        seen = pages.attend(queries.transpose(1, 2), attention.layer_idx, attention.scaling, self._window)
        states = hidden_states + attention.o_proj(seen.flatten(2))
        made: torch.Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
        return made

    def _watched(self) -> bool:
        """Whether somebody wants to see the attention called."""
        its = self._attention
        return bool(its._forward_hooks or its._forward_pre_hooks)


def _turned(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Each operation rounds as that of transformers does: what is summed is the same, bit for bit."""
    return (heads * cosines).add_(heads.roll(heads.shape[-1] // 2, -1) * sines)


def _form(layer: Any) -> Form | None:
    """Of a decoder layer; None if it is none, or of no form that is known."""
    attention = getattr(layer, "self_attn", None)
    if attention is None or "forward" in vars(layer) or "forward" in vars(attention):
        return None
    if _digest(type(layer).forward) != _LAYER or not getattr(attention, "is_causal", False):
        return None
    if getattr(getattr(attention, "config", None), "_attn_implementation", None) != "sdpa":
        return None
    forward = inspect.unwrap(type(attention).forward)
    rotation = {name: _digest(forward.__globals__.get(name)) for name in _ROTATION}
    return _ATTENTION.get(_digest(forward)) if rotation == _ROTATION else None


@cache
def _digest(function: Any) -> str:
    """Of a function's code, its types and documentation aside."""
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    tree.returns = None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
