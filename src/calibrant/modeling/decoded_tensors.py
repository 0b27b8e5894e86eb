"""The tensors of a quantized checkpoint as a dense one would have them, decoded when they are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from calibrant.errors import CalibrantError
from calibrant.formats.kv_cache import cache_scales
from calibrant.formats.stored_codes import decoded_weight, dense_shape, quantized_linears
from calibrant.kernels.number_types import E2M1_NUMBERS
from calibrant.modeling.weight_files import TensorInfo

_BLOCKS, _SCALES = "_blocks", "_scales"
_EXPONENT_BIAS = 127
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class _Decoded:
    info: TensorInfo
    read: Callable[[], torch.Tensor]


class DecodedTensors:
    """Dense tensors of ``stored`` ones; those that are not quantized are as they were.

    Args:
        stored: the tensors of the checkpoint.
        read: loads one of them.
        settings: its ``quantization_config``.
        dtype: dtype of decoded weights.

    Raises:
        CalibrantError: the format is not read here.
    """

    def __init__(
        self,
        stored: Mapping[str, TensorInfo],
        read: Callable[[str], torch.Tensor],
        settings: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self._read, self._dtype = read, dtype
        find = self._fused_experts if settings.get("quant_method") == "mxfp4" else self._linears
        decoded, parts = find(stored, settings)
        self._decoded = decoded
        parts |= cache_scales(stored, settings)
        kept = {name: info for name, info in stored.items() if name not in parts}
        self.tensors: dict[str, TensorInfo] = {**kept, **{name: one.info for name, one in decoded.items()}}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, decoded if it is quantized."""
        if name in self._decoded:
            return self._decoded[name].read().to(self._dtype)
        return self._read(name)

    def _linears(
        self, stored: Mapping[str, TensorInfo], settings: Mapping[str, Any]
    ) -> tuple[dict[str, _Decoded], set[str]]:
        found, parts = {}, set()
        shapes = {name: info.shape for name, info in stored.items()}
        for linear, names in quantized_linears(stored, settings).items():
            parts |= set(names)
            shape = dense_shape(linear, shapes, self._read, settings)
            info = TensorInfo(stored[names[0]].file, _spelled(self._dtype), shape)

            def read(linear: str = linear, names: list[str] = names) -> torch.Tensor:
                return decoded_weight(linear, names, self._read, settings)

            found[f"{linear}.weight"] = _Decoded(info, read)
        return found, parts

    def _fused_experts(
        self, stored: Mapping[str, TensorInfo], settings: Mapping[str, Any]
    ) -> tuple[dict[str, _Decoded], set[str]]:
        """GPT-OSS's own format: experts ``[experts, out, in / 32, 16]`` of two E2M1 numbers a byte, with powers of two
        for each 32; its parameters are ``[experts, in, out]``."""
        found, parts = {}, set()
        for name in [name for name in stored if name.endswith(_BLOCKS)]:
            base = name.removesuffix(_BLOCKS)
            scales = base + _SCALES
            parts |= {name, scales}
            if scales not in stored or len(stored[name].shape) != 4 or stored[scales].shape != stored[name].shape[:3]:
                raise CalibrantError(f"{scales} is missing, or does not fit {name}; copy or download the model again")
            experts, rows, groups, size = stored[name].shape
            info = TensorInfo(stored[name].file, _spelled(self._dtype), (experts, groups * size * 2, rows))

            def read(blocks: str = name, scales: str = scales) -> torch.Tensor:
                return _fused(self._read(blocks), self._read(scales))

            found[base] = _Decoded(info, read)
        return found, parts


def _fused(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = E2M1_NUMBERS[(pairs & 7).long()] * torch.where(pairs & 8 > 0, -1.0, 1.0)
    scaled = torch.ldexp(values, scales.to(torch.int32)[..., None] - _EXPONENT_BIAS)
    return scaled.flatten(-2).transpose(1, 2).contiguous()


def _spelled(dtype: torch.dtype) -> str:
    """A dtype as safetensors headers spell it."""
    return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]


def decoded_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of dense weights that ``config.json`` names; bfloat16 if it names none that they have."""
    text = config.get("text_config")
    names = [place.get(key) for place in (config, text if isinstance(text, dict) else {}) for key in _DTYPE_KEYS]
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return next((known[name] for name in map(str, names) if name in known), torch.bfloat16)
