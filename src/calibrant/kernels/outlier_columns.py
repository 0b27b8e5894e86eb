"""SpQR's two inner loops (arXiv 2306.03078): which weights of a group are likely outliers, and the columns of a group.

Each kernel exists in Numba, parallel over tiles of rows, and as a PyTorch twin, which also runs on GPUs. Both give
columns of the same bits; they sum gains in different orders.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import torch

from calibrant.kernels.row_tiles import LANES, PANEL, apply_panel, tiled, untiled


class OutlierColumns:
    """A matrix that is solved group by group; values whose error exceeds the threshold stay exact.

    ``weight`` float32 ``[rows, n]`` with columns in solving order; ``factor`` float32 ``[n, n]`` is the upper factor U
    of the inverse Hessian; ``threshold`` float32 ``[rows, 1]`` bounds ``(error / U_jj)^2``. The twin runs with
    ``compiled=False`` and for tensors on a GPU.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        factor: torch.Tensor,
        threshold: torch.Tensor,
        bits: int,
        compiled: bool = True,
    ) -> None:
        self._rows, self._factor, self._largest = len(weight), factor.contiguous(), 2**bits - 1
        self._work, self._threshold = tiled(weight, 0.0), tiled(threshold, torch.inf)
        self._exact = torch.zeros_like(self._work, dtype=torch.bool)
        self._compiled = compiled and weight.device.type == "cpu"

    def columns(self, begin: int, end: int) -> torch.Tensor:
        """Columns as they are now, compensated for the errors of solved groups, float32 ``[rows, end - begin]``."""
        return untiled(self._work[:, begin:end], self._rows)

    def solve(self, begin: int, end: int, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Round columns ``begin ... end - 1`` to a grid, float32 ``[rows, 1]`` each, and compensate all later ones."""
        grid = tiled(scale, 1.0)[:, 0], tiled(zero_point, 0.0)[:, 0]
        if not self._compiled:
            self._torch_columns(begin, end, *grid)
            return
        tensors = (self._work, self._factor, *grid, self._threshold[:, 0], self._exact)
        _solve(*(tensor.numpy() for tensor in tensors), np.float32(self._largest), begin, end)

    def _torch_columns(self, begin: int, end: int, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        for column in range(begin, end):
            pivot, value = self._factor[column, column], self._work[:, column].clone()
            code = torch.round(value / scale + zero_point).clamp(0, self._largest)
            rounded = (code - zero_point) * scale
            exact = ((value - rounded) / pivot).square() > self._threshold[:, 0]
            self._exact[:, column] = exact
            self._work[:, column] = torch.where(exact, value, rounded)
            error = (value - self._work[:, column]) / pivot
            self._work[:, column + 1 :] -= error[:, None] * self._factor[column, column + 1 :, None]

    @property
    def solution(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight, float32, and where it is exact, bool, each ``[rows, n]``."""
        return untiled(self._work, self._rows), untiled(self._exact, self._rows)


@dataclass(frozen=True)
class RangeGrid:
    """The grid from the smallest to the largest value, without optimization.

    ``integer_zero`` rounds zero points and includes 0 in ranges.
    """

    bits: int
    integer_zero: bool

    def fit(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and unrounded zero point ``[rows, 1]`` of ``values`` ``[rows, n]``."""
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        if self.integer_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale > 0, scale, 1.0)
        return scale, -low / scale


def leave_one_out_gains(
    group: torch.Tensor, diagonal: torch.Tensor, grid: RangeGrid, compiled: bool = True
) -> torch.Tensor:
    """Drop in a group's error when each weight is left out and the grid refitted to the others.

    ``group`` float32 ``[rows, n]``, ``n`` at least 2; ``diagonal`` float32 ``[n]`` divides errors. The result is
    float32 ``[rows, n]``.
    """
    if not compiled or group.device.type != "cpu":
        return _torch_gains(group, diagonal, grid)
    tiles = tiled(group, 0.0)
    gains = torch.empty_like(tiles)
    arrays = (tensor.numpy() for tensor in (tiles, diagonal.contiguous(), gains))
    _gains(*arrays, np.float32(2**grid.bits - 1), grid.integer_zero)
    return untiled(gains, len(group))


def _torch_gains(group: torch.Tensor, diagonal: torch.Tensor, grid: RangeGrid) -> torch.Tensor:
    def cost(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        scale, zero_point = grid.fit(values)
        zero_point = zero_point.round() if grid.integer_zero else zero_point
        codes = torch.round(values / scale + zero_point).clamp(0, 2**grid.bits - 1)
        return ((values - (codes - zero_point) * scale) / weights).square().sum(-1)

    whole = cost(group, diagonal)
    gains = []
    for index in range(group.shape[1]):
        kept = [other for other in range(group.shape[1]) if other != index]
        gains.append(whole - cost(group[:, kept], diagonal[kept]))
    return torch.stack(gains, 1)


def _solve_tiles(
    works: np.ndarray,
    factor: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    thresholds: np.ndarray,
    all_exact: np.ndarray,
    largest: np.float32,
    begin: int,
    end: int,
) -> None:
    columns = works.shape[1]
    for tile in numba.prange(works.shape[0]):
        work, exact, scale, zero_point, bound = (
            works[tile],
            all_exact[tile],
            scales[tile],
            zero_points[tile],
            thresholds[tile],
        )
        errors = np.empty((PANEL, LANES), dtype=np.float32)
        for first in range(begin, end, PANEL):
            last = min(first + PANEL, end)
            for column in range(first, last):
                error = errors[column - first]
                _round_column(
                    work[column], scale, zero_point, bound, factor[column, column], largest, exact[column], error
                )
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


def _round_lanes(
    work: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    bound: np.ndarray,
    pivot: np.float32,
    largest: np.float32,
    exact: np.ndarray,
    error: np.ndarray,
) -> None:
    """Round one column where its error is within ``bound``, and write the error of the result, divided by ``pivot``."""
    for lane in range(LANES):
        code = min(max(np.rint(work[lane] / scale[lane] + zero_point[lane]), np.float32(0)), largest)
        value = (code - zero_point[lane]) * scale[lane]
        loss = (work[lane] - value) / pivot
        is_exact = loss * loss > bound[lane]
        exact[lane] = is_exact
        error[lane] = np.float32(0) if is_exact else loss
        work[lane] = work[lane] if is_exact else value


def _gain_tiles(
    groups: np.ndarray, diagonal: np.ndarray, all_gains: np.ndarray, largest: np.float32, integer_zero: bool
) -> None:
    width = groups.shape[1]
    for tile in numba.prange(groups.shape[0]):
        group, gains = groups[tile], all_gains[tile]
        whole = np.empty(LANES, dtype=np.float32)
        _cost_without(group, diagonal, -1, largest, integer_zero, whole)
        for left_out in range(width):
            _cost_without(group, diagonal, left_out, largest, integer_zero, gains[left_out])
            for lane in range(LANES):
                gains[left_out, lane] = whole[lane] - gains[left_out, lane]


def _cost_lanes(
    group: np.ndarray,
    diagonal: np.ndarray,
    left_out: int,
    largest: np.float32,
    integer_zero: bool,
    cost: np.ndarray,
) -> None:
    """The error of all columns but one on the grid of their own range; -1 leaves out none."""
    low, high = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.float32)
    low[:], high[:], cost[:] = np.inf, -np.inf, 0
    if integer_zero:
        low[:], high[:] = 0, 0
    for column in range(group.shape[0]):
        if column != left_out:
            for lane in range(LANES):
                low[lane] = min(low[lane], group[column, lane])
                high[lane] = max(high[lane], group[column, lane])
    # From here ``high`` is the scale and ``low`` the zero point.
    for lane in range(LANES):
        scale = (high[lane] - low[lane]) / largest
        high[lane] = scale if scale > 0 else np.float32(1)
        low[lane] = -low[lane] / high[lane]
    if integer_zero:
        for lane in range(LANES):
            low[lane] = np.rint(low[lane])
    for column in range(group.shape[0]):
        if column != left_out:
            for lane in range(LANES):
                value = group[column, lane]
                code = min(max(np.rint(value / high[lane] + low[lane]), np.float32(0)), largest)
                loss = (value - (code - low[lane]) * high[lane]) / diagonal[column]
                cost[lane] += loss * loss


# Division by zero needs no check (scales and factors are positive), and a check would keep loops from vectorizing.
_round_column: Callable[..., None] = numba.njit(error_model="numpy", cache=True)(_round_lanes)
_cost_without: Callable[..., None] = numba.njit(error_model="numpy", cache=True)(_cost_lanes)
_solve: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_solve_tiles)
_gains: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_gain_tiles)
