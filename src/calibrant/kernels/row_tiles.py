"""Rows in tiles, and the steps shared by loops over the columns of a tile.

Rows are independent, so they are laid out in tiles of ``LANES`` rows, ``[tiles, columns, LANES]``: a column of a tile
is a few vector registers wide, and a whole tile stays in a core's cache.
"""

from collections.abc import Callable, Iterator

import numba
import numpy as np
import torch

from calibrant.kernels.number_types import CompiledNumbers, nearest_number

LANES = 32
# Columns whose errors are applied together, so that each later weight is loaded once for all of them.
PANEL = 8
CHUNK_BYTES = 128 << 20
"""Weights (float32) of a large layer that are solved at once, so that copies of them stay small beside the layer."""


def row_chunks(matrix: torch.Tensor) -> Iterator[slice]:
    """Slices over the rows of ``matrix`` ``[rows, n]``, of whole tiles, for work on independent rows."""
    step = max(LANES, CHUNK_BYTES // 4 // matrix.shape[1] // LANES * LANES)
    for begin in range(0, len(matrix), step):
        yield slice(begin, begin + step)


def tiled(matrix: torch.Tensor, padding: float | bool) -> torch.Tensor:
    """``matrix`` ``[rows, n]`` as ``[tiles, n, LANES]``; missing rows of the last tile are filled with ``padding``."""
    rows, columns = matrix.shape
    missing = -rows % LANES
    if missing:
        matrix = torch.cat([matrix, matrix.new_full((missing, columns), padding)])
    return matrix.view(-1, LANES, columns).transpose(1, 2).contiguous()


def untiled(tiles: torch.Tensor, rows: int) -> torch.Tensor:
    """``tiles`` ``[tiles, n, LANES]`` as a matrix ``[rows, n]``, without padding."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:rows].contiguous()


def _quantize_lanes(
    work: np.ndarray,
    kept: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    codes: np.ndarray,
    error: np.ndarray,
    numbers: CompiledNumbers,
) -> None:
    """Round one column to its grid in place (masked weights to zero) and write the difference to ``error``."""
    qmin, qmax, mantissa_bits, least_exponent = numbers
    for lane in range(LANES):
        wanted = work[lane] / scale[lane] + zero_point[lane]
        number, steps = nearest_number(wanted, qmin, qmax, mantissa_bits, least_exponent)
        number = number if kept[lane] else zero_point[lane]
        value = (number - zero_point[lane]) * scale[lane]
        codes[lane] = np.int8(steps if kept[lane] else zero_point[lane])
        error[lane] = work[lane] - value
        work[lane] = value


def _apply_eight(work: np.ndarray, factor: np.ndarray, errors: np.ndarray, first: int, columns: int) -> None:
    """Subtract the errors of eight columns from all later ones, in column order."""
    for later in range(first + 8, columns):
        target = work[later]
        u0, u1, u2, u3 = (
            factor[first, later],
            factor[first + 1, later],
            factor[first + 2, later],
            factor[first + 3, later],
        )
        u4, u5 = factor[first + 4, later], factor[first + 5, later]
        u6, u7 = factor[first + 6, later], factor[first + 7, later]
        for lane in range(LANES):
            value = target[lane]
            value = value - errors[0, lane] * u0
            value = value - errors[1, lane] * u1
            value = value - errors[2, lane] * u2
            value = value - errors[3, lane] * u3
            value = value - errors[4, lane] * u4
            value = value - errors[5, lane] * u5
            value = value - errors[6, lane] * u6
            value = value - errors[7, lane] * u7
            target[lane] = value


# Division by zero needs no check (scales are positive), and a check would keep loops from vectorizing.
quantize_column: Callable[..., None] = numba.njit(error_model="numpy", cache=True)(_quantize_lanes)
apply_panel: Callable[..., None] = numba.njit(error_model="numpy", cache=True)(_apply_eight)
