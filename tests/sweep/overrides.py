"""What single architectures need beyond the general rules for small sizes."""

from __future__ import annotations

from typing import Any

#: One attention layer among linear ones.
_ATTENTION_AT_1 = {"attn_layer_indices": [1]}
_HEADS = {"head_dim": 16}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _ATTENTION_AT_1,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": {**_HEADS, "moe_topk": 2, "num_experts": 4},
    "ministral": _HEADS,
    "nemotron": {**_HEADS, "num_key_value_heads": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "hrm_text": {"num_hidden_layers": 4},
    "qwen4_exp_text": _HEADS,
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "mamba2": {"num_heads": 8, "head_dim": 16, "hidden_size": 64, "expand": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    # The halves of its heads are a multiple of 64 together.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 4, "autocast_kernel_dtype": "float32"},
    "xlnet": {"d_head": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "openai-gpt": {"n_positions": 512},
    "phi4_multimodal": {"original_max_position_embeddings": 512},
    "t5": {"decoder_start_token_id": 2, "initializer_factor": 20.0},
    **{name: {"initializer_factor": 20.0} for name in ("longt5", "mt5", "umt5")},
    # With greater weights they say the same whatever they have said.
    **{name: {"init_std": 0.1} for name in ("bart", "blenderbot-small", "fsmt", "led", "marian", "mvp", "plbart")},
}
#: Encoders that transformers turns into decoders where it is asked to.
for _name in (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
):  # fmt: skip
    OVERRIDES[f"{_name}+decoder"] = {"is_decoder": True}
