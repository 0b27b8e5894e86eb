"""GPTQ: quantize column by column, compensating each error in the columns not yet quantized (arXiv 2210.17323)."""

import torch

from calibrant.compression.grids import Grid, GridSpec
from calibrant.compression.solvers.result import Solution, SolverRecord, layer_errors
from calibrant.compression.solvers.rtn import rtn
from calibrant.compression.solvers.second_order import prepare, undo
from calibrant.kernels.column_loop import BLOCK_SIZE, ColumnProblem, solve_columns
from calibrant.kernels.inverse_factor import NotPositiveDefiniteError


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: GridSpec,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = BLOCK_SIZE,
    compiled: bool = True,
) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` for inputs of second moment ``hessian`` ``[in, in]`` (both float32).

    Static groups: every grid is fitted on the original weight, so ``act_order`` keeps groups contiguous and
    ``block_size`` only changes speed (methods.md §7). A row whose error on ``hessian`` comes out above
    round-to-nearest's on the same grid keeps round-to-nearest (ours; rows are independent), counted in the record.
    If no damping makes the Hessian factor, the whole layer is rounded to nearest and the record says so.
    """
    rounded = rtn(weight, spec, hessian)
    codes_of_rounding, grid = rounded.codes, rounded.grid
    assert codes_of_rounding is not None
    assert grid is not None
    try:
        prepared = prepare(weight, hessian, damping, act_order)
    except NotPositiveDefiniteError:
        record = SolverRecord(fallback="Hessian not positive definite, rounded to nearest")
        return Solution(rounded.weight, rounded.codes, rounded.grid, record=record)
    problem = quantization_problem(prepared.weight, prepared.factor, prepared.order, grid)
    solved = solve_columns(problem, block_size, compiled)
    values, codes = undo(prepared.order, solved.weight), undo(prepared.order, solved.codes)
    errors = layer_errors(weight, values, hessian)
    rounded_errors = layer_errors(weight, rounded.weight, hessian)
    worse = errors > rounded_errors
    values[worse], codes[worse] = rounded.weight[worse], codes_of_rounding[worse]
    errors = torch.minimum(errors, rounded_errors)
    record = SolverRecord(prepared.damping, prepared.damping > damping, prepared.dead_columns, int(worse.sum()))
    return Solution(values, codes, grid, errors=errors, rounded=worse, record=record)


def quantization_problem(weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, grid: Grid) -> ColumnProblem:
    """The column problem of a grid: columns in solving ``order``, each with the grid of its original group."""
    return ColumnProblem(
        weight,
        factor,
        scale=grid.scale,
        zero=grid.zero,
        group=grid.columns(weight.shape[1])[order],
        lowest=grid.spec.lowest,
        highest=grid.spec.highest,
    )
