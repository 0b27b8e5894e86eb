"""SparseGPT: prune column by column with error compensation, optionally quantizing what stays (arXiv 2301.00774)."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.column_loop import BLOCK_SIZE, ColumnProblem, solve_columns
from calibrant.kernels.inverse_factor import NotPositiveDefiniteError
from calibrant.methods.method import LayerProblem, Method, MethodOptions
from calibrant.methods.solvers.gptq import quantization_problem
from calibrant.methods.solvers.magnitude import magnitude
from calibrant.methods.solvers.result import Solution, SolverRecord
from calibrant.methods.solvers.second_order import prepare, undo
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
    block_size: int = BLOCK_SIZE,
    compiled: bool = True,
) -> Solution:
    """Prune ``weight`` ``[rows, in]`` for inputs of second moment ``hessian`` ``[in, in]`` (both float32).

    Unstructured: exactly ``floor(p n)`` weights of every block of ``block_size`` columns, over the rows of each of
    ``segments`` (matrices stacked by rows; none means one), so the block size is part of the method. n:m: chosen on
    the compensated weights at each group's first column. With ``spec`` the kept weights are quantized in the same
    loop on grids fitted to the original weight (ours: groups; the reference has one grid a row). If no damping makes
    the Hessian factor, the layer is pruned by magnitude (and rounded), and the record says so.
    """
    try:
        prepared = prepare(weight, hessian, damping, act_order=False)
    except NotPositiveDefiniteError:
        return _by_magnitude(weight, sparsity, spec, segments)
    grid = fit_grid(weight, spec, hessian) if spec is not None else None
    problem = ColumnProblem(prepared.weight, prepared.factor)
    if grid is not None:
        problem = quantization_problem(prepared.weight, prepared.factor, prepared.order, grid)
    pattern = (sparsity.pruned, sparsity.of) if sparsity.semi_structured else None
    share = 0.0 if pattern else sparsity.share
    problem = replace(problem, pruned_of=pattern, sparsity=share, segments=segments)
    solved = solve_columns(problem, block_size, compiled)
    record = SolverRecord(prepared.damping, prepared.damping > damping, prepared.dead_columns)
    codes = undo(prepared.order, solved.codes) if grid is not None else None
    kept = undo(prepared.order, solved.kept)
    return Solution(undo(prepared.order, solved.weight), codes, grid, kept, record=record)


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
    """SparseGPT; with weights in the scheme also quantizes."""

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


SPARSEGPT = Method(SparseGpt, _solve, _without_data, Hessian, prunes=True, passes=lambda _: 0.5)
