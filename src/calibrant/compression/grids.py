"""Uniform quantizer grids: signed codes, ``w = scale * (code - zero)`` (methods.md §4, the compressed-tensors grid)."""

from dataclasses import dataclass

import torch

# methods.md §4, "MSE scale search": the settings of the GPTQ reference.
_SEARCH_STEPS = 80
_SEARCH_POINTS = 100
_SEARCH_NORM = 2.4


@dataclass(frozen=True)
class GridSpec:
    """Which grid: ``group_size`` input columns share a scale, None means one scale a row.

    ``scale_dtype`` is what scales are stored in; they are rounded to it before anything is solved (methods.md §3.7).
    ``mse_search`` shrinks each range to the one of least error instead of taking minimum and maximum.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    scale_dtype: torch.dtype
    mse_search: bool = False

    @property
    def lowest(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Grid:
    """Fitted parameters: ``scale`` and ``zero``, both ``[rows, groups]`` float32; zero holds whole numbers."""

    spec: GridSpec
    scale: torch.Tensor
    zero: torch.Tensor

    def columns(self, in_features: int) -> torch.Tensor:
        """Group index of every input column, int64 ``[in_features]``."""
        width = self.spec.group_size or in_features
        return torch.arange(in_features, device=self.scale.device) // width


def fit_grid(weight: torch.Tensor, spec: GridSpec) -> Grid:
    """Fit the grid of every group of ``weight`` ``[rows, in]`` (float32), ``in`` a multiple of the group size.

    The range always contains 0, so 0.0 is representable. A group of zeros gets scale 1 and zero 0 (ours).
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, spec.group_size or columns).float()
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = _parameters(low, high, spec)
    if spec.mse_search:
        scale, zero = _search(groups, low, high, scale, zero, spec)
    return Grid(spec, scale, zero)


def _parameters(low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (high - low) / (spec.highest - spec.lowest)
    scale = scale.to(spec.scale_dtype).float()
    # A range below the storage type's smallest number would be stored as 0 and divide by it.
    scale = torch.where(scale > 0, scale, 1.0)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    zero = torch.round(torch.clamp(spec.lowest - low / scale, spec.lowest, spec.highest))
    return scale, torch.where(high > low, zero, 0.0)


def _search(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GridSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shrink every range by 1 %, 2 %, ... 79 % and keep the first of least error; never worse than min-max."""
    best = _error(groups, scale, zero, spec)
    for step in range(1, _SEARCH_STEPS):
        share = 1 - step / _SEARCH_POINTS
        tried_scale, tried_zero = _parameters(low * share, high * share, spec)
        error = _error(groups, tried_scale, tried_zero, spec)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
    return scale, zero


def _error(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    codes = _encode(groups, scale[..., None], zero[..., None], spec)
    return (((codes - zero[..., None]) * scale[..., None] - groups).abs() ** _SEARCH_NORM).sum(-1)


def _encode(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    return torch.round(torch.clamp(weight / scale + zero, spec.lowest, spec.highest))


def encode(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (int8 ``[rows, in]``) of ``weight``: round half to even, after clamping."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, grid.scale.shape[1], -1).float()
    codes = _encode(groups, grid.scale[..., None], grid.zero[..., None], grid.spec)
    return codes.reshape(rows, columns).to(torch.int8)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights (float32 ``[rows, in]``) of codes."""
    rows, columns = codes.shape
    groups = codes.reshape(rows, grid.scale.shape[1], -1).float()
    return ((groups - grid.zero[..., None]) * grid.scale[..., None]).reshape(rows, columns)
