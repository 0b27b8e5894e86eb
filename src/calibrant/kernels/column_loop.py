"""The column loop of GPTQ and SparseGPT: quantize or prune each column, compensate its error in the later columns.

The kernel exists in Numba, parallel over tiles of rows, and as a PyTorch twin. In both, the errors reach a weight in
column order, one multiplication and one subtraction each, so both give the same bits, however columns are blocked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import torch

from calibrant.kernels.masks import keep_largest
from calibrant.kernels.number_types import CompiledNumbers, NumberType
from calibrant.kernels.row_tiles import LANES, PANEL, apply_panel, quantize_column, tiled, untiled

BLOCK_SIZE = 128
_LARGEST_PANEL = 32


@dataclass(frozen=True)
class ColumnProblem:
    """A problem with columns in solving order.

    ``weight`` float32 ``[rows, n]``; ``factor`` float32 ``[n, n]`` is the upper factor U of the inverse Hessian.
    Quantization to ``numbers``: ``scale`` and ``zero_point`` float32 ``[rows, groups]`` and ``group`` int64 ``[n]``;
    all None keeps values. Pruning: ``pruned_of = (k, m)`` masks k of every m <= 32 consecutive columns; ``sparsity``
    masks that share of each block of ``BLOCK_SIZE`` columns of each matrix, where ``segments``
    are the row counts of matrices stacked by rows (empty: one matrix).
    """

    weight: torch.Tensor
    factor: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    group: torch.Tensor | None = None
    numbers: NumberType | None = None
    pruned_of: tuple[int, int] | None = None
    sparsity: float = 0.0
    segments: tuple[int, ...] = ()


@dataclass(frozen=True)
class ColumnSolution:
    """``weight`` float32, ``codes`` int8 (zeros if not quantized) and ``kept`` bool, each ``[rows, n]``.

    Codes are as ``NumberType.coded`` gives them.
    """

    weight: torch.Tensor
    codes: torch.Tensor
    kept: torch.Tensor


def solve_columns(problem: ColumnProblem, compiled: bool = True) -> ColumnSolution:
    """Solve all columns; the PyTorch twin runs with ``compiled=False`` and for tensors on a GPU."""
    rows, columns = problem.weight.shape
    tiles = _Tiles.of(problem)
    run = _numba_columns if compiled and problem.weight.device.type == "cpu" else _torch_columns
    step = BLOCK_SIZE if problem.sparsity > 0 else columns
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        if problem.sparsity > 0:
            tiles.kept[:, begin:end] = tiled(_block_mask(problem, tiles, begin, end), True)
        run(tiles, problem, begin, end)
    weight, codes = untiled(tiles.work, rows), untiled(tiles.codes, rows)
    if problem.numbers is not None and problem.scale is not None and problem.group is not None:
        codes = problem.numbers.coded(codes, weight, problem.scale[:, problem.group])
    return ColumnSolution(weight, codes, untiled(tiles.kept, rows))


@dataclass(frozen=True)
class _Tiles:
    """The problem in tiles, changed in place: ``work`` becomes the solved weight."""

    work: torch.Tensor
    factor: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    group: torch.Tensor
    codes: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(cls, problem: ColumnProblem) -> "_Tiles":
        work = tiled(problem.weight, 0.0)
        empty = work.new_zeros(0, 0, LANES)
        group = problem.group if problem.group is not None else torch.zeros(0, dtype=torch.int64, device=work.device)
        return cls(
            work,
            problem.factor.contiguous(),
            tiled(problem.scale, 1.0) if problem.scale is not None else empty,
            tiled(problem.zero_point, 0.0) if problem.zero_point is not None else empty,
            group.contiguous(),
            torch.zeros_like(work, dtype=torch.int8),
            torch.ones_like(work, dtype=torch.bool),
        )


def _block_mask(problem: ColumnProblem, tiles: _Tiles, begin: int, end: int) -> torch.Tensor:
    """Mask that drops the smallest ``w^2 / U_jj^2`` of a block of columns, per segment of rows."""
    columns = untiled(tiles.work[:, begin:end], problem.weight.shape[0])
    scores = (columns / problem.factor.diagonal()[begin:end]).square()
    runs = scores.split(list(problem.segments or (len(scores),)))
    return torch.cat([keep_largest(run, problem.sparsity) for run in runs])


def _torch_columns(tiles: _Tiles, problem: ColumnProblem, begin: int, end: int) -> None:
    work, factor, diagonal = tiles.work, tiles.factor, tiles.factor.diagonal()
    for column in range(begin, end):
        if problem.pruned_of is not None and column % problem.pruned_of[1] == 0:
            pruned, of = problem.pruned_of
            scores = (work[:, column : column + of] / diagonal[column : column + of, None]).square()
            smallest = torch.argsort(scores, dim=1, stable=True)[:, :pruned]
            tiles.kept[:, column : column + of].scatter_(1, smallest, False)
        kept = tiles.kept[:, column]
        value = torch.where(kept, work[:, column], 0.0)
        if problem.numbers is not None:
            scale, zero_point = tiles.scale[:, tiles.group[column]], tiles.zero_point[:, tiles.group[column]]
            number = torch.where(kept, problem.numbers.nearest(value / scale + zero_point), zero_point)
            tiles.codes[:, column] = number.to(torch.int8)
            value = (number - zero_point) * scale
        error = (work[:, column] - value) / diagonal[column]
        work[:, column] = value
        work[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :, None]


def _numba_columns(tiles: _Tiles, problem: ColumnProblem, begin: int, end: int) -> None:
    pruned, of = problem.pruned_of or (0, 0)
    # A group of m must be inside one panel or start one, so that its weights are up to date when its mask is chosen.
    panel = PANEL if of == 0 or PANEL % of == 0 or of % PANEL == 0 else of
    _compiled(
        tiles.work.numpy(),
        tiles.factor.numpy(),
        tiles.scale.numpy(),
        tiles.zero_point.numpy(),
        tiles.group.numpy(),
        tiles.codes.numpy(),
        tiles.kept.numpy(),
        (problem.numbers or NumberType.integers(8)).compiled,
        pruned,
        of,
        panel,
        begin,
        end,
    )


def _solve_tiles(
    works: np.ndarray,
    factor: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    group: np.ndarray,
    all_codes: np.ndarray,
    all_kept: np.ndarray,
    numbers: CompiledNumbers,
    pruned: int,
    of: int,
    panel: int,
    begin: int,
    end: int,
) -> None:
    quantize = scales.shape[0] > 0
    columns = works.shape[1]
    for tile in numba.prange(works.shape[0]):
        work, codes, kept = works[tile], all_codes[tile], all_kept[tile]
        errors = np.empty((_LARGEST_PANEL, LANES), dtype=np.float32)
        for first in range(begin, end, panel):
            last = min(first + panel, end)
            for column in range(first, last):
                if of > 0 and column % of == 0:
                    _mask_smallest(work, factor, kept, column, pruned, of)
                error = errors[column - first]
                if quantize:
                    scale, zero_point = scales[tile, group[column]], zero_points[tile, group[column]]
                    quantize_column(work[column], kept[column], scale, zero_point, codes[column], error, numbers)
                else:
                    _zero_masked(work[column], kept[column], error)
                pivot = factor[column, column]
                for lane in range(LANES):
                    error[lane] = error[lane] / pivot
                for later in range(column + 1, last):
                    share, target = factor[column, later], work[later]
                    for lane in range(LANES):
                        target[lane] -= error[lane] * share
            if last - first == PANEL:
                apply_panel(work, factor, errors, first, columns)
            else:
                for column in range(first, last):
                    error = errors[column - first]
                    for later in range(last, columns):
                        share, target = factor[column, later], work[later]
                        for lane in range(LANES):
                            target[lane] -= error[lane] * share


def _mask_smallest_lanes(
    work: np.ndarray, factor: np.ndarray, kept: np.ndarray, column: int, pruned: int, of: int
) -> None:
    """Mask the ``pruned`` smallest scores of ``of`` columns in every lane; ties mask the earlier column."""
    for lane in range(LANES):
        for _ in range(pruned):
            best, best_score = -1, np.float32(0)
            for place in range(column, column + of):
                if kept[place, lane]:
                    ratio = work[place, lane] / factor[place, place]
                    score = ratio * ratio
                    if best < 0 or score < best_score:
                        best, best_score = place, score
            kept[best, lane] = False


def _zero_masked_lanes(work: np.ndarray, kept: np.ndarray, error: np.ndarray) -> None:
    """Zero the masked weights of one column and write the difference to ``error``."""
    for lane in range(LANES):
        value = work[lane] if kept[lane] else np.float32(0)
        error[lane] = work[lane] - value
        work[lane] = value


# Division by zero needs no check (factors and scales are positive), and a check would keep loops from vectorizing.
_mask_smallest: Callable[..., None] = numba.njit(error_model="numpy", cache=True)(_mask_smallest_lanes)
_zero_masked: Callable[..., None] = numba.njit(error_model="numpy", cache=True)(_zero_masked_lanes)
_compiled: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_solve_tiles)
