"""AWQ checkpoints in the GEMM layout of AutoAWQ (``awq/modules/linear/gemm.py``)."""

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.formats.packing import pack, unpack
from calibrant.formats.quantized import Codes, Layout

_BITS = 4
# Nibble i of word w encodes output channel 8 w + _NIBBLE_ORDER[i] (AutoAWQ, ``awq/utils/packing_utils.py``).
_NIBBLE_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


class Awq:
    """4-bit codes and zero points packed along the outputs in AWQ's nibble order, float16 scales."""

    name = "awq"

    def refusal(self, layout: Layout) -> str | None:
        if layout.bits != _BITS:
            return f"the awq format holds 4-bit weights, not {layout.bits}"
        return None

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        return {
            "qweight": pack(_reordered(codes.codes.T, _NIBBLE_ORDER), _BITS),
            "qzeros": pack(_reordered(codes.zero_point.T, _NIBBLE_ORDER), _BITS),
            "scales": codes.scale.T.contiguous(),
        }

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        scales = tensors["scales"]
        words = (unpack(tensors[name], _BITS, scales.shape[1]) for name in ("qweight", "qzeros"))
        codes, zero_point = (_reordered(values, _NIBBLE_ORDER.argsort()).T for values in words)
        return Codes(codes.contiguous(), scales.T.contiguous(), zero_point.contiguous())

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        (layout,) = layouts
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": layout.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignored or None,
        }


def _reordered(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Permute every eight columns of ``values`` ``[rows, columns]`` by ``order``."""
    rows, columns = values.shape
    return values.reshape(rows, columns // 8, 8)[:, :, order].reshape(rows, columns)
