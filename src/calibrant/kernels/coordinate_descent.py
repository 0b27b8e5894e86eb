"""One sweep of coordinate descent on ``(W - V) H (W - V)^T`` over the columns of V (arXiv 2309.01885).

The kernel exists in Numba, parallel over tiles of rows, and as a PyTorch twin; both give the same bits.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.number_types import CompiledNumbers, NumberType
from calibrant.kernels.row_tiles import LANES, PANEL, apply_panel, quantize_column, tiled, untiled


def sweep(
    target: torch.Tensor,
    current: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group: torch.Tensor,
    numbers: NumberType,
    relaxed: bool = False,
    compiled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """V and its codes (int8, as of ``NumberType.coded``), both ``[rows, n]``, after one pass over all columns in
    order, from V = ``current``.

    ``target`` W and ``current`` ``[rows, n]``, ``hessian`` H ``[n, n]`` with a positive diagonal, all float32;
    ``scale`` and ``zero_point`` float32 ``[rows, groups]``, ``group`` int64 ``[n]``. Each column moves to the grid
    point nearest its optimum; with ``relaxed`` to the optimum itself, and the codes are zeros. The PyTorch twin runs
    with ``compiled=False`` and for tensors on a GPU.
    """
    diagonal = hessian.diagonal()
    # The optimum of each column given all others; a step d of column j moves the optimum of column k by d H_jk / H_kk.
    optimum = current + ((target - current) @ hessian) / diagonal
    coupling = (hessian / diagonal).contiguous()
    wanted, values = tiled(optimum, 0.0), tiled(current, 0.0)
    scales, zero_points = tiled(scale, 1.0), tiled(zero_point, 0.0)
    codes = torch.zeros_like(wanted, dtype=torch.int8)
    run = _numba_sweep if compiled and target.device.type == "cpu" else _torch_sweep
    run(wanted, values, coupling, scales, zero_points, group.contiguous(), codes, numbers, relaxed)
    moved, found = untiled(values, len(target)), untiled(codes, len(target))
    return moved, found if relaxed else numbers.coded(found, moved, scale[:, group])


def _torch_sweep(
    wanted: torch.Tensor,
    values: torch.Tensor,
    coupling: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    group: torch.Tensor,
    codes: torch.Tensor,
    numbers: NumberType,
    relaxed: bool,
) -> None:
    for column in range(wanted.shape[1]):
        value = wanted[:, column]
        if not relaxed:
            scale, zero_point = scales[:, group[column]], zero_points[:, group[column]]
            number = numbers.nearest(value / scale + zero_point)
            codes[:, column] = number.to(torch.int8)
            value = (number - zero_point) * scale
        step = value - values[:, column]
        values[:, column] = value
        wanted[:, column + 1 :] -= step[:, None] * coupling[column, column + 1 :, None]


def _numba_sweep(
    wanted: torch.Tensor,
    values: torch.Tensor,
    coupling: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    group: torch.Tensor,
    codes: torch.Tensor,
    numbers: NumberType,
    relaxed: bool,
) -> None:
    arrays = (tensor.numpy() for tensor in (wanted, values, coupling, scales, zero_points, group, codes))
    _compiled(*arrays, numbers.compiled, relaxed)


def _sweep_tiles(
    all_wanted: np.ndarray,
    all_values: np.ndarray,
    coupling: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    group: np.ndarray,
    all_codes: np.ndarray,
    numbers: CompiledNumbers,
    relaxed: bool,
) -> None:
    columns = all_wanted.shape[1]
    for tile in numba.prange(all_wanted.shape[0]):
        wanted, values, codes = all_wanted[tile], all_values[tile], all_codes[tile]
        kept = np.ones(LANES, dtype=np.bool_)
        missed = np.empty(LANES, dtype=np.float32)
        steps = np.empty((PANEL, LANES), dtype=np.float32)
        for first in range(0, columns, PANEL):
            last = min(first + PANEL, columns)
            for column in range(first, last):
                step, value, before = steps[column - first], wanted[column], values[column]
                if not relaxed:
                    scale, zero_point = scales[tile, group[column]], zero_points[tile, group[column]]
                    quantize_column(value, kept, scale, zero_point, codes[column], missed, numbers)
                for lane in range(LANES):
                    step[lane] = value[lane] - before[lane]
                    before[lane] = value[lane]
                for later in range(column + 1, last):
                    share, other = coupling[column, later], wanted[later]
                    for lane in range(LANES):
                        other[lane] -= step[lane] * share
            if last - first == PANEL:
                apply_panel(wanted, coupling, steps, first, columns)


_compiled: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_sweep_tiles)
