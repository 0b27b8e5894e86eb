"""Quantizer grids as in compressed-tensors: ``w = scale (number - zero_point)``, the number an integer or a float."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from calibrant.kernels.number_types import E2M1, E4M3, NumberType, decoded_floats
from calibrant.quantization.block_scales import BlockScales, StoredScales

# "none" is minimum to maximum; grid_fitting.py has the searches.
RangeSearch = Literal["none", "mse", "importance", "clip", "four-over-six"]
_FLOATS = {4: E2M1, 8: E4M3}
# Scales as powers of two (OCP Microscaling), and as E4M3 numbers over one scale of the whole tensor (NVFP4).
MX_SCALE, NV_SCALE = torch.float8_e8m0fnu, torch.float8_e4m3fn
_MX_EXPONENT = 126
# A power of two is raised where a group's largest weight would be cut by more than the step below the largest number.
_MX_HEADROOM = 7 / 6


@dataclass(frozen=True)
class GridSpec:
    """A grid's kind: ``group_size`` input columns of a row share a scale, None means one scale per row.

    ``scale_dtype`` is the storage dtype of scales, to which they are rounded before anything is solved (ours), so that
    the stored model is the solved one. ``range_search`` names how ranges are chosen. ``floating`` numbers have 4 bits
    (E2M1) or 8 (E4M3) and no zero points. ``scale_rows`` rows share a scale; None: all rows of the matrix.
    ``global_scale`` divides scales of ``NV_SCALE``; ``for_weight`` sets it. With ``blocks`` scales are those of
    llama.cpp's types. With ``signed_scales`` scales of symmetric integers may be negative: those have one more code
    below 0 than above, and the largest weight of a group, of either sign, can take it.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    scale_dtype: torch.dtype
    range_search: RangeSearch = "none"
    floating: bool = False
    scale_rows: int | None = 1
    global_scale: float | None = None
    blocks: BlockScales | None = None
    signed_scales: bool = False

    @property
    def numbers(self) -> NumberType:
        """The numbers of the grid; beside minima they begin at 0."""
        if self.blocks is not None and self.blocks.minima:
            return NumberType.naturals(self.bits)
        return _FLOATS[self.bits] if self.floating else NumberType.integers(self.bits)

    @property
    def qmin(self) -> float:
        """Smallest number."""
        return self.numbers.qmin

    @property
    def qmax(self) -> float:
        """Largest number."""
        return self.numbers.qmax

    def for_weight(self, weight: torch.Tensor) -> "GridSpec":
        """The spec with the global scale of ``weight``, with which its largest group has the largest scale."""
        if self.scale_dtype is not NV_SCALE:
            return self
        largest = float(weight.abs().max())
        # In float32, as it is stored.
        scale = torch.tensor(self.qmax * E4M3.qmax / largest if largest > 0 else 1.0)
        return replace(self, global_scale=float(scale) if bool(scale.isfinite()) else 1.0)


@dataclass(frozen=True)
class Grid:
    """Fitted parameters: ``scale`` and ``zero_point``, both float32 ``[rows, groups]``.

    Zero points are integers, but for grids with minima; ``stored_scales`` are the scales of llama.cpp's types.
    """

    spec: GridSpec
    scale: torch.Tensor
    zero_point: torch.Tensor
    stored_scales: StoredScales | None = None

    @classmethod
    def of_blocks(cls, spec: GridSpec, stored: StoredScales) -> "Grid":
        """The grid of ``stored`` scales and minima."""
        scale, minimum = stored.of_groups()
        return cls(spec, scale, minimum / scale, stored)

    def rows(self, rows: slice) -> "Grid":
        """The grids of ``rows``, to solve with."""
        return Grid(self.spec, self.scale[rows], self.zero_point[rows])

    def columns(self, in_features: int) -> torch.Tensor:
        """Group index of every input column, int64 ``[in_features]``."""
        width = self.spec.group_size or in_features
        return torch.arange(in_features, device=self.scale.device) // width

    def stored(self, rows: slice) -> dict[str, torch.Tensor]:
        """What is stored of the grids of ``rows``, on the CPU: ``scale``, ``zero_point`` (int8), where the spec has one
        ``global_scale`` (float32 ``[1]``), and of llama.cpp's types the fields of ``StoredScales``.

        Rows that share a scale have one.
        """
        if self.stored_scales is not None:
            known = {name: value for name, value in vars(self.stored_scales).items() if value is not None}
            found = {name: value[rows].cpu() for name, value in known.items()}
            return {**found, "zero_point": torch.zeros(found["scale"].shape, dtype=torch.int8)}
        spec, scale, zero_point = self.spec, self.scale[rows].cpu(), self.zero_point[rows].cpu()
        step = spec.scale_rows or len(scale)
        scale, zero_point = scale[::step], zero_point[::step].to(torch.int8)
        if spec.global_scale is None:
            return {"scale": scale.to(spec.scale_dtype), "zero_point": zero_point}
        scale = (scale * spec.global_scale).to(spec.scale_dtype)
        return {"scale": scale, "zero_point": zero_point, "global_scale": torch.tensor([spec.global_scale])}


def parameters(low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of ranges that include 0; the range 0 to 0 gets scale 1 and zero point 0 (ours)."""
    scale = stored_scale((high - low) / (spec.qmax - spec.qmin), spec)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    zero_point = torch.round(torch.clamp(spec.qmin - low / scale, spec.qmin, spec.qmax))
    return scale, torch.where(high > low, zero_point, 0.0)


def stored_scale(scale: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``scale`` rounded to its storage dtype, float32; a scale that rounds to 0 becomes 1, since it is a divisor.

    Powers of two follow compressed-tensors' rule: the next one up, unless that cuts less than the lower one.
    """
    if spec.scale_dtype is MX_SCALE:
        exponent = torch.frexp(scale / _MX_HEADROOM).exponent.clamp(-_MX_EXPONENT, _MX_EXPONENT)
        return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), 1.0)
    if spec.global_scale is not None:
        least = torch.finfo(NV_SCALE).smallest_normal
        return (scale * spec.global_scale).clamp(least, E4M3.qmax).to(NV_SCALE).float() / spec.global_scale
    stored = scale.to(spec.scale_dtype).float()
    return torch.where((stored != 0) if spec.signed_scales else (stored > 0), stored, 1.0)


def trained_scale(scale: torch.Tensor, before: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``scale`` rounded to its storage dtype, float32; ``before`` where that is not finite or has another sign."""
    stored = scale.to(spec.scale_dtype).float()
    return torch.where(stored.isfinite() & (stored.sign() == before.sign()), stored, before)


def encode_groups(groups: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """The grid's numbers (float32) nearest to ``groups``; ``scale`` and ``zero_point`` broadcast to them."""
    return spec.numbers.nearest(groups / scale + zero_point)


def encode(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (int8 ``[rows, in]``, as ``NumberType.coded`` gives them) of ``weight`` ``[rows, in]``."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, grid.scale.shape[1], -1).float()
    numbers = encode_groups(groups, grid.scale[..., None], grid.zero_point[..., None], grid.spec)
    return grid.spec.numbers.codes_of(numbers.reshape(rows, columns))


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights (float32 ``[rows, in]``) of ``codes`` ``[rows, in]``."""
    rows, columns = codes.shape
    numbers = decoded_floats(codes) if grid.spec.floating else codes.float()
    groups = numbers.reshape(rows, grid.scale.shape[1], -1)
    return ((groups - grid.zero_point[..., None]) * grid.scale[..., None]).reshape(rows, columns)
