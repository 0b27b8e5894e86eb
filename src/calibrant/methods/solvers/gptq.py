"""GPTQ: quantize column by column, compensating each error in the columns not yet quantized (arXiv 2210.17323)."""

from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.column_loop import ColumnProblem, solve_columns
from calibrant.kernels.inverse_factor import NotPositiveDefiniteError
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.quantease import descend
from calibrant.methods.solvers.result import Solution, SolverRecord, keep_rounded_rows
from calibrant.methods.solvers.rtn import round_layer, rtn
from calibrant.methods.solvers.second_order import damped, prepare, undo
from calibrant.quantization.grids import Grid, GridSpec
from calibrant.quantization.statistics import Hessian


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: GridSpec,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    refine_sweeps: int = 0,
) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` on the inputs' ``hessian`` ``sum x x^T`` ``[in, in]`` (both float32).

    Groups are static: every grid is fitted to the original weight, so ``act_order``, which solves columns by descending
    Hessian diagonal, keeps groups contiguous. ``refine_sweeps`` sweeps of coordinate descent (arXiv 2309.01885) follow
    on the damped Hessian; none of them raises the error on it. A row with a larger error on ``hessian`` than
    round-to-nearest on the same grid is rounded to nearest instead (ours); the record counts such rows. If the Hessian
    cannot be factored at any damping, the whole layer is rounded to nearest and the record says so.
    """
    rounded = rtn(weight, spec, hessian)
    grid = rounded.grid
    assert grid is not None
    try:
        prepared = prepare(weight, hessian, damping, act_order)
    except NotPositiveDefiniteError:
        record = SolverRecord(fallback="Hessian not positive definite, rounded to nearest")
        return Solution(rounded.weight, rounded.codes, rounded.grid, record=record)
    problem = quantization_problem(prepared.weight, prepared.factor, prepared.order, grid)
    solved = solve_columns(problem)
    values, codes = undo(prepared.order, solved.weight), undo(prepared.order, solved.codes)
    if refine_sweeps:
        values, codes = descend(weight, values, damped(hessian, prepared.damping), grid, [False] * refine_sweeps)
    record = SolverRecord(prepared.damping, prepared.damping > damping, prepared.dead_columns)
    return keep_rounded_rows(weight, values, codes, rounded, hessian, record)


def quantization_problem(weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, grid: Grid) -> ColumnProblem:
    """The column problem of quantizing to ``grid``; each column has the grid of its group in the original order.

    ``weight`` ``[rows, in]`` and the upper ``factor`` ``[in, in]`` are float32 with columns already in ``order``.
    """
    return ColumnProblem(
        weight,
        factor,
        scale=grid.scale,
        zero_point=grid.zero_point,
        group=grid.columns(weight.shape[1])[order],
        numbers=grid.spec.numbers,
    )


class Gptq(MethodOptions):
    """GPTQ.

    ``damping`` is relative to the mean of the Hessian's diagonal; ``refine_sweeps`` sweeps of coordinate descent
    follow.
    """

    name: Literal["gptq"] = "gptq"
    damping: float = Field(default=0.01, gt=0, le=100)
    act_order: bool = True
    refine_sweeps: int = Field(default=0, ge=0)


def _solve(options: Gptq, problem: LayerProblem) -> Solution:
    return gptq(problem.weight, problem.full_hessian, problem.grid_spec, **options.model_dump(exclude={"name"}))


GPTQ = LayerSolver(Gptq, _solve, round_layer, Hessian, floats=True, passes=lambda options: 0.5 + options.refine_sweeps)
