"""Uniform quantizer grids: signed codes, ``w = scale * (code - zero_point)`` (methods.md §4, the compressed-tensors grid)."""

from dataclasses import dataclass
from typing import Literal

import torch

# How a group's range is chosen: minimum and maximum, or by a search (grid_fitting.py).
RangeSearch = Literal["none", "mse", "importance", "clip"]


@dataclass(frozen=True)
class GridSpec:
    """Which grid: ``group_size`` input columns share a scale, None means one scale a row.

    ``scale_dtype`` is what scales are stored in; they are rounded to it before anything is solved (methods.md §3.7).
    ``range_search`` names how ranges are chosen.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    scale_dtype: torch.dtype
    range_search: RangeSearch = "none"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Grid:
    """Fitted parameters: ``scale`` and ``zero_point``, both ``[rows, groups]`` float32; the zero points are whole numbers."""

    spec: GridSpec
    scale: torch.Tensor
    zero_point: torch.Tensor

    def columns(self, in_features: int) -> torch.Tensor:
        """Group index of every input column, int64 ``[in_features]``."""
        width = self.spec.group_size or in_features
        return torch.arange(in_features, device=self.scale.device) // width


def parameters(low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of ranges that hold 0; a range of nothing gets scale 1 and zero point 0 (ours)."""
    scale = stored_scale((high - low) / (spec.qmax - spec.qmin), spec)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    zero_point = torch.round(torch.clamp(spec.qmin - low / scale, spec.qmin, spec.qmax))
    return scale, torch.where(high > low, zero_point, 0.0)


def stored_scale(scale: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``scale`` as its storage dtype holds it; what would be stored as 0, and divide by it, becomes 1."""
    stored = scale.to(spec.scale_dtype).float()
    return torch.where(stored > 0, stored, 1.0)


def encode_groups(groups: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Codes, as float32, of ``groups`` with ``scale`` and ``zero_point`` that broadcast to them."""
    return torch.round(torch.clamp(groups / scale + zero_point, spec.qmin, spec.qmax))


def encode(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (int8 ``[rows, in]``) of ``weight``: round half to even, after clamping."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, grid.scale.shape[1], -1).float()
    codes = encode_groups(groups, grid.scale[..., None], grid.zero_point[..., None], grid.spec)
    return codes.reshape(rows, columns).to(torch.int8)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights (float32 ``[rows, in]``) of codes."""
    rows, columns = codes.shape
    groups = codes.reshape(rows, grid.scale.shape[1], -1).float()
    return ((groups - grid.zero_point[..., None]) * grid.scale[..., None]).reshape(rows, columns)
