"""Tiny configurations of every architecture: the defaults of transformers with small sizes."""

from typing import Any

import transformers

VOCABULARY = 512
CONTEXT = 256
_HEADS, _KEY_VALUE_HEADS, _HEAD, _WIDTH, _INNER = 4, 2, 16, 64, 128
_MOST_LAYERS = 5

_BY_NAME: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "max_target_positions",
         "max_source_positions", "context_length", "original_max_position_embeddings"),
        CONTEXT,
    ),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "word_embed_proj_dim", "dim_model_base",
         "input_embedding_size", "output_embedding_size", "embedding_dim", "hidden_size_global", "lru_width",
         "attention_hidden_size", "out_hidden_size", "backbone_hidden_size", "input_size", "router_hidden_size",
         "linear_hidden_size", "vision_output_dim", "projection_dim"),
        _WIDTH,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "d_inner", "decoder_ffn_dim",
         "encoder_ffn_dim", "ffn_hidden_size", "feed_forward_size", "expert_ffn_hidden_size", "intermediate_size_mlp",
         "shared_intermediate_size", "dense_intermediate_size", "mlp_dim", "mamba_d_ssm"),
        _INNER,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
         "moe_shared_expert_intermediate_size", "moe_ffn_hidden_size"),
        _WIDTH,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_heads",
         "linear_num_value_heads", "swa_num_attention_heads", "index_n_heads", "conf_num_attention_heads"),
        _HEADS,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num", "swa_num_key_value_heads",
         "num_global_key_value_heads", "num_query_groups", "linear_num_key_heads"),
        _KEY_VALUE_HEADS,
    ),
    **dict.fromkeys(
        ("head_dim", "kv_channels", "d_head", "d_kv", "dim_head", "v_head_dim", "swa_head_dim", "global_head_dim",
         "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "attention_head_size", "index_head_dim",
         "swa_v_head_dim"),
        _HEAD,
    ),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), _HEAD // 2),
    "qk_head_dim": _HEAD,
    "q_lora_rank": 32, "kv_lora_rank": 32, "o_lora_rank": 16, "o_groups": 2, "hc_lowrank": 16, "gated_norm_rank": 8,
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "moe_topk", "top_k_experts"), 2
    ),
    # DeepSeek-V3's default leaves no layer with experts among so few.
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size", "local_attention",
         "keep_window_size", "chunk_size", "mamba_chunk_size", "index_topk", "conf_attention_chunk_size"),
        16,
    ),
    "query_pre_attn_scalar": _HEAD, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "num_kv_shared_layers": 0,
    "mamba_d_state": 16, "state_size": 16, "ssm_state_size": 16, "time_step_rank": 8, "mamba_dt_rank": 8,
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_headdim": 16,
    "n_mamba_heads": 2, "n_groups": 2, "mamba_n_groups": 1,
    "image_size": 28, "patch_size": 14, "mm_tokens_per_image": 4, "depth": 2, "num_position_embeddings": 16,
    "spatial_merge_size": 2,
}  # fmt: skip
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
    "num_encoder_layers", "num_blocks", "num_layers_per_stack", "conf_num_hidden_layers",
)  # fmt: skip
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "sep_token_id": 2}

_NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "num_experts_per_token")
_DROPPED = ("transformers_version", "model_type", "architectures", "dtype", "_name_or_path", "per_layer_config")

# Parts of half a head that are rotated by time, height and width.
_SECTIONS = [2, 3, 3]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_MROPE = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": _SECTIONS}}}

# What the sizes by name do not get right, by model type; a nested dict goes into the sub-configuration.
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("glm46v", "glm4v", "glm_ocr", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), _MROPE
    ),
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"model_type": "", "kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {
        "per_layer_config": {
            "02": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 8}
        }
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (32, 32),
        "num_buckets": 4,
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5],
        "attention_hidden_size": 128,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
        "attention_head_dim": 32,
    },
}


def tiny_config(model_type: str) -> transformers.PretrainedConfig:
    """The configuration ``model_type`` with small sizes; every kind of layer that its defaults have occurs."""
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    settings = _shrunk(kind().to_dict())
    _merge(settings, _SPECIAL.get(model_type, {}))
    return kind(**settings)


def _merge(settings: dict[str, Any], special: dict[str, Any]) -> None:
    for name, value in special.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    layers = [settings[name] for name in _LAYERS if isinstance(settings.get(name), int)]
    depth = layers[0] if layers else 0
    per_layer = {
        name: value for name, value in settings.items() if isinstance(value, list) and depth and len(value) == depth
    }
    chosen = _layers_of_every_kind(list(per_layer.values()), depth)
    for name, value in settings.items():
        if name in _DROPPED:
            continue
        if isinstance(value, dict) and "model_type" in value:
            small[name] = {"model_type": value["model_type"], **_shrunk(value)}
        elif isinstance(value, dict) and "mrope_section" in value:
            small[name] = {**value, "mrope_section": _SECTIONS}
        elif name in per_layer:
            small[name] = [_small(name, per_layer[name][index]) for index in chosen]
        elif name in _LAYERS and isinstance(value, int):
            small[name] = min(value, len(chosen))
        elif name in _TOKENS and value is not None:
            small[name] = _TOKENS[name]
        elif name == "is_decoder":
            small[name] = True
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= 400:
            small[name] = 400 + sum(key.endswith(("token_id", "token_index")) for key in small)
        elif name in _NEEDED and value is None:
            small[name] = _BY_NAME[name]
        else:
            small[name] = _small(name, value)
    if settings.get("qk_rope_head_dim") and settings.get("head_dim") == settings["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    heads = settings.get("num_attention_heads")
    if heads and settings.get("num_key_value_heads") == heads:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _small(name: str, value: Any) -> Any:
    """The value of the setting ``name``, at most as large as a tiny model needs it."""
    is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return min(value, _BY_NAME[name]) if is_size and name in _BY_NAME else value


def _layers_of_every_kind(lists: list[list[Any]], depth: int) -> list[int]:
    """Numbers of a few layers, in order, among them the first of each kind."""
    kinds: dict[str, int] = {}
    for index, values in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(repr(values), index)
    chosen = sorted(kinds.values())[:_MOST_LAYERS]
    for index in range(depth):
        if len(chosen) < 3 and index not in chosen:
            chosen.append(index)
    return sorted(chosen)
