"""SpQR: GPTQ with exact outliers and quantized scales and zero points (arXiv 2306.03078)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.inverse_factor import NotPositiveDefiniteError
from calibrant.kernels.outlier_columns import OutlierColumns, RangeGrid, leave_one_out_gains
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution, SolverRecord
from calibrant.methods.solvers.rtn import round_layer
from calibrant.methods.solvers.second_order import prepare, undo
from calibrant.quantization.statistics import Hessian

# Rows that share one second-level grid for scales and one for zero points.
_SECOND_LEVEL_ROWS = 16


@dataclass(frozen=True)
class SpqrSettings:
    """SpQR's parameters, named as in the released code where it has them.

    ``threshold`` is relative to the mean of ``var(W_j) / U_jj^2``. ``statistic_bits`` are those of scales and zero
    points; None leaves both unquantized. ``integer_zero`` rounds zero points and includes 0 in ranges, as ordinary
    grids do (ours).
    """

    bits: int = 4
    group_size: int | None = 16
    threshold: float = 0.2
    statistic_bits: int | None = 3
    damping: float = 1.0
    act_order: bool = True
    integer_zero: bool = False


def spqr(
    weight: torch.Tensor, hessian: torch.Tensor, settings: SpqrSettings, segments: tuple[int, ...] = ()
) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` on the inputs' ``hessian`` ``sum x x^T`` ``[in, in]`` (both float32).

    ``segments`` are the row counts of matrices stacked by rows (empty: one matrix); thresholds and second-level grids
    are per matrix. A group's grid is fitted to the compensated weights when the loop reaches its first column, without
    the likely outliers: weights whose removal lowers the group's error by more than the threshold. A weight whose error
    exceeds the threshold stays exact and is marked in ``outliers``. The result is dense, since no common loader has the
    format. Dead columns are treated before damping, as in GPTQ (ours). If the Hessian cannot be factored at any
    damping, nothing is quantized and the record says so.
    """
    try:
        prepared = prepare(hessian, settings.damping, settings.act_order)
    except NotPositiveDefiniteError:
        return Solution(weight.clone(), record=SolverRecord(fallback="Hessian not positive definite, left as it was"))
    weights, diagonal = prepared.ordered(weight), prepared.factor.diagonal()
    parts, columns = segments or (len(weights),), weights.shape[1]
    thresholds = [settings.threshold * (part.var(0) / diagonal.square()).mean() for part in weights.split(parts)]
    threshold = torch.cat([one.expand(rows, 1) for one, rows in zip(thresholds, parts, strict=True)])
    solving = OutlierColumns(weights, prepared.factor, threshold, settings.bits)
    width = settings.group_size or columns
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        grid = _grid(solving.columns(begin, end), diagonal[begin:end], threshold, parts, settings)
        solving.solve(begin, end, *grid)
    solved, outliers = solving.solution
    record = SolverRecord(
        prepared.damping, prepared.damping > settings.damping, prepared.dead_columns, outliers=int(outliers.sum())
    )
    return Solution(undo(prepared.order, solved), outliers=undo(prepared.order, outliers), record=record)


def _grid(
    group: torch.Tensor,
    diagonal: torch.Tensor,
    threshold: torch.Tensor,
    parts: tuple[int, ...],
    settings: SpqrSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point ``[rows, 1]`` of a group of columns without likely outliers; ``threshold`` ``[rows, 1]``."""
    plain = RangeGrid(settings.bits, settings.integer_zero)
    if bool(threshold.isfinite().any()) and group.shape[1] > 1:
        others = _replace_by_mean(group, leave_one_out_gains(group, diagonal, plain) > threshold)
    else:
        others = group
    scale, zero_point = plain.fit(others)
    if settings.statistic_bits is not None:
        scale = torch.cat([_round_second_level(part, settings.statistic_bits) for part in scale.split(parts)])
        zero_point = torch.cat([_round_second_level(part, settings.statistic_bits) for part in zero_point.split(parts)])
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, zero_point.round() if settings.integer_zero else zero_point


def _replace_by_mean(group: torch.Tensor, outlier: torch.Tensor) -> torch.Tensor:
    rest = (~outlier).sum(1, keepdim=True).clamp(min=1)
    return torch.where(outlier, (group * ~outlier).sum(1, keepdim=True) / rest, group)


def _round_second_level(values: torch.Tensor, bits: int) -> torch.Tensor:
    """``values`` ``[rows, 1]`` rounded to an asymmetric grid of ``bits`` per run of rows."""
    missing = -len(values) % _SECOND_LEVEL_ROWS
    runs = torch.cat([values, values[-1:].expand(missing, 1)]).view(-1, _SECOND_LEVEL_ROWS)
    low, high = runs.amin(1, keepdim=True), runs.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1.0)
    return (torch.round((runs - low) / step) * step + low).view(-1, 1)[: len(values)]


class Spqr(MethodOptions):
    """SpQR, stored dense, with a separate list of outliers.

    ``statistic_bits`` are those of scales and zero points; None leaves both unquantized.
    """

    name: Literal["spqr"] = "spqr"
    threshold: float = Field(default=0.2, gt=0)
    damping: float = Field(default=1.0, gt=0, le=100)
    act_order: bool = True
    statistic_bits: int | None = Field(default=3, ge=1, le=8)
    integer_zero: bool = False


def _solve(options: Spqr, problem: LayerProblem) -> Solution:
    spec = problem.grid_spec
    settings = SpqrSettings(spec.bits, spec.group_size, **options.model_dump(exclude={"name"}))
    return spqr(problem.weight, problem.full_hessian, settings, problem.segments)


SPQR = LayerSolver(
    Spqr, _solve, round_layer, Hessian, symmetric=False, stored_dense=lambda _: True, passes=lambda _: 5.0
)
