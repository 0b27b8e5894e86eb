"""AWQ checkpoints, the GEMM layout (formats.md §6)."""

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.formats.packing import pack, unpack
from calibrant.formats.quantized import Codes, Layout

_BITS = 4
# Nibble i of a word holds output channel 8 word + _ORDER[i].
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


class Awq:
    """4-bit codes and zeros packed along the outputs in an order of its own, scales float16."""

    name = "awq"

    def refusal(self, layout: Layout) -> str | None:
        if layout.bits != _BITS:
            return f"the awq format holds 4-bit weights, not {layout.bits}"
        return None

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        return {
            "qweight": pack(_in_words(codes.codes.T, _ORDER), _BITS),
            "qzeros": pack(_in_words(codes.zero_point.T, _ORDER), _BITS),
            "scales": codes.scale.T.contiguous(),
        }

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        scales = tensors["scales"]
        words = (unpack(tensors[name], _BITS, scales.shape[1]) for name in ("qweight", "qzeros"))
        codes, zero_point = (_in_words(values, _ORDER.argsort()).T for values in words)
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


def _in_words(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Of every eight columns those of ``order``."""
    rows, columns = values.shape
    return values.reshape(rows, columns // 8, 8)[:, :, order].reshape(rows, columns)
