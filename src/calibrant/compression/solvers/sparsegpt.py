"""SparseGPT: prune column by column with error compensation, optionally quantizing what stays (arXiv 2301.00774)."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from calibrant.compression.grid_fitting import fit_grid
from calibrant.compression.grids import GridSpec, decode, encode
from calibrant.compression.solvers.gptq import quantization_problem
from calibrant.compression.solvers.magnitude import magnitude
from calibrant.compression.solvers.method import Method, MethodOptions, Task
from calibrant.compression.solvers.result import Solution, SolverRecord
from calibrant.compression.solvers.second_order import prepare, undo
from calibrant.compression.solvers.sparsity import Sparsity
from calibrant.compression.statistics import Hessian
from calibrant.kernels.column_loop import BLOCK_SIZE, ColumnProblem, solve_columns
from calibrant.kernels.inverse_factor import NotPositiveDefiniteError


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
    pattern = (sparsity.pruned, sparsity.of) if sparsity.structured else None
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


def _solve(options: SparseGpt, task: Task) -> Solution:
    return sparsegpt(
        task.weight, task.full_moments, task.pattern, task.spec, segments=task.segments, damping=options.damping
    )


def _without_data(task: Task) -> Solution:
    identity = torch.eye(task.weight.shape[1], device=task.weight.device)
    return sparsegpt(task.weight, identity, task.pattern, task.spec, segments=task.segments)


SPARSEGPT = Method(SparseGpt, _solve, _without_data, Hessian, prunes=True, passes=lambda _: 0.5)
