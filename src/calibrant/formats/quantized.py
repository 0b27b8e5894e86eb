"""The two quantized layouts of compressed-tensors, ``pack-quantized`` and ``int-quantized`` (formats.md §3).

A layout turns finished codes, scales and zeros into named tensors and back; it never quantizes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from calibrant.formats.packing import pack, unpack

# Widths whose packed layout is the same in every version of the format; others are stored in the next one.
_STORED_WIDTHS = (2, 4, 8)


@dataclass(frozen=True)
class Codes:
    """Finished integers: ``codes`` int8 ``[out, in]``; ``[out, groups]`` ``scale`` (storage dtype), ``zero`` int8."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """How the weights of a model are stored: ``bits`` as solved, ``group_size`` None for one scale a channel."""

    bits: int
    symmetric: bool
    group_size: int | None
    dynamic_activations: bool

    @property
    def stored_bits(self) -> int:
        """The width in the file: 3 bits go into 4, 5 to 7 into 8 (ours: packed odd widths differ between versions)."""
        return next(width for width in _STORED_WIDTHS if width >= self.bits)


class WeightFormat(Protocol):
    """A checkpoint format for quantized linears."""

    name: str

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        """Tensors by suffix (``weight_packed`` and so on)."""

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        """Inverse of ``write``."""


class PackQuantized:
    """Weight-only: codes packed into int32 words."""

    name = "pack-quantized"

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        tensors = {
            "weight_packed": pack(codes.codes, layout.stored_bits),
            "weight_scale": codes.scale,
            "weight_shape": torch.tensor(codes.codes.shape, dtype=torch.int64),
        }
        if not layout.symmetric:
            tensors["weight_zero_point"] = pack(codes.zero.T.contiguous(), layout.stored_bits).T.contiguous()
        return tensors

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        rows, columns = tensors["weight_shape"].tolist()
        scale = tensors["weight_scale"]
        if layout.symmetric:
            zero = torch.zeros(scale.shape, dtype=torch.int8)
        else:
            zero = unpack(tensors["weight_zero_point"].T.contiguous(), layout.stored_bits, rows).T.contiguous()
        return Codes(unpack(tensors["weight_packed"], layout.stored_bits, columns), scale, zero)


class IntQuantized:
    """8-bit weights as int8 tensors, for integer products with activations quantized at run time."""

    name = "int-quantized"

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        tensors = {"weight": codes.codes, "weight_scale": codes.scale}
        if not layout.symmetric:
            tensors["weight_zero_point"] = codes.zero
        return tensors

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        scale = tensors["weight_scale"]
        zero = tensors.get("weight_zero_point", torch.zeros(scale.shape, dtype=torch.int8))
        return Codes(tensors["weight"], scale, zero)


def format_for(layout: Layout) -> WeightFormat:
    """Weight-only models are packed; models with integer activations keep int8 tensors."""
    return IntQuantized() if layout.dynamic_activations else PackQuantized()


def quantization_config(layout: Layout, ignored: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` block of ``config.json``; ``ignored`` are the linears stored unquantized."""
    activations: dict[str, Any] | None = None
    if layout.dynamic_activations:
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    weights: dict[str, Any] = {
        "num_bits": layout.stored_bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "strategy": "group" if layout.group_size else "channel",
        "dynamic": False,
    }
    if layout.group_size:
        weights["group_size"] = layout.group_size
    name = format_for(layout).name
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": name,
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }
