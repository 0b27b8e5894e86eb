"""Faster bfloat16 causal attention for models that use ``sdpa``, on CPUs with bfloat16 instructions."""

from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from calibrant.kernels import bfloat16_tile
from calibrant.kernels.causal_attention import causal_attention

_NAME = "calibrant_causal"
# Tensors that models hand to every attention, and sdpa does not look at.
_HARMLESS = {"position_ids", "cache_position"}


def use_fast_attention(model: transformers.PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Run causal attention of ``model``, full or sliding-window, on our kernel; other attention stays with ``sdpa``."""
    if dtype is not torch.bfloat16 or device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    if not bfloat16_tile.available():
        return
    AttentionInterface.register(_NAME, _forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    causal = is_causal if is_causal is not None else vars(module).get("is_causal", True)
    length = query.shape[2]
    plain = causal and dropout == 0.0 and length == key.shape[2] > 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    fits = query.shape[-1] == value.shape[-1] and query.shape[-1] % 2 == 0 and scale > 0
    trained = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    if plain and fits and not trained and query.dtype is torch.bfloat16 and not _means_more(kwargs):
        window = length if attention_mask is None else _window(attention_mask, length)
        if window:
            return causal_attention(query, key, value, scale, window), None
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )
    return result


def _means_more(options: dict[str, Any]) -> bool:
    """Whether these further options change the result (a bias of positions, sinks, soft-capped scores)."""
    tensors = (name for name, value in options.items() if isinstance(value, torch.Tensor))
    return any(name not in _HARMLESS for name in tensors) or options.get("softcap") is not None


def _window(mask: torch.Tensor, length: int) -> int | None:
    """Width of the sliding window in ``mask`` ``[.., length, length]``; None if the mask has any other form."""
    if mask.dtype is not torch.bool or mask.shape[-2:] != (length, length):
        return None
    window = int(mask[..., -1, :].sum(-1).flatten()[0])
    band = _band(length, window)
    return window if all(torch.equal(item, band) for item in mask.reshape(-1, length, length)) else None


@lru_cache(maxsize=4)
def _band(length: int, window: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
