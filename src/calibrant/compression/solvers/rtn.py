"""Round-to-nearest: every group on its own grid, no data (methods.md §6)."""

import torch

from calibrant.compression.grids import GridSpec, decode, encode, fit_grid
from calibrant.compression.solvers.result import Solution


def rtn(weight: torch.Tensor, spec: GridSpec) -> Solution:
    """Round ``weight`` ``[rows, in]`` (float32)."""
    grid = fit_grid(weight, spec)
    codes = encode(weight, grid)
    return Solution(decode(codes, grid), codes, grid)
