"""SparseGPT: prune column by column with error compensation, optionally quantizing kept weights (arXiv 2301.00774)."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.column_loop import ColumnProblem, solve_columns
from calibrant.kernels.inverse_factor import NotPositiveDefiniteError
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.gptq import quantization_problem
from calibrant.methods.solvers.magnitude import magnitude
from calibrant.methods.solvers.result import Solution, SolverRecord
from calibrant.methods.solvers.second_order import prepare
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import GridSpec, decode, encode
from calibrant.quantization.statistics import Hessian


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: Sparsity,
    spec: GridSpec | None = None,
    *,
    segments: tuple[int, ...] = (),
    damping: float = 0.01,
) -> Solution:
    """Prune ``weight`` ``[rows, in]`` on the inputs' ``hessian`` ``sum x x^T`` ``[in, in]`` (both float32).

    Unstructured sparsity p removes exactly ``floor(p n)`` of the n weights in every block of 128 columns of every
    matrix; ``segments`` are the row counts of matrices stacked by rows (empty: one matrix). An n:m mask is chosen on
    the compensated weights at the first column of each group of m. With ``spec`` the kept weights are quantized in the
    same loop, on grids fitted to the original weight (ours: groups; the released code has one grid per row). If the
    Hessian cannot be factored at any damping, the layer is pruned by magnitude (and rounded), and the record says so.
    """
    try:
        prepared = prepare(hessian, damping, act_order=False)
    except NotPositiveDefiniteError:
        return _by_magnitude(weight, sparsity, spec, segments)
    grid = fit_grid(weight, spec, hessian) if spec is not None else None
    alive = prepared.ordered(weight)
    problem = ColumnProblem(alive, prepared.factor)
    if grid is not None:
        problem = quantization_problem(alive, prepared, grid)
    pattern = (sparsity.pruned, sparsity.of) if sparsity.semi_structured else None
    share = 0.0 if pattern else sparsity.share
    problem = replace(problem, pruned_of=pattern, sparsity=share, segments=segments)
    solved = solve_columns(problem)
    record = SolverRecord(prepared.damping, prepared.damping > damping, prepared.dead_columns)
    return Solution(solved.weight, solved.codes if grid is not None else None, grid, solved.kept, record=record)


def _by_magnitude(
    weight: torch.Tensor, sparsity: Sparsity, spec: GridSpec | None, segments: tuple[int, ...]
) -> Solution:
    record = SolverRecord(fallback="Hessian not positive definite, pruned by magnitude")
    pruned = magnitude(weight, sparsity, segments)
    if spec is None:
        return replace(pruned, record=record)
    grid = fit_grid(weight, spec)
    codes = encode(pruned.weight, grid)
    return Solution(decode(codes, grid), codes, grid, pruned.kept, record=record)


class SparseGpt(MethodOptions):
    """SparseGPT; it also quantizes if the scheme has weights."""

    name: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(default=0.01, gt=0, le=100)


def _solve(options: SparseGpt, problem: LayerProblem) -> Solution:
    return sparsegpt(
        problem.weight,
        problem.full_hessian,
        problem.pattern,
        problem.spec,
        segments=problem.segments,
        damping=options.damping,
    )


def _without_data(problem: LayerProblem) -> Solution:
    identity = torch.eye(problem.weight.shape[1], device=problem.weight.device)
    return sparsegpt(problem.weight, identity, problem.pattern, problem.spec, segments=problem.segments)


SPARSEGPT = LayerSolver(SparseGpt, _solve, _without_data, Hessian, prunes=True, floats=True, passes=lambda _: 0.5)
