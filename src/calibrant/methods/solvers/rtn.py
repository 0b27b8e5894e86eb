"""Round-to-nearest, the control without data (docs/methods.md "round-to-nearest")."""

from typing import Literal

import torch

from calibrant.kernels.grid_rounding import round_to_grid
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import GridSpec


def rtn(weight: torch.Tensor, spec: GridSpec, hessian: torch.Tensor | None = None) -> Solution:
    """Round ``weight`` ``[rows, in]`` (float32) to the nearest grid points.

    ``hessian`` ``[in, in]``, or its diagonal ``[in]``, is for range searches that use it (``fit_grid``).
    """
    grid = fit_grid(weight, spec, hessian)
    codes, values = round_to_grid(weight, grid.scale, grid.zero_point, spec.numbers)
    return Solution(values, codes, grid)


class Rtn(MethodOptions):
    """Round-to-nearest; only a range search uses data."""

    name: Literal["rtn"] = "rtn"


def round_layer(problem: LayerProblem) -> Solution:
    """Round-to-nearest of a problem's weight, also for layers that saw no token."""
    return rtn(problem.weight, problem.grid_spec, problem.hessian_or_diagonal)


RTN = LayerSolver(Rtn, lambda _, problem: round_layer(problem), round_layer, floats=True)
