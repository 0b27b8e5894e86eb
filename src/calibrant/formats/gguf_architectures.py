"""Models that are written as GGUF files here: what llama.cpp reads of their configuration, and rows it has in another
order (ggml-org/llama.cpp, ``convert_hf_to_gguf.py`` and ``src/llama-arch.cpp``)."""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from calibrant.errors import CalibrantError

# The architecture by model type.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# llama.cpp rotates neighbouring rows of these architectures' queries and keys, checkpoints have halves of a head.
_INTERLEAVED = ("llama",)
_KEYS_OF_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def gguf_architecture(config: Any) -> str:
    """llama.cpp's architecture of a model with the transformers configuration ``config``.

    Raises:
        CalibrantError: models of this type, or with these settings, are not written.
    """
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CalibrantError(
            f"{kind} models are not written as GGUF files here, those of {known} are; llama.cpp's own converter reads "
            "dense checkpoints of others"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ("default", "llama3") or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1:
        raise CalibrantError(f"rope_type {rope}: only default and llama3 of whole heads are written as GGUF files here")
    if config.hidden_act != "silu":
        raise CalibrantError(f"hidden_act {config.hidden_act}: llama.cpp computes silu in {kind} models")
    return _ARCHITECTURES[kind]


def gguf_metadata(config: Any) -> dict[str, int | float]:
    """What llama.cpp reads of a model's configuration, by key without the architecture in front.

    Raises:
        CalibrantError: see ``gguf_architecture``.
    """
    gguf_architecture(config)
    head = head_size(config)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }


def rotary_factors(config: Any) -> torch.Tensor | None:
    """What llama.cpp divides rotary frequencies by, float32 ``[head / 2]``; None for the default frequencies."""
    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    factors: torch.Tensor = 1.0 / (config.rope_parameters["rope_theta"] ** powers) / scaled
    return factors


def head_size(config: Any) -> int:
    """Numbers in a head's query."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def row_order(config: Any, layer: str, rows: int) -> torch.Tensor | None:
    """The rows of the weight or bias of ``layer`` in llama.cpp's order, int64 ``[rows]``; None where it is theirs."""
    heads = _KEYS_OF_HEADS.get(layer.rpartition(".")[2])
    if heads is None or gguf_architecture(config) not in _INTERLEAVED:
        return None
    return torch.arange(rows).reshape(getattr(config, heads), 2, -1).transpose(1, 2).flatten()
