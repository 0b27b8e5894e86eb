"""Keys and values on their way into an attention's cache, for quantized caches: which modules have one, and hooks.

Source: vllm-project/compressed-tensors, ``modeling/kvcache.py`` and ``is_cached_attention_module``, so that every
module has scales to which that library gives a cache.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from calibrant.errors import CalibrantError
from calibrant.formats.kv_cache import KvCacheLayout, cache_scales, kv_cache_layout
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hooks import Hook
from calibrant.modeling.tensor_sources import loaded_names

_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
_ARGUMENTS = ("past_key_values", "past_key_value")

# Gets keys and values ``[rows, heads, length, size]`` after rotation, and returns what takes their places.
Change = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def cached_attentions(module: nn.Module) -> dict[str, nn.Module]:
    """The attentions in ``module`` that keep keys and values, by name."""
    return {
        name: one
        for name, one in module.named_modules()
        if "attention" in type(one).__name__.lower()
        and any(hasattr(one, projection) for projection in _PROJECTIONS)
        and _argument(one) is not None
    }


def cache_hook(attention: nn.Module, change: Change) -> tuple[nn.Module, Hook]:
    """The hook on ``attention`` that gives its keys and values to ``change`` before they are kept, or used."""
    argument = _argument(attention)
    assert argument is not None

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, argument: _ChangingCache(kwargs.get(argument), change)}

    return attention, hook


def round_caches(model: transformers.PreTrainedModel, folder: ModelFolder) -> None:
    """Round keys and values in every later forward pass of ``model`` as the checkpoint in ``folder`` says.

    Raises:
        CalibrantError: its scheme is not read here, or an attention has no scales.
    """
    layout = kv_cache_layout(folder.quantization or {})
    if layout is None:
        return
    stored = loaded_names(model, cache_scales(folder.tensors, folder.quantization or {}))
    places = {name: place for place, name in stored.items()}
    for name, attention in cached_attentions(model).items():
        missing = [part for part in ("k_scale", "v_scale") if f"{name}.{part}" not in places]
        if missing:
            raise CalibrantError(f"{folder.path}: its files lack {name}.{missing[0]}; copy or download it again")
        scales = {part: folder.read(places[f"{name}.{part}"]) for part in ("k_scale", "v_scale")}
        module, hook = cache_hook(attention, _rounding(layout, scales))
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _rounding(layout: KvCacheLayout, scales: Mapping[str, torch.Tensor]) -> Change:
    def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        scale = scale.to(values.device, torch.float32)
        return (layout.numbers.nearest(values.float() / scale) * scale).to(values.dtype)

    return lambda keys, values: (rounded(keys, scales["k_scale"]), rounded(values, scales["v_scale"]))


class _ChangingCache:
    """Stands in front of a cache of transformers, or of none."""

    def __init__(self, cache: Any, change: Change) -> None:
        self._cache, self._change = cache, change

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = self._change(keys, values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _argument(module: nn.Module) -> str | None:
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _ARGUMENTS if name in parameters), None)
