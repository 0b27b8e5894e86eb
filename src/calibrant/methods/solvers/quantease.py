"""QuantEase: cyclic coordinate descent on a layer's squared output error (arXiv 2309.01885)."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.coordinate_descent import sweep
from calibrant.kernels.inverse_factor import reordered
from calibrant.kernels.masks import largest
from calibrant.kernels.row_tiles import row_chunks
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution, SolverRecord, keep_rounded_rows
from calibrant.methods.solvers.rtn import round_layer
from calibrant.methods.solvers.second_order import undo
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import Grid, GridSpec, decode, encode
from calibrant.quantization.statistics import Hessian

# As in the released code, every third sweep may leave the grid, except late sweeps and the last.
_RELAXED_EVERY = 3
_RELAXED_UNTIL = 25


def quantease(
    weight: torch.Tensor, hessian: torch.Tensor, spec: GridSpec, *, sweeps: int = 30, damping: float = 0.0
) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` on the inputs' ``hessian`` ``sum x x^T`` ``[in, in]`` (both float32).

    The descent starts from the unrounded weights and has the relaxed sweeps of the released code; grids are fitted to
    the weights. ``damping``, as in GPTQ, keeps weights near their original values where inputs carry little (ours; the
    paper has none). A row with a larger error than round-to-nearest's is rounded to nearest instead (ours); the record
    counts such rows.
    """
    grid = fit_grid(weight, spec, hessian)
    last = sweeps - 1
    relaxed = [n % _RELAXED_EVERY == 1 and n <= _RELAXED_UNTIL and n != last for n in range(sweeps)]
    values, codes = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.int8)
    for rows in row_chunks(weight):
        own = weight[rows]
        values[rows], codes[rows] = descend(own, own, hessian, grid.rows(rows), relaxed, damping=damping)
    dead = int((hessian.diagonal() == 0).sum())
    return keep_rounded_rows(weight, values, codes, grid, hessian, SolverRecord(dead_columns=dead))


def descend(
    target: torch.Tensor,
    start: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    relaxed: Sequence[bool],
    *,
    damping: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (float32) and codes (int8), both ``[rows, in]``, after one sweep per entry of ``relaxed``.

    ``target`` and ``start`` are ``[rows, in]``; ``damping`` times the mean of the diagonal is added to the diagonal of
    ``hessian`` ``[in, in]``, and a sweep visits columns by descending diagonal. A relaxed sweep moves columns off the
    grid. From a ``start`` on the grid, other sweeps never raise the error. Columns without input are rounded to
    nearest.
    """
    diagonal = hessian.diagonal() + damping * hessian.diagonal().mean()
    order = torch.argsort(diagonal, descending=True, stable=True)
    hessian = reordered(hessian, order)
    hessian.diagonal().copy_(torch.where(diagonal > 0, diagonal, 1.0)[order])
    wanted, values = target.index_select(1, order), start.index_select(1, order)
    group = grid.columns(target.shape[1])[order]
    codes = torch.zeros_like(values, dtype=torch.int8)
    for relax in relaxed:
        values, codes = sweep(wanted, values, hessian, grid.scale, grid.zero_point, group, grid.spec.numbers, relax)
    return undo(order, values), undo(order, codes)


def quantease_with_outliers(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: GridSpec,
    *,
    sweeps: int = 30,
    share: float = 0.01,
    segments: tuple[int, ...] = (),
) -> Solution:
    """``W = B + O``: B on a grid, O exact with ``round(share n)`` nonzero entries per matrix of n weights.

    ``segments`` are the row counts of matrices stacked by rows (empty: one matrix). Follows the paper's equations (the
    released code of this variant does not run): sweeps for B against ``W - O`` alternate with gradient steps
    ``G / lambda_max`` for O that keep its largest entries. The grids are fitted to the weights without the initial
    outliers. The result is dense.
    """
    runs = list(segments or (len(weight),))
    outliers = weight * largest(weight, share, runs)
    grid = fit_grid(weight - outliers, spec, hessian)
    base = decode(encode(weight - outliers, grid), grid)
    steepest = torch.linalg.eigvalsh(hessian)[-1].clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(sweeps):
        base, _ = descend(weight - outliers, base, hessian, grid, [False])
        gradient = (base + outliers - weight) @ hessian
        step = outliers - gradient / steepest
        outliers = step * largest(step, share, runs)
    base, _ = descend(weight - outliers, base, hessian, grid, [False])
    record = SolverRecord(dead_columns=int((hessian.diagonal() == 0).sum()), outliers=int((outliers != 0).sum()))
    return Solution(base + outliers, outliers=outliers != 0, record=record)


class QuantEase(MethodOptions):
    """QuantEase; ``outliers`` is a share of weights to keep exact: stored dense, with a separate list of them."""

    name: Literal["quantease"] = "quantease"
    sweeps: int = Field(default=30, ge=1)
    damping: float = Field(default=0.0, ge=0, le=100)
    outliers: float = Field(default=0.0, ge=0, lt=1)


def _solve(options: QuantEase, problem: LayerProblem) -> Solution:
    weight, hessian, spec = problem.weight, problem.full_hessian, problem.grid_spec
    if not options.outliers:
        return quantease(weight, hessian, spec, sweeps=options.sweeps, damping=options.damping)
    hessian = hessian.clone()
    hessian.diagonal().add_(options.damping * hessian.diagonal().mean())
    return quantease_with_outliers(
        weight, hessian, spec, sweeps=options.sweeps, share=options.outliers, segments=problem.segments
    )


QUANTEASE = LayerSolver(
    QuantEase,
    _solve,
    round_layer,
    Hessian,
    floats=True,
    stored_dense=lambda options: options.outliers > 0,
    by_rows=lambda options: not options.outliers,
    # With outliers every sweep also costs a full matrix product, a sort and a new start of the descent.
    passes=lambda options: options.sweeps * (5 if options.outliers else 1),
)
