"""Decoder layers in fewer calls say what their own code says, bit for bit, and layers of other code are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from zfabric.backends.hf_transformers.cache import attention
from zfabric.backends.hf_transformers.cache.block_table import table_of
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.decoder_layers import short_decoder, shorten
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner, Part
from zfabric.backends.hf_transformers.runner.rope import Ropes
from zfabric.backends.hf_transformers.runner.short_layer import ShortLayer
from zfabric.wire.payloads import GenerateRequest

LAYERS = 2
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
#: Kinds whose code is known, each kind of attention at least once.
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
}
ROWS = ([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22])


def made(kind: str, dtype: torch.dtype = torch.float32, sizes: dict[str, Any] = SIZES) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**sizes, **KNOWN.get(kind, {})})
    attention.install()
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def said(model: Any, its: ModelRunner | None = None) -> list[torch.Tensor]:
    """Logits of two prompts in a pass, of a prompt's second part beside a step, and of steps."""
    runner, answer = PagedRunner(its or ModelRunner(model), 8, 16), Answer(GenerateRequest())
    first, second = table_of([0, 2]), table_of([1])

    def part(tokens: list[int], length: int, table: Any) -> Part:
        return Part(answer, tokens, length, table, "last")

    with torch.inference_mode():
        return [
            runner.forward([part(ROWS[0], 12, first), part(ROWS[1], 3, second)]),
            runner.forward([part([30], 4, second), part([31, 32, 33], 15, first)]),
            runner.forward([part([34], 16, first), part([35], 5, second)]),
            runner.forward([part([36], 17, first)]),
        ]


def test_short_layers_say_the_same_bit_for_bit(subtests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade of transformers that changes their code shows here: what is done has to be done anew."""
    calls: list[Any] = []

    def count(self: Any, *given: Any, **named: Any) -> Any:
        calls.append(self)
        return plain(self, *given, **named)

    for kind in KNOWN:
        for dtype in (torch.float32, torch.bfloat16):
            with subtests.test(kind=kind, dtype=dtype):
                model = made(kind, dtype)
                # Cannot be wrapped before it is recognized.
                expected = said(model)
                assert shorten(model) == LAYERS
                its = type(model.model.layers[0].self_attn)
                plain = its.forward
                calls.clear()
                with monkeypatch.context() as patch:
                    patch.setattr(its, "forward", count)
                    found = said(model)
                assert not calls
                assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_around_short_layers_takes_few_calls_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(kind)
    assert short_decoder(model) is None
    expected = said(model)
    shorten(model)
    runner = ModelRunner(model)
    # Recognized before: nobody calls its own from now on.
    monkeypatch.setattr(type(model), "forward", None)
    monkeypatch.setattr(type(model.model), "forward", None)
    assert all(map(torch.equal, said(model, runner), expected))


@pytest.mark.parametrize(
    "part", ["", "model", "model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.1", "lm_head"]
)
def test_who_watches_a_part_sees_it_called(part: str) -> None:
    model = made("llama")
    expected = said(model)
    shorten(model)
    runner, seen = ModelRunner(model), list[Any]()
    handle = model.get_submodule(part).register_forward_hook(lambda *call: seen.append(call))
    assert all(map(torch.equal, said(model, runner), expected))
    assert len(seen) == len(expected)
    handle.remove()
    assert all(map(torch.equal, said(model, runner), expected))
    # Cosines and sines of places are there, or are made once.
    assert len(seen) == len(expected)


def test_places_behind_those_that_were_seen_turn_as_the_model_turns_them() -> None:
    ropes = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
    for more in ({}, {"rope_parameters": ropes}):
        model = made("llama", sizes={**SIZES, "max_position_embeddings": 8_192, **more})

        def steps(its: ModelRunner) -> list[torch.Tensor]:
            return [alone(its, length) for length in (1, 2_048, 2_049, 6_000)]

        expected = steps(ModelRunner(model))
        shorten(model)
        assert short_decoder(model) is not None
        assert all(map(torch.equal, steps(ModelRunner(model)), expected))


def alone(its: ModelRunner, length: int) -> torch.Tensor:
    """Logits of a token at such a place, behind none but zeros."""
    with torch.inference_mode():
        part = Part(Answer(GenerateRequest()), [9], length, table_of(range(8)), "last")
        return PagedRunner(its, 8, 1_024).forward([part])


def test_a_decoder_of_other_code_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    changed = [made("llama") for _ in range(4)] + [made("llama", sizes={**SIZES, "rope_parameters": dynamic})]
    for model in changed:
        shorten(model)
        assert short_decoder(model) is not None
    changed[0].model.forward = changed[0].model.forward
    changed[1].model.embed_tokens = torch.nn.Embedding(64, 64, max_norm=1.0)
    changed[2].model.layers[1].forward = changed[2].model.layers[0].input_layernorm.forward
    changed[3].model.norm = torch.nn.LayerNorm(64)
    # Whose frequencies go by a text's length has another rotary module.
    assert Ropes(changed[4])
    assert [short_decoder(model) for model in changed] == [None] * 5


def test_a_pass_that_is_not_over_pages_is_the_layers_own() -> None:
    model = made("llama")
    given = torch.tensor([ROWS[0]])
    with torch.inference_mode():
        expected = model(given).logits
        assert shorten(model) == LAYERS
        assert torch.equal(model(given).logits, expected)


def test_who_watches_attention_sees_it_called() -> None:
    model = made("llama")
    expected = said(model)
    shorten(model)
    seen: list[Any] = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *given: seen.append(given[0]))
    assert all(map(torch.equal, said(model), expected))
    assert len(seen) == len(expected)


def test_what_is_hooked_to_products_has_its_say() -> None:
    """As adapters are."""
    model = made("llama")
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda _, __, output: output * 2)
    expected = said(model)
    assert shorten(model) == LAYERS
    assert all(map(torch.equal, said(model), expected))


def test_layers_of_other_code_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def clamped(self: Any, hidden_states: torch.Tensor, **others: Any) -> Any:
        return plain(self, hidden_states.clamp(-1, 1), **others)

    assert shorten(made("olmo2")) == shorten(made("gpt_neox")) == 0
    plain = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", clamped)
    assert shorten(made("llama")) == 0


def test_another_attention_stays() -> None:
    model = made("llama")
    model.set_attn_implementation("eager")
    assert shorten(model) == 0
    assert not any(isinstance(getattr(layer.forward, "__self__", None), ShortLayer) for layer in model.model.layers)
