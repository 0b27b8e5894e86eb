"""Models that are written as GGUF files here: what llama.cpp reads of their configuration, and rows it has in another
order (ggml-org/llama.cpp, ``convert_hf_to_gguf.py`` and ``src/llama-arch.cpp``)."""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from calibrant.errors import CalibrantError

# The architecture by model type, and the activation that llama.cpp computes in it.
_ARCHITECTURES = {
    "llama": ("llama", "silu"),
    "mistral": ("llama", "silu"),
    "qwen2": ("qwen2", "silu"),
    "qwen3": ("qwen3", "silu"),
    "gemma3_text": ("gemma3", "gelu_pytorch_tanh"),
}
# llama.cpp rotates neighbouring rows of these architectures' queries and keys, checkpoints have halves of a head.
_INTERLEAVED = ("llama",)
_KEYS_OF_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
# Checkpoints of these store norms less one.
_NORMS_LESS_ONE = ("gemma3",)


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
    for rope in (_rope(config), _rope(config, "sliding_attention")):
        scaled = rope.get("rope_type", "default")
        if scaled not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1:
            raise CalibrantError(
                f"rope_type {scaled}: default and llama3 of whole heads are written as GGUF files here"
            )
    architecture, computed = _ARCHITECTURES[kind]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != computed:
        raise CalibrantError(f"activation {activation}: llama.cpp computes {computed} in {kind} models")
    if architecture == "gemma3":
        _check_gemma(config)
    return architecture


def _check_gemma(config: Any) -> None:
    """Refuse settings of Gemma 3 that llama.cpp has fixed."""
    fixed = {
        "query_pre_attn_scalar": head_size(config),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }
    wrong = next((name for name, value in fixed.items() if getattr(config, name, value) not in (value, None)), None)
    if wrong is not None:
        raise CalibrantError(f"{wrong} is {getattr(config, wrong)}: llama.cpp has {fixed[wrong]} in Gemma 3")


def gguf_metadata(config: Any) -> dict[str, int | float]:
    """What llama.cpp reads of a model's configuration, by key without the architecture in front.

    Raises:
        CalibrantError: see ``gguf_architecture``.
    """
    architecture, head = gguf_architecture(config), head_size(config)
    found = {
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
        "rope.freq_base": float(_rope(config)["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    window = getattr(config, "sliding_window", None)
    if architecture == "gemma3":
        found["attention.sliding_window"] = window
        found["attention.sliding_window_pattern"] = _period(config.layer_types)
        found["rope.freq_base_swa"] = float(_rope(config, "sliding_attention")["rope_theta"])
    elif window is not None:  # llama.cpp attends to everything in the others, which is the same up to the window
        found["context_length"] = min(window, config.max_position_embeddings)
    return found


def _period(layer_types: list[str]) -> int:
    """The ``n`` of layers of which every ``n``-th attends to everything, as llama.cpp has it.

    Raises:
        CalibrantError: the layers have another order.
    """
    whole = [number for number, kind in enumerate(layer_types, 1) if kind == "full_attention"]
    period = whole[0] if whole else len(layer_types) + 1
    if whole != list(range(period, len(layer_types) + 1, period)):
        raise CalibrantError("layer_types: llama.cpp has every n-th layer attend to everything, these are others")
    return period


def _rope(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """Settings of the rotary embedding of layers of this kind; most models have one kind."""
    settings: dict[str, Any] = config.rope_parameters
    own: dict[str, Any] = settings.get(kind, settings)
    return own


def rotary_factors(config: Any) -> torch.Tensor | None:
    """What llama.cpp divides rotary frequencies by, float32 ``[head / 2]``; None for the default frequencies."""
    if _rope(config).get("rope_type", "default") == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    factors: torch.Tensor = 1.0 / (_rope(config)["rope_theta"] ** powers) / scaled
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


def norm_offset(config: Any, name: str) -> float:
    """What llama.cpp's tensor ``name`` has more than the checkpoint's."""
    is_norm = name.endswith("norm.weight")
    return 1.0 if is_norm and gguf_architecture(config) in _NORMS_LESS_ONE else 0.0
