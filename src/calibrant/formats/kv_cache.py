"""Quantized keys and values in compressed-tensors checkpoints: their scheme in ``config.json`` and their scales.

Source: vllm-project/compressed-tensors, ``quantization/quant_config.py`` and ``lifecycle/initialize.py``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from calibrant.errors import CalibrantError
from calibrant.kernels.number_types import E4M3, NumberType

KvCacheType = Literal["fp8", "int8"]
KvCacheGranularity = Literal["tensor", "head"]
_BITS = 8
_STRATEGIES: dict[KvCacheGranularity, str] = {"tensor": "tensor", "head": "attn_head"}


@dataclass(frozen=True)
class KvCacheLayout:
    """Symmetric numbers of ``type``, with one scale for the keys and one for the values of a layer, or of a head."""

    type: KvCacheType
    granularity: KvCacheGranularity

    @property
    def numbers(self) -> NumberType:
        """The numbers that keys and values become."""
        return E4M3 if self.type == "fp8" else NumberType.integers(_BITS)

    def scheme(self) -> dict[str, Any]:
        """The ``kv_cache_scheme`` of ``quantization_config``."""
        return {
            "num_bits": _BITS,
            "type": "float" if self.type == "fp8" else "int",
            "symmetric": True,
            "strategy": _STRATEGIES[self.granularity],
            "dynamic": False,
        }

    def scales(self, largest: torch.Tensor) -> torch.Tensor:
        """Scales ``[1]`` or ``[heads, 1, 1]``, by which ``largest`` magnitudes ``[heads]`` are the largest number."""
        found = largest.amax()[None] if self.granularity == "tensor" else largest[:, None, None]
        return torch.where(found > 0, found / self.numbers.qmax, 1.0)


def cache_scales(names: Iterable[str], settings: Mapping[str, Any]) -> set[str]:
    """The stored tensors, of ``names``, that are scales of keys and values."""
    if settings.get("kv_cache_scheme") is None:
        return set()
    return {name for name in names if name.endswith((".k_scale", ".v_scale"))}


def kv_cache_layout(settings: Mapping[str, Any]) -> KvCacheLayout | None:
    """The layout that a ``quantization_config`` gives to keys and values, if it does.

    Raises:
        CalibrantError: it is none of ours.
    """
    scheme = settings.get("kv_cache_scheme")
    if scheme is None:
        return None
    said = scheme if isinstance(scheme, dict) else {}
    for kind in ("fp8", "int8"):
        for granularity in ("tensor", "head"):
            layout = KvCacheLayout(kind, granularity)
            if all(said.get(key) == value for key, value in layout.scheme().items()):
                return layout
    raise CalibrantError(f"config.json: keys and values quantized as {scheme}, which is not read here")
