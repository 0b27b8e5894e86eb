"""Finished integers and how a format for them looks; a format never quantizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

FormatName = Literal["compressed-tensors", "gptq", "awq"]
# Widths whose packed layout is the same in every version of the format; others are stored in the next one.
STORED_WIDTHS = (2, 4, 8)
# What others store GPTQ in.
READ_WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Codes:
    """Finished integers: ``codes`` int8 ``[out, in]``; ``[out, groups]`` ``scale`` (storage dtype), ``zero_point`` int8.

    ``input_scale`` and ``input_zero_point`` ``[1]``, of those dtypes, are the grid of the layer's input if that is static.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    input_scale: torch.Tensor | None = None
    input_zero_point: torch.Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How the weights of a model are stored: ``bits`` as solved, ``group_size`` None for one scale a channel.

    ``activations``: None, or whether the ranges of int8 activations are found at run time or stored.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    activations: Literal["dynamic", "static"] | None = None
    format: FormatName = "compressed-tensors"

    @property
    def stored_bits(self) -> int:
        """The width in the file: 3 bits go into 4, 5 to 7 into 8 (ours: packed odd widths differ between versions)."""
        return next(width for width in STORED_WIDTHS if width >= self.bits)


class WeightFormat(Protocol):
    """A checkpoint format for quantized linears."""

    name: str

    def refusal(self, layout: Layout) -> str | None:
        """Why the format cannot hold such weights, or None."""

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        """Tensors by suffix (``weight_packed`` and so on)."""

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        """Inverse of ``write``."""

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        """The ``quantization_config`` block of ``config.json``.

        ``layouts`` lists the linears of each layout, ``ignored`` those stored unquantized.
        """
