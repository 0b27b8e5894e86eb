"""Codes of quantized linears and the interface of checkpoint formats; a format never quantizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

FormatName = Literal["compressed-tensors", "gptq", "awq", "gguf", "gpt-oss"]
# Integers; E4M3; E2M1 with a power of two for each 32 weights; E2M1 with an E4M3 scale for each 16; llama.cpp's types.
WeightType = Literal[
    "int", "fp8", "mxfp4", "nvfp4",
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
]  # fmt: skip
FLOAT_TYPES: tuple[WeightType, ...] = ("fp8", "mxfp4", "nvfp4")
InputType = Literal["int8", "fp8", "mxfp4", "nvfp4"]
Granularity = Literal["channel", "tensor", "block"]
# Rows and columns of a block with one scale.
BLOCK_SIZE = 128
# Bit widths that every version of compressed-tensors packs the same way; other widths use the next larger one.
STORED_WIDTHS = (2, 4, 8)
# Bit widths of GPTQ files from other tools.
READ_WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Codes:
    """A quantized linear: ``weight = scale * (number - zero_point)``.

    ``codes`` is int8 ``[out, in]``: integers, or the bits of E4M3 numbers. ``scale`` (storage dtype) and ``zero_point``
    (int8) are ``[out, groups]``; with a scale per tensor or block ``[1, 1]`` or ``[out / 128, in / 128]``.
    ``global_scale``, float32 ``[1]``, divides E4M3 scales. ``input_scale`` and ``input_zero_point``, ``[1]`` with the
    dtypes of the weights', define the grid of static activations; of nvfp4 inputs, ``input_scale`` is the global scale.

    Of llama.cpp's types ``scale`` and ``minimum`` are float16 ``[out, blocks]``, ``sub_scale`` (int8) and
    ``sub_minimum`` (uint8) ``[out, groups]``; a weight is ``scale * sub_scale * code - minimum * sub_minimum``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    global_scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    sub_scale: torch.Tensor | None = None
    sub_minimum: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_zero_point: torch.Tensor | None = None

    @classmethod
    def stacked(cls, parts: Sequence["Codes"]) -> "Codes":
        """Codes with scales for each row, one below the other."""
        tensors = ((part.codes, part.scale, part.zero_point) for part in parts)
        return cls(*(torch.cat(one) for one in zip(*tensors, strict=True)))

    def rows(self, index: torch.Tensor) -> "Codes":
        """The codes of the rows ``index`` (int64), with scales of their own or the one of the whole tensor."""
        rows = len(self.codes)
        known = {name: value for name, value in vars(self).items() if value is not None}
        # Copies of what rows share: safetensors refuses tensors that share memory.
        return replace(self, **{name: one[index] if len(one) == rows else one.clone() for name, one in known.items()})


@dataclass(frozen=True)
class Layout:
    """How a linear is stored.

    ``bits`` is the width of the solved codes. ``group_size`` is None for one scale per output channel, tensor or block,
    by ``granularity``. ``activations`` says whether the ranges of activations of ``input_type`` are found at run time
    ("dynamic") or stored ("static"); None without quantized activations.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    activations: Literal["dynamic", "static"] | None = None
    format: FormatName = "compressed-tensors"
    type: WeightType = "int"
    granularity: Granularity = "channel"
    input_type: InputType = "int8"

    @property
    def stored_bits(self) -> int:
        """Bit width in the file: 3 bits become 4, and 5 to 7 become 8 (ours: versions of compressed-tensors pack odd
        widths differently); GPTQ files have 3 bits."""
        widths = READ_WIDTHS if self.format == "gptq" else STORED_WIDTHS
        return next(width for width in widths if width >= self.bits)


class WeightFormat(Protocol):
    """Checkpoint format for quantized linears."""

    name: str

    def refusal(self, layout: Layout) -> str | None:
        """Why the format cannot store weights of this layout, or None."""

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        """Tensors of the linear by suffix, such as ``weight_packed``."""

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        """Inverse of ``write``."""

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        """The ``quantization_config`` block of ``config.json``.

        ``layouts`` lists the linears of each layout, ``ignored`` the unquantized linears.
        """
