"""Round-to-nearest: every group on its own grid (methods.md §6)."""

from typing import Literal

import torch

from calibrant.compression.grid_fitting import fit_grid
from calibrant.compression.grids import GridSpec
from calibrant.compression.solvers.method import Method, MethodOptions, Task
from calibrant.compression.solvers.result import Solution
from calibrant.kernels.grid_rounding import round_to_grid


def rtn(weight: torch.Tensor, spec: GridSpec, moments: torch.Tensor | None = None) -> Solution:
    """Round ``weight`` ``[rows, in]`` (float32); ``moments`` of the inputs are for range searches that use them."""
    grid = fit_grid(weight, spec, moments)
    codes, values = round_to_grid(weight, grid.scale, grid.zero, spec.lowest, spec.highest)
    return Solution(values, codes, grid)


class Rtn(MethodOptions):
    """Round-to-nearest; no data but what a range search looks at."""

    name: Literal["rtn"] = "rtn"


def round_task(task: Task) -> Solution:
    """Round-to-nearest of a task's weights."""
    return rtn(task.weight, task.grid_spec, task.moments)


RTN = Method(Rtn, lambda _, task: round_task(task), round_task)
