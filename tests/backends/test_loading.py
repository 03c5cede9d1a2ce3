"""What can be loaded, and in what form: GGUF, types, templates, lengths, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.backends.test_architectures import save
from tests.backends.tiny import Answers, ask, byte_tokenizer, reference
from zfabric.backends.hf_transformers.loading import cache_room, model_loader
from zfabric.backends.hf_transformers.loading.context_length import context_length
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError
from zfabric.wire.payloads import CountRequest, GenerateRequest
from zfabric.wire.sampling import SamplingParams

PROMPT = "Once upon a time"


def save_gguf(path: Path, source: Path) -> None:
    """The tiny Llama in GGUF's names and order: its query and key rows are interleaved."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    # A byte that no prompt here has makes way for a merge, which the format cannot do without.
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(list(range(config.vocab_size - 1))), "ab"])
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((number for part, number in heads.items() if part in name), None)
        rows = tensor
        if count is not None:
            rows = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        for old, new in sorted(names.items(), key=lambda pair: -len(pair[0])):
            name = name.replace(old, new)
        writer.add_tensor(name, rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


async def say(*, count: int = 12, **options: Any) -> tuple[list[int], dict[str, Any]]:
    """Greedy tokens, and what the model says of itself."""
    worker = ModelWorker(TransformersOptions(device="cpu", **options))
    worker.steps = answers = Answers()
    (info,) = await worker.load()
    sampling = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True)
    ids = byte_tokenizer()(PROMPT)["input_ids"]
    worker.begin(GenerateRequest(prompt_token_ids=ids, request_id="a", sampling=sampling))
    await answers.until("a")
    await worker.close()
    assert not answers.errors
    return answers.tokens("a"), dict(info.details)


@pytest.mark.parametrize("directly", [True, False])
async def test_gguf_says_what_the_model_says_that_it_was_made_of(
    tiny_llama: Path, tmp_path: Path, directly: bool
) -> None:
    save_gguf(tmp_path / "tiny.gguf", tiny_llama)
    given: dict[str, Any] = {"model": str(tmp_path / "tiny.gguf")}
    if not directly:
        given = {"model": str(tmp_path), "gguf_file": "tiny.gguf"}
    tokens, _ = await say(dtype="float32", **given)
    assert tokens == reference(tiny_llama, PROMPT, 12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
async def test_weights_have_the_type_that_was_asked_for(tiny_llama: Path, dtype: Any) -> None:
    tokens, details = await say(model=str(tiny_llama), dtype=dtype)
    assert details["dtype"] == {"auto": "float32"}.get(dtype, dtype)
    assert len(tokens) == 12


async def test_weights_are_spread_by_a_device_map(tiny_llama: Path) -> None:
    tokens, _ = await say(model=str(tiny_llama), dtype="float32", device_map="cpu")
    assert tokens == reference(tiny_llama, PROMPT, 12)


def test_a_revision_is_passed_on(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for name in ("AutoConfig", "AutoTokenizer"):
        real = getattr(model_loader, name).from_pretrained

        def note(*given: Any, real: Any = real, **more: Any) -> Any:
            asked.append(more.get("revision"))
            return real(*given, **more)

        monkeypatch.setattr(model_loader, name, SimpleNamespace(from_pretrained=note))
    model_loader.load(TransformersOptions(model=str(tiny_llama), device="cpu", revision="v2"))
    assert asked == ["v2", "v2"]


def test_code_of_a_model_is_not_run_unless_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('this was run')")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="trust_remote_code"):
        model_loader.load(TransformersOptions(model=str(tmp_path), device="cpu"))


async def test_a_template_of_a_file_is_used(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    worker = ModelWorker(TransformersOptions(model=str(tiny_llama), device="cpu", chat_template=file))
    worker.steps = Answers()
    await worker.load()
    count = await worker.count_tokens(CountRequest(messages=[{"role": "user", "content": "abc"}]))
    await worker.close()
    assert count == len("[abc]")
    missing = TransformersOptions(model=str(tiny_llama), device="cpu", chat_template=tmp_path / "none")
    with pytest.raises(ConfigurationError, match="chat template"):
        await ModelWorker(missing).load()


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4_096}, 4_096),
        ({"max_position_embeddings": 4_096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8_192),
        ({"max_position_embeddings": 8_192, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 8_192),
        ({"max_position_embeddings": 4_096, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}, 12_288),
        # DeepSeek-V3 tells the stretched length, Qwen2.5 the one that is stretched; either factor counts once.
        (
            {
                "max_position_embeddings": 163_840,
                "rope_parameters": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4_096},
            },
            163_840,
        ),
        (
            {
                "max_position_embeddings": 32_768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
            },
            131_072,
        ),
        ({"max_position_embeddings": 8_192, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 8_192),
        (
            {
                "max_position_embeddings": 131_072,
                "rope_parameters": {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4_096},
            },
            131_072,
        ),
        (
            {
                "max_position_embeddings": 131_072,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}},
            },
            131_072,
        ),
        ({"max_position_embeddings": -1, "max_seq_len": 700}, 700),
        ({"max_sequence_length": 1_000, "seq_length": 2_000}, 1_000),
        ({"seq_length": 2_000, "model_max_length": 9}, 2_000),
        ({"max_seq_len": 3_000}, 3_000),
        ({"model_max_length": 512}, 512),
        ({"max_position_embeddings": None}, 2_048),
    ],
)
def test_a_context_is_as_long_as_its_configuration_means(config: dict[str, Any], length: int) -> None:
    assert context_length(SimpleNamespace(**config)) == length


@pytest.mark.parametrize(
    ("family", "extra", "size"),
    [
        # Falcon-7B's form: all heads share one of keys and values, which no key of its configuration says.
        ("FalconConfig", {"multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 4}, 2 * 1 * 8),
        ("FalconConfig", {"multi_query": False, "new_decoder_architecture": False}, 2 * 4 * 8),
        ("LlamaConfig", {"num_key_value_heads": 2}, 2 * 2 * 8),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, 2 * 4 * 8),
        ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, 2 * 1 * 8),
        ("Gemma3TextConfig", {"num_key_value_heads": 1, "head_dim": 16}, 2 * 1 * 16),
    ],
)
def test_a_cache_is_measured_by_what_the_model_writes(
    family: str, extra: dict[str, Any], size: int, tmp_path: Path
) -> None:
    loaded = model_loader.load(
        TransformersOptions(model=str(save(tmp_path, family, extra)), dtype="float32", device="cpu")
    )
    layers, wide = 2, 4
    assert loaded.kv_tokens_max == cache_room._CPU_CACHE_BYTES // (layers * wide * size)


@pytest.mark.parametrize(
    ("family", "extra", "length"),
    [
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}, 40),
        ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 40}, 40),
        (
            "XGLMConfig",
            {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 40},
            40,
        ),
        ("LlamaConfig", {"max_position_embeddings": 40}, 40),
    ],
)
async def test_a_context_can_be_filled_to_its_last_place(
    family: str, extra: dict[str, Any], length: int, tmp_path: Path
) -> None:
    directory = save(tmp_path, family, extra)
    worker = ModelWorker(TransformersOptions(model=str(directory), dtype="float32", device="cpu"))
    worker.steps = answers = Answers()
    (info,) = await worker.load()
    assert info.context_length == length
    worker.begin(ask("a", "x" * (length - 4), temperature=0, max_new_tokens=None, ignore_eos=True))
    await answers.until("a")
    await worker.close()
    assert answers.tokens("a") == reference(directory, "x" * (length - 4), 4)


async def test_a_cache_smaller_than_the_context_bounds_it(tiny_llama: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(tiny_llama), device="cpu", kv_tokens_max=100))
    worker.steps = answers = Answers()
    (info,) = await worker.load()
    assert info.context_length == 100
    worker.begin(ask("a", "x" * 120))
    await answers.until("a")
    await worker.close()
    assert answers.errors["a"].details == {"prompt_tokens": 120, "context_length": 100}


@pytest.mark.parametrize(
    ("device", "tokens", "rows"), [("cpu", 10**6, 32), ("cuda", 10**6, 256), ("cuda", 8_192, 8), ("cuda", 100, 4)]
)
def test_a_batch_is_as_large_as_the_cache_allows(device: str, tokens: int, rows: int) -> None:
    assert cache_room.batch_size(device, tokens) == rows


@pytest.mark.parametrize(
    ("kv_cache", "given", "slots"), [("padded", None, 8), ("paged", None, 16), ("padded", 5, 5), ("paged", 5, 5)]
)
async def test_the_slots_are_those_of_the_batch(
    kv_cache: Literal["padded", "paged"], given: int | None, slots: int, tiny_llama: Path
) -> None:
    """A padded row is planned with all that it may ever have, and one of pages with what it has at a time."""
    options = TransformersOptions(
        model=str(tiny_llama), device="cpu", kv_tokens_max=8 * 1_024, max_batch_size=given, kv_cache=kv_cache
    )
    worker = ModelWorker(options)
    worker.steps = Answers()
    (info,) = await worker.load()
    await worker.close()
    assert (worker.slots, info.slots) == (slots, slots)
