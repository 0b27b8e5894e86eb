"""SparseGPT: prune column by column with error compensation, optionally quantizing kept weights (arXiv 2301.00774)."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.column_loop import ColumnProblem, solve_columns
from calibrant.kernels.inverse_factor import NotPositiveDefiniteError
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions, Scheme
from calibrant.methods.solvers.gptq import quantization_problem
from calibrant.methods.solvers.magnitude import magnitude
from calibrant.methods.solvers.result import Solution, SolverRecord
from calibrant.methods.solvers.second_order import prepare
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.methods.solvers.support_search import search_support, searchable
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
    refine_sweeps: int = 0,
) -> Solution:
    """Prune ``weight`` ``[rows, in]`` on the inputs' ``hessian`` ``sum x x^T`` ``[in, in]`` (both float32).

    Unstructured sparsity p removes exactly ``floor(p n)`` of the n weights in every block of 128 columns of every
    matrix; ``segments`` are the row counts of matrices stacked by rows (empty: one matrix). An n:m mask is chosen on
    the compensated weights at the first column of each group of m. With ``spec`` the kept weights are quantized in the
    same loop, on grids fitted to the original weight (ours: groups; the released code has one grid per row).
    ``refine_sweeps`` sweeps of ``search_support`` follow, without ``spec`` only. If the
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
    if grid is not None:
        return Solution(solved.weight, solved.codes, grid, solved.kept, record=record)
    found = Solution(solved.weight, kept=solved.kept, record=record)
    if not refine_sweeps:
        return found
    # As the factor's: columns without input count as 1 before damping.
    damped = hessian.clone()
    damped.diagonal()[prepared.dead] = 1.0
    damped.diagonal().add_(prepared.damping * damped.diagonal().mean())
    return search_support(alive, found, damped, sparsity, refine_sweeps, segments)


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
    """SparseGPT; it also quantizes if the scheme has weights.

    ``refine_sweeps`` sweeps of coordinate descent, which choose zeros and values anew, follow.
    """

    name: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(default=0.01, gt=0, le=100)
    refine_sweeps: int = Field(default=0, ge=0, le=1000)

    def refusal(self, scheme: Scheme) -> str | None:
        if not self.refine_sweeps:
            return None
        if scheme.weights is not None:
            return "refine_sweeps of sparsegpt choose zeros, not codes: leave the key out, or weights"
        if not searchable(Sparsity.of_text(str(scheme.sparsity))):
            return f"refine_sweeps know patterns in groups of 2, 4 and 8, not {scheme.sparsity}: leave the key out"
        return None


def _solve(options: SparseGpt, problem: LayerProblem) -> Solution:
    return sparsegpt(
        problem.weight,
        problem.full_hessian,
        problem.pattern,
        problem.spec,
        segments=problem.segments,
        damping=options.damping,
        refine_sweeps=options.refine_sweeps,
    )


def _without_data(problem: LayerProblem) -> Solution:
    identity = torch.eye(problem.weight.shape[1], device=problem.weight.device)
    return sparsegpt(problem.weight, identity, problem.pattern, problem.spec, segments=problem.segments)


SPARSEGPT = LayerSolver(
    SparseGpt,
    _solve,
    _without_data,
    Hessian,
    prunes=True,
    floats=True,
    # A sweep also costs a matrix product, and without a pattern the search of a threshold.
    passes=lambda options: 0.5 + 1.5 * options.refine_sweeps,
)
