"""QuantEase: cyclic coordinate descent on a layer's squared output error (arXiv 2309.01885)."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.coordinate_descent import sweep
from calibrant.kernels.masks import largest
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution, SolverRecord, keep_rounded_rows
from calibrant.methods.solvers.rtn import round_layer, rtn
from calibrant.methods.solvers.second_order import damped, undo
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import Grid, GridSpec, decode, encode
from calibrant.quantization.statistics import Hessian

# Every third sweep may leave the grid, but not late and not last (the released code).
_RELAXED_EVERY = 3
_RELAXED_UNTIL = 25


def quantease(
    weight: torch.Tensor, hessian: torch.Tensor, spec: GridSpec, *, sweeps: int = 30, damping: float = 0.0
) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` for inputs of second moment ``hessian`` ``[in, in]`` (both float32).

    Starts from the weights themselves, with the relaxed sweeps of the released code, on grids fitted to the weights.
    ``damping`` as in GPTQ keeps weights near their own values where inputs say little (ours; the paper has none).
    A row that ends above round-to-nearest's error keeps round-to-nearest (ours), counted in the record.
    """
    rounded = rtn(weight, spec, hessian)
    assert rounded.grid is not None
    last = sweeps - 1
    relaxed = [n % _RELAXED_EVERY == 1 and n <= _RELAXED_UNTIL and n != last for n in range(sweeps)]
    values, codes = descend(weight, weight, damped(hessian, damping), rounded.grid, relaxed)
    dead = int((hessian.diagonal() == 0).sum())
    return keep_rounded_rows(weight, values, codes, rounded, hessian, SolverRecord(dead_columns=dead))


def descend(
    target: torch.Tensor, start: torch.Tensor, hessian: torch.Tensor, grid: Grid, relaxed: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and codes after one sweep for each of ``relaxed``, largest diagonal first; all tensors ``[rows, in]``.

    From a ``start`` on the grid, sweeps that are not relaxed never raise the error. Columns without input go to the
    grid point next to their target.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    hessian = hessian.index_select(0, order).index_select(1, order)
    hessian.diagonal().copy_(torch.where(diagonal > 0, diagonal, 1.0)[order])
    wanted, values = target.index_select(1, order), start.index_select(1, order)
    group = grid.columns(target.shape[1])[order]
    codes = torch.zeros_like(values, dtype=torch.int8)
    for relax in relaxed:
        spec = grid.spec
        values, codes = sweep(wanted, values, hessian, grid.scale, grid.zero_point, group, spec.qmin, spec.qmax, relax)
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
    """``W = B + O``: B on a grid, O a ``share`` of the entries of each of ``segments`` (runs of rows), kept exactly.

    From the paper's equations (the released code of this variant does not run as it stands): sweeps for B against
    ``W - O`` alternate with steps ``G / lambda_max`` for O that keep its largest entries. The result is dense; the
    grids are fitted to the weights without the first outliers.
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
    """QuantEase; with ``outliers`` that share of the weights stays exact: stored dense, with a list of them beside."""

    name: Literal["quantease"] = "quantease"
    sweeps: int = Field(default=30, ge=1)
    damping: float = Field(default=0.0, ge=0, le=100)
    outliers: float = Field(default=0.0, ge=0, lt=1)


def _solve(options: QuantEase, problem: LayerProblem) -> Solution:
    weight, hessian, spec = problem.weight, problem.full_hessian, problem.grid_spec
    if not options.outliers:
        return quantease(weight, hessian, spec, sweeps=options.sweeps, damping=options.damping)
    hessian = damped(hessian, options.damping)
    return quantease_with_outliers(
        weight, hessian, spec, sweeps=options.sweeps, share=options.outliers, segments=problem.segments
    )


QUANTEASE = LayerSolver(
    QuantEase,
    _solve,
    round_layer,
    Hessian,
    stored_dense=lambda options: options.outliers > 0,
    # With outliers every sweep also has a whole product, a sort and another start.
    passes=lambda options: options.sweeps * (5 if options.outliers else 1),
)
