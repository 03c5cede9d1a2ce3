"""Tiny configurations of any architecture: the class's own defaults with every size made small."""

from __future__ import annotations

import re
from typing import Any

#: Layers of a tiny model at most; a model whose layers differ keeps the first ones of each kind.
_LAYERS = 4
_VOCABULARY = 259
#: Sizes by the names that configurations give them: the first pattern that matches the whole name decides.
_RULES: list[tuple[str, Any]] = [
    (r"(ngram_|emb_|oe_|text_|bpe_|original_)?vocab_size(_.*)?", _VOCABULARY),
    (r"type_vocab_size", 2),
    (r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|num_selected_experts|moe_top_k", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"(num|n)_(routed_|local_|moe_)?experts|moe_num_experts|zero_expert_num|num_zero_experts", 4),
    (r"(n|num)_shared_experts?|moe_num_shared_experts", 1),
    (r"num_key_value_heads|n_head_kv|num_kv_heads|num_global_key_value_heads|swa_num_key_value_heads", 2),
    (r"(encoder_|decoder_|cross_)?(num_)?attention_heads|n_heads?|num_heads|(encoder|decoder)_num_heads|.*_attention_heads", 4),
    (r"rotary_dim", 8),
    (r"(global_|swa_|index_|attention_)?head_(dim|size)|(v|qk_nope|value|qk_rope|index_rope|rope)_head_dim", 16),
    (r"qk_head_dim", 32),
    (r"kv_lora_rank", 16),
    (r"q_lora_rank|o_lora_rank", 32),
    (r"index_n_heads", 16),
    (r"index_topk", 8),
    (r"(num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_layers|depth|num_blocks|layers)", "layers"),
    (r"(.*_)?(intermediate_(size|dim)|ffn_(dim|hidden_size)|mlp_dim|d_ff|inner_dim|n_inner|ffn_intermediate_size)", 64),
    (r"linear_(num_key_heads)", 2),
    (r"linear_(num_value_heads)", 4),
    (r"linear_(key|value)_head_dim", 16),
    (r"linear_conv_kernel_dim|mamba_d_conv|conv_kernel(_size)?|d_conv|conv_L_cache", 4),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_state_dim|d_state", 8),
    (r"mamba_d_ssm", 128),
    (r"(mamba_)?n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"mamba_chunk_size|chunk_size", 16),
    (r"lru_width", 64),
    (r"attention_window_size|(sliding|attention)_window(_size)?|window_size|attention_chunk_size", 12),
    (r"(text_|vision_|audio_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|dim|model_dim)", 64),
    (r"(decoder|encoder|word_embed_proj|emb|output|projection|out_hidden|vision_output|project)_?(dim|hidden_size|size)", 64),
    (r"hidden_size_per_layer_input", 16),
    (r"vocab_size_per_layer_input", _VOCABULARY),
    (r"attention_hidden_size", 64),
    (r"max_position_embeddings|n_positions|max_seq_len(gth)?|n_ctx|max_(source|target)_positions|max_sequence_length", 512),
    (r"image_size", 32),
    (r"patch_size|spatial_patch_size", 8),
    (r"initializer_range|init_std|initializer_factor|init_scale|initializer_std", 0.3),
    (r"tie_word_embeddings|tie_encoder_decoder|use_cache_kernels|use_mambapy", False),
    (r"layerdrop|.*dropout.*|.*_drop|.*pdrop", 0.0),
]  # fmt: skip
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_NOT_NESTED = ("id2label", "label2id", "rope_scaling", "rope_parameters", "per_layer_config")
#: Names whose defaults are numbers but no sizes of weights.
_KEEP = re.compile(
    r"num_labels|per_layer_config|num_return_sequences|.*_theta|.*_eps|.*_factor|.*_scal(e|ing).*|.*_threshold"
)


def shrink(values: dict[str, Any], overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """A configuration's values, made small, nested ones too.

    Args:
        values: As `to_dict` gives them.
        overrides: What one architecture needs beyond the rules; nested ones are dictionaries.
    """
    made = {name: _smaller(name, value) for name, value in values.items()}
    made = _fitting_layers(made)
    made.pop("output_attentions", None)
    made.pop("_name_or_path", None)
    if made.get("kv_lora_rank") and "num_key_value_heads" in made:
        # Latent attention expands to all heads.
        made["num_key_value_heads"] = made["num_attention_heads"]
    for name, value in (overrides or {}).items():
        nested = made.get(name)
        made[name] = {**nested, **value} if isinstance(nested, dict) and isinstance(value, dict) else value
    return made


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, dict) and name not in _NOT_NESTED:
        return shrink(value)
    if name.endswith(("_token_id", "_token_index")):
        return _token(name, value)
    if value is None or _KEEP.fullmatch(name):
        return value
    for pattern, wanted in _COMPILED:
        if pattern.fullmatch(name):
            if wanted == "layers":
                return min(value, _LAYERS) if isinstance(value, int) else value
            if isinstance(wanted, bool) or isinstance(value, bool):
                return wanted if isinstance(value, bool) and isinstance(wanted, bool) else value
            if isinstance(value, (int, float)):
                return _number(value, wanted)
            if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
                return [_number(one, wanted) for one in value]
            return value
    return value


def _number(value: float, wanted: float) -> float:
    if isinstance(wanted, float):
        return type(value)(wanted)
    return min(int(value), wanted) if value > 0 else value


def _token(name: str, value: Any) -> Any:
    known = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0}
    if name in known:
        return known[name]
    if isinstance(value, int) and value >= _VOCABULARY:
        # Tokens of images and the like are told apart, and lie above the bytes that prompts are made of.
        return 120 + sum(name.encode()) % 60
    return value


def _fitting_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer are cut to as many as there are layers, of each kind at least one."""
    counts = [values.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers")]
    count = next((count for count in counts if isinstance(count, int)), 0)
    kinds = values.get("layer_types") or values.get("layers_block_type")
    chosen = list(range(count))
    if isinstance(kinds, list) and len(kinds) > count > 0:
        firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        rest = [position for position in range(len(kinds)) if position not in firsts]
        chosen = sorted((firsts + rest)[:count])
    for name, value in values.items():
        if isinstance(value, list) and len(value) > count > 0 and len(value) > 8:
            values[name] = [value[position] for position in chosen]
    special = values.get("per_layer_config")
    if isinstance(special, dict) and special:
        # Heads of another size than the other layers': what the first such layer has, at the last one that is left.
        first = next(iter(special.values()))
        values["per_layer_config"] = {str(count - 1): {name: 2 * _smaller(name, size) for name, size in first.items()}}
    return values
