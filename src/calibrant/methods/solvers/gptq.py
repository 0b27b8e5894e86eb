"""GPTQ: quantize column by column, compensating each error in the columns not yet quantized (arXiv 2210.17323)."""

from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.column_loop import ColumnProblem, solve_columns
from calibrant.kernels.grid_rounding import round_to_grid
from calibrant.kernels.inverse_factor import NotPositiveDefiniteError
from calibrant.kernels.row_tiles import row_chunks
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions, Scheme
from calibrant.methods.solvers.quantease import descend
from calibrant.methods.solvers.result import Solution, SolverRecord, keep_rounded_rows
from calibrant.methods.solvers.rtn import round_layer
from calibrant.methods.solvers.scale_refit import refit_scales
from calibrant.methods.solvers.second_order import Prepared, prepare, undo
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import Grid, GridSpec, decode
from calibrant.quantization.statistics import Hessian


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: GridSpec,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    refine_sweeps: int = 0,
    scale_refits: int = 0,
) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` on the inputs' ``hessian`` ``sum x x^T`` ``[in, in]`` (both float32).

    Groups are static: every grid is fitted to the original weight, so ``act_order``, which solves columns by descending
    Hessian diagonal, keeps groups contiguous. ``refine_sweeps`` sweeps of coordinate descent (arXiv 2309.01885) follow
    on the damped Hessian; none of them raises the error on it. Then ``scale_refits`` times scales are fitted to the
    codes (``refit_scales``) and the sweeps repeated. A row with a larger error on ``hessian`` than
    round-to-nearest on the same grid is rounded to nearest instead (ours); the record counts such rows. If the Hessian
    cannot be factored at any damping, the whole layer is rounded to nearest and the record says so.
    """
    grid = fit_grid(weight, spec, hessian)
    try:
        prepared = prepare(hessian, damping, act_order)
    except NotPositiveDefiniteError:
        codes, values = round_to_grid(weight, grid.scale, grid.zero_point, spec.numbers)
        record = SolverRecord(fallback="Hessian not positive definite, rounded to nearest")
        return Solution(values, codes, grid, record=record)
    record = SolverRecord(prepared.damping, prepared.damping > damping, prepared.dead_columns)
    values, codes = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.int8)
    for rows in row_chunks(weight):
        solved = solve_columns(quantization_problem(prepared.ordered(weight[rows]), prepared, grid.rows(rows)))
        values[rows], codes[rows] = undo(prepared.order, solved.weight), undo(prepared.order, solved.codes)
    used = prepared.damping
    del prepared  # the factor is as large as the Hessian
    sweeps = [False] * refine_sweeps
    if refine_sweeps:
        _refine(weight, values, codes, hessian, grid, sweeps, used)
    for _ in range(scale_refits):
        grid = _with_fitted_scales(weight, values, codes, hessian, grid, used)
        if refine_sweeps:
            _refine(weight, values, codes, hessian, grid, sweeps, used)
    return keep_rounded_rows(weight, values, codes, grid, hessian, record)


def _refine(
    weight: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    sweeps: list[bool],
    damping: float,
) -> None:
    """Change ``values`` and ``codes`` by coordinate descent, in place."""
    for rows in row_chunks(weight):
        start, own = values[rows], grid.rows(rows)
        values[rows], codes[rows] = descend(weight[rows], start, hessian, own, sweeps, damping=damping)


def _with_fitted_scales(
    weight: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    damping: float,
) -> Grid:
    """``grid`` with scales fitted to ``codes`` on the damped ``hessian``; changes ``values`` in place."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    grid, _ = refit_scales(weight, codes, damped, grid)
    for rows in row_chunks(weight):
        values[rows] = decode(codes[rows], grid.rows(rows))
    return grid


def quantization_problem(weight: torch.Tensor, prepared: Prepared, grid: Grid) -> ColumnProblem:
    """The column problem of quantizing to ``grid``; each column has the grid of its group in the original order.

    ``weight`` float32 ``[rows, in]`` has its columns already in solving order.
    """
    return ColumnProblem(
        weight,
        prepared.factor,
        scale=grid.scale,
        zero_point=grid.zero_point,
        group=grid.columns(weight.shape[1])[prepared.order],
        numbers=grid.spec.numbers,
    )


class Gptq(MethodOptions):
    """GPTQ.

    ``damping`` is relative to the mean of the Hessian's diagonal; ``refine_sweeps`` sweeps of coordinate descent
    follow, and ``scale_refits`` times scales are fitted to the codes and the sweeps repeated.
    """

    name: Literal["gptq"] = "gptq"
    damping: float = Field(default=0.01, gt=0, le=100)
    act_order: bool = True
    refine_sweeps: int = Field(default=0, ge=0)
    scale_refits: int = Field(default=0, ge=0, le=20)

    def refusal(self, scheme: Scheme) -> str | None:
        if self.scale_refits and scheme.weights is not None and scheme.weights.type != "int":
            return f"scale_refits are for integers, not for {scheme.weights.type}: leave the key out"
        return None


def _solve(options: Gptq, problem: LayerProblem) -> Solution:
    return gptq(problem.weight, problem.full_hessian, problem.grid_spec, **options.model_dump(exclude={"name"}))


GPTQ = LayerSolver(
    Gptq,
    _solve,
    round_layer,
    Hessian,
    floats=True,
    passes=lambda options: 0.5 + options.refine_sweeps * (1 + options.scale_refits) + 0.2 * options.scale_refits,
    by_rows=lambda _: True,
)
