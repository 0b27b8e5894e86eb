"""Uniform quantizer grids as in compressed-tensors: signed codes, ``w = scale (code - zero_point)``."""

from dataclasses import dataclass
from typing import Literal

import torch

# "none" is minimum to maximum; grid_fitting.py has the searches.
RangeSearch = Literal["none", "mse", "importance", "clip"]


@dataclass(frozen=True)
class GridSpec:
    """A grid's kind: ``group_size`` input columns of a row share a scale, None means one scale per row.

    ``scale_dtype`` is the storage dtype of scales, to which they are rounded before anything is solved (ours), so that
    the stored model is the solved one. ``range_search`` names how ranges are chosen.
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
    """Fitted parameters: ``scale`` and ``zero_point``, both float32 ``[rows, groups]``; zero points are integers."""

    spec: GridSpec
    scale: torch.Tensor
    zero_point: torch.Tensor

    def columns(self, in_features: int) -> torch.Tensor:
        """Group index of every input column, int64 ``[in_features]``."""
        width = self.spec.group_size or in_features
        return torch.arange(in_features, device=self.scale.device) // width


def parameters(low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of ranges that include 0; the range 0 to 0 gets scale 1 and zero point 0 (ours)."""
    scale = stored_scale((high - low) / (spec.qmax - spec.qmin), spec)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    zero_point = torch.round(torch.clamp(spec.qmin - low / scale, spec.qmin, spec.qmax))
    return scale, torch.where(high > low, zero_point, 0.0)


def stored_scale(scale: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``scale`` rounded to its storage dtype, float32; a scale that rounds to 0 becomes 1, since it is a divisor."""
    stored = scale.to(spec.scale_dtype).float()
    return torch.where(stored > 0, stored, 1.0)


def encode_groups(groups: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Codes, as float32, of ``groups``; ``scale`` and ``zero_point`` broadcast to them."""
    return torch.round(torch.clamp(groups / scale + zero_point, spec.qmin, spec.qmax))


def encode(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (int8 ``[rows, in]``) of ``weight`` ``[rows, in]``, clamped, then rounded half to even."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, grid.scale.shape[1], -1).float()
    codes = encode_groups(groups, grid.scale[..., None], grid.zero_point[..., None], grid.spec)
    return codes.reshape(rows, columns).to(torch.int8)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights (float32 ``[rows, in]``) of ``codes`` ``[rows, in]``."""
    rows, columns = codes.shape
    groups = codes.reshape(rows, grid.scale.shape[1], -1).float()
    return ((groups - grid.zero_point[..., None]) * grid.scale[..., None]).reshape(rows, columns)
