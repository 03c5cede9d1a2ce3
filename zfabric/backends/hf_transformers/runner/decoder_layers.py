"""Which decoder layers are of the form that `short_layer` computes, and which decoders of that of `short_decoder`: those whose
code is, word for word, that of Llama, Mistral or Qwen, whatever its name."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import torch

from zfabric.backends.hf_transformers.runner.short_decoder import ShortDecoder
from zfabric.backends.hf_transformers.runner.short_layer import Form, ShortLayer, Turns


class Attention(NamedTuple):
    """What differs between kinds of attention: see `Form`, whose window an attention tells."""

    normed: bool
    window: Callable[[Any], int | None]


#: Of code as `_digest` has it: what is not known to be the same is left alone.
_LAYER: Final = "1a8125909341e389"
_ATTENTION: Final = {
    # Llama, Mistral, Qwen2, Qwen3.
    "865d17a1b6edd273": Attention(normed=False, window=lambda attention: None),
    "38eb7a675fc00c3f": Attention(normed=False, window=lambda its: getattr(its.config, "sliding_window", None)),
    "467d2e0bba2fd378": Attention(normed=False, window=lambda attention: attention.sliding_window),
    "e0b15d778eecc3a8": Attention(normed=True, window=lambda attention: attention.sliding_window),
}
_ROTATION: Final = {"apply_rotary_pos_emb": "f0e978aab1df6bb0", "rotate_half": "7b6c9b425ca04287"}
_RMS_NORM: Final = "9635bcd843f309a0"
_GATED: Final = "7d2027d4464e3e71"
_WITH_HEAD: Final = "f14e2be13ced0d90"
#: Llama; Mistral; Qwen2 and Qwen3. They differ in their masks, of which pages need none.
_DECODERS: Final = ("3ee4b3154dd99641", "3e106c8cfc95b78a", "7082cc645fa7709b")
_ROTARY: Final = "251534c899dd9e9f"


def shorten(model: Any) -> int:
    """Have layers of a known form computed here in passes over pages. Returns how many there are."""
    found, turns = 0, Turns()
    for layer in model.modules():
        form = _form(layer)
        if form is not None:
            layer.forward = ShortLayer(layer, form, turns).forward
            found += 1
    return found


def short_decoder(model: Any) -> ShortDecoder | None:
    """What a model does around its layers; None if that, or one of them, is of another form."""
    decoder = getattr(model, "model", None)
    if decoder is None or not _runs(model, _WITH_HEAD):
        return None
    if "forward" in vars(decoder) or _digest(type(decoder).forward) not in _DECODERS:
        return None
    embedding = decoder.embed_tokens
    plain = type(embedding) is torch.nn.Embedding and embedding.max_norm is None and "forward" not in vars(embedding)
    short = all(isinstance(getattr(layer.forward, "__self__", None), ShortLayer) for layer in decoder.layers)
    # Where frequencies go by a text's length, the rotary module has another forward.
    known = _runs(decoder.rotary_emb, _ROTARY) and _runs(decoder.norm, _RMS_NORM)
    return ShortDecoder(model) if plain and short and known else None


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
    its = _ATTENTION.get(_digest(forward)) if rotation == _ROTATION else None
    if its is None:
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if its.normed else []
    rms = all(_runs(norm, _RMS_NORM) for norm in norms)
    return Form(its.normed, its.window(attention), rms, _runs(layer.mlp, _GATED))


def _runs(module: Any, digest: str) -> bool:
    """Whether it computes what this code says."""
    return "forward" not in vars(module) and _digest(type(module).forward) == digest


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
