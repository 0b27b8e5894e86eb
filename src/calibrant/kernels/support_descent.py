"""One sweep of coordinate descent on ``(W - V) H (W - V)^T`` that also chooses which weights of V are zero.

``pattern_sweep`` keeps k of every m columns, ``threshold_sweep`` those that lower the error enough. Both kernels exist
in Numba, parallel over tiles of rows, and as PyTorch twins, which differ by rounding.
"""

import itertools
from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.row_tiles import LANES, PANEL, apply_panel, tiled, untiled


def pattern_sweep(
    target: torch.Tensor,
    current: torch.Tensor,
    hessian: torch.Tensor,
    kept: int,
    of: int,
    compiled: bool = True,
) -> torch.Tensor:
    """V ``[rows, n]`` after one pass over all groups of ``of`` columns in order, from V = ``current``.

    In each group, ``kept`` weights and their places get the values of least error, given all other weights; no pass
    raises the error of a V that has the pattern. ``target`` W and ``current`` ``[rows, n]``, ``hessian`` H ``[n, n]``,
    positive definite, all float32. ``of`` divides ``PANEL``. The PyTorch twin runs with ``compiled=False`` and for
    tensors on a GPU.
    """
    places = torch.tensor(list(itertools.combinations(range(of), kept)), device=hessian.device)
    inverses = _inverses(hessian, places, of)
    gradient, values = tiled((target - current) @ hessian, 0.0), tiled(current, 0.0)
    if compiled and target.device.type == "cpu":
        arrays = (one.numpy() for one in (gradient, values, hessian.contiguous(), places, inverses))
        _compiled_patterns(*arrays, of)
    else:
        _torch_patterns(gradient, values, hessian, places, inverses, of)
    return untiled(values, len(target))


def threshold_sweep(
    target: torch.Tensor,
    current: torch.Tensor,
    hessian: torch.Tensor,
    least: torch.Tensor,
    compiled: bool = True,
) -> torch.Tensor:
    """V ``[rows, n]`` after one pass over all columns in order, from V = ``current``.

    A weight moves to its optimum given all others, and to zero if that optimum lowers the error by no more than
    ``least`` (float32 ``[rows, n]``, or ``[rows, 1]`` for all columns). The other arguments are those of
    ``pattern_sweep``.
    """
    gradient, values = tiled((target - current) @ hessian, 0.0), tiled(current, 0.0)
    bounds = tiled(least, 0.0)
    if compiled and target.device.type == "cpu":
        arrays = (one.numpy() for one in (gradient, values, hessian.contiguous(), bounds))
        _compiled_thresholds(*arrays)
    else:
        _torch_thresholds(gradient, values, hessian, bounds.expand_as(values))
    return untiled(values, len(target))


def _inverses(hessian: torch.Tensor, places: torch.Tensor, of: int) -> torch.Tensor:
    """For each group and each choice of ``places`` ``[choices, kept]``, the inverse of H there, float32."""
    first = torch.arange(0, hessian.shape[0], of, device=hessian.device)[:, None, None]
    chosen = first + places
    blocks = hessian[chosen[..., :, None], chosen[..., None, :]]
    inverses: torch.Tensor = torch.linalg.inv(blocks.double())
    return inverses.float().contiguous()


def _torch_patterns(
    gradient: torch.Tensor,
    values: torch.Tensor,
    hessian: torch.Tensor,
    places: torch.Tensor,
    inverses: torch.Tensor,
    of: int,
) -> None:
    for group, inverse in enumerate(inverses):
        begin, end = group * of, (group + 1) * of
        before = values[:, begin:end]
        linear = gradient[:, begin:end] + torch.einsum("ij,tjl->til", hessian[begin:end, begin:end], before)
        chosen = linear[:, places]
        optimum = torch.einsum("cij,tcjl->tcil", inverse, chosen)
        best = (chosen * optimum).sum(2).argmax(1)
        after = torch.zeros_like(before)
        index = places[best].transpose(1, 2)
        after.scatter_(1, index, optimum.gather(1, best[:, None, None].expand(-1, -1, places.shape[1], -1))[:, 0])
        step = after - before
        values[:, begin:end] = after
        gradient[:, end:] -= torch.einsum("ik,til->tkl", hessian[begin:end, end:], step)


def _torch_thresholds(
    gradient: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor, bounds: torch.Tensor
) -> None:
    for column in range(values.shape[1]):
        curvature = hessian[column, column]
        optimum = values[:, column] + gradient[:, column] / curvature
        after = torch.where(curvature * optimum * optimum > bounds[:, column], optimum, 0.0)
        step = after - values[:, column]
        values[:, column] = after
        gradient[:, column + 1 :] -= step[:, None] * hessian[column, column + 1 :, None]


def _choose(linear: np.ndarray, places: np.ndarray, inverses: np.ndarray, chosen: np.ndarray, most: np.ndarray) -> None:
    """For each lane, the number of the choice that lowers the error most; ``linear`` ``[of, lanes]``."""
    kept = places.shape[1]
    for lane in range(LANES):
        most[lane] = np.float32(-1.0)
        chosen[lane] = 0
    gains = np.empty(LANES, dtype=np.float32)
    for choice in range(places.shape[0]):
        gains[:] = 0
        for i in range(kept):
            one = linear[places[choice, i]]
            for j in range(kept):
                other, share = linear[places[choice, j]], inverses[choice, i, j]
                for lane in range(LANES):
                    gains[lane] += one[lane] * share * other[lane]
        for lane in range(LANES):
            if gains[lane] > most[lane]:
                most[lane] = gains[lane]
                chosen[lane] = choice


_compiled_choose: Callable[..., None] = numba.njit(error_model="numpy", cache=True)(_choose)


def _pattern_tiles(
    all_gradients: np.ndarray,
    all_values: np.ndarray,
    hessian: np.ndarray,
    places: np.ndarray,
    inverses: np.ndarray,
    of: int,
) -> None:
    columns, kept = all_values.shape[1], places.shape[1]
    for tile in numba.prange(all_values.shape[0]):
        gradient, values = all_gradients[tile], all_values[tile]
        steps = np.empty((PANEL, LANES), dtype=np.float32)
        linear = np.empty((of, LANES), dtype=np.float32)
        most, chosen = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.int64)
        for first in range(0, columns, PANEL):
            last = min(first + PANEL, columns)
            for begin in range(first, last, of):
                for i in range(of):
                    for lane in range(LANES):
                        linear[i, lane] = gradient[begin + i, lane]
                    for j in range(of):
                        share = hessian[begin + i, begin + j]
                        for lane in range(LANES):
                            linear[i, lane] += share * values[begin + j, lane]
                inverse = inverses[begin // of]
                _compiled_choose(linear, places, inverse, chosen, most)
                for i in range(of):
                    for lane in range(LANES):
                        steps[begin - first + i, lane] = -values[begin + i, lane]
                        values[begin + i, lane] = 0
                for lane in range(LANES):
                    choice = chosen[lane]
                    for i in range(kept):
                        optimum = np.float32(0)
                        for j in range(kept):
                            optimum += inverse[choice, i, j] * linear[places[choice, j], lane]
                        place = places[choice, i]
                        values[begin + place, lane] = optimum
                        steps[begin - first + place, lane] += optimum
                for i in range(of):
                    for later in range(begin + of, last):
                        share = hessian[begin + i, later]
                        for lane in range(LANES):
                            gradient[later, lane] -= steps[begin - first + i, lane] * share
            if last - first == PANEL:
                apply_panel(gradient, hessian, steps, first, columns)


def _threshold_tiles(
    all_gradients: np.ndarray, all_values: np.ndarray, hessian: np.ndarray, all_bounds: np.ndarray
) -> None:
    columns = all_values.shape[1]
    for tile in numba.prange(all_values.shape[0]):
        gradient, values = all_gradients[tile], all_values[tile]
        steps = np.empty((PANEL, LANES), dtype=np.float32)
        for first in range(0, columns, PANEL):
            last = min(first + PANEL, columns)
            for column in range(first, last):
                curvature, step, value = hessian[column, column], steps[column - first], values[column]
                bounds = all_bounds[tile, column if all_bounds.shape[1] > 1 else 0]
                for lane in range(LANES):
                    optimum = value[lane] + gradient[column, lane] / curvature
                    after = optimum if curvature * optimum * optimum > bounds[lane] else np.float32(0)
                    step[lane] = after - value[lane]
                    value[lane] = after
                for later in range(column + 1, last):
                    share = hessian[column, later]
                    for lane in range(LANES):
                        gradient[later, lane] -= step[lane] * share
            if last - first == PANEL:
                apply_panel(gradient, hessian, steps, first, columns)


_compiled_patterns: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_pattern_tiles)
_compiled_thresholds: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_threshold_tiles)
