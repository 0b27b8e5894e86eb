"""Products of float32 matrices with the float32 register tile, on processors for which ``float32_tile.available()``.

The right operand is packed into panels ``[panels, steps, COLUMNS]``: a step of a panel contains the entries of
``COLUMNS`` columns of the product.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.arrays import array_of
from calibrant.kernels.float32_tile import COLUMNS, ROWS, multiply_tile

# Steps summed in registers before they are added to the product; a panel of as many fits a core's cache.
_STEPS = 512
# Steps packed into every panel before the next steps, so that rows are read in memory order.
_PACKED_TOGETHER = 16


def add_lower_gram(lower: torch.Tensor, values: torch.Tensor) -> None:
    """Add ``values^T values`` to the lower triangle of ``lower``, in place.

    ``lower`` ``[in, in]``, contiguous, and ``values`` ``[tokens, in]`` are float32 on the CPU. Entries above the
    diagonal are unspecified afterwards.
    """
    assert lower.is_contiguous()
    tokens, width = values.shape
    steps = min(_STEPS, tokens)
    # Tiles of the left operand are packed apart from the panels, so that a tile's steps are neighbours in the cache.
    tiles = np.empty((-(-width // ROWS), steps, ROWS), dtype=np.float32)
    panels = np.empty((-(-width // COLUMNS), steps, COLUMNS), dtype=np.float32)
    for chunk in values.contiguous().split(steps):
        rows = array_of(chunk)
        _pack_tiles(rows, tiles)
        _pack_panels(rows, panels)
        _add(tiles, steps * ROWS, 1, ROWS, panels, lower.numpy(), True)


def panels_of_rows(weight: torch.Tensor) -> np.ndarray:
    """``weight`` ``[out, in]`` as panels ``[panels, in, COLUMNS]`` for ``add_linear``; zero past the last row."""
    outputs, inputs = weight.shape
    padded = weight.new_zeros(-(-outputs // COLUMNS), COLUMNS, inputs)
    padded.view(-1, inputs)[:outputs] = weight
    panels: np.ndarray = padded.transpose(1, 2).contiguous().numpy()
    return panels


def add_linear(total: torch.Tensor, inputs: torch.Tensor, panels: np.ndarray) -> None:
    """Add ``inputs weight^T`` to ``total`` ``[rows, out]``, in place; ``panels`` are those of the weight.

    ``inputs`` ``[rows, in]`` and ``total``, contiguous, are float32 on the CPU. A row's result does not depend on the
    other rows.
    """
    assert total.is_contiguous()
    rows, width = inputs.shape
    missing = -rows % ROWS
    whole = torch.cat([inputs, inputs.new_zeros(missing, width)]) if missing else inputs.contiguous()
    _add(whole.numpy(), ROWS * width, width, 1, panels, total.numpy(), False)


def _packer(columns: int) -> Callable[..., None]:
    """A function that packs ``values`` ``[rows, width]`` in panels ``[panels, steps, columns]``, whose steps are rows.

    Panels are zero past the last row and column.
    """

    def pack(values: np.ndarray, panels: np.ndarray) -> None:
        rows, width = values.shape
        whole, steps = width // columns, panels.shape[1]
        for group in numba.prange((steps + _PACKED_TOGETHER - 1) // _PACKED_TOGETHER):
            begin = np.intp(group) * _PACKED_TOGETHER
            end = min(begin + _PACKED_TOGETHER, rows)
            for panel in range(whole):
                for step in range(begin, end):
                    for column in range(columns):
                        panels[panel, step, column] = values[step, panel * columns + column]
            for panel in range(whole, panels.shape[0]):
                for step in range(begin, end):
                    for column in range(columns):
                        place = panel * columns + column
                        panels[panel, step, column] = values[step, place] if place < width else np.float32(0)
            for step in range(max(begin, rows), min(begin + _PACKED_TOGETHER, steps)):
                panels[:, step] = 0

    packer: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(pack)
    return packer


def _add_tiles(
    left: np.ndarray,
    tile_stride: int,
    row_stride: int,
    step_stride: int,
    right: np.ndarray,
    total: np.ndarray,
    lower: bool,
) -> None:
    """Add ``sum_k left(k, i) right(k, j)`` to ``total[i, j]``; with ``lower`` only tiles on or below the diagonal.

    ``left(k, i)`` is entry ``i // ROWS * tile_stride + i % ROWS * row_stride + k * step_stride`` of ``left``, which has
    whole tiles, and ``right(k, j)`` is ``right[j // COLUMNS, k, j % COLUMNS]``. An iteration takes one panel from
    either end, so that all iterations have equal work below the diagonal.
    """
    panels, steps = right.shape[:2]
    rows, width = total.shape
    for iteration in numba.prange((panels + 1) // 2):
        index = np.intp(iteration)  # prange counts unsigned, and unsigned differences become floats
        edge = np.empty((ROWS, COLUMNS), dtype=np.float32)
        for side in range(2):
            panel = index if side == 0 else panels - 1 - index
            if side == 1 and panel == index:
                continue
            first = panel * COLUMNS
            for begin in range(0, steps, _STEPS):
                count = min(_STEPS, steps - begin)
                other = np.intp(right[panel, begin].ctypes.data)
                for row in range(first if lower else 0, rows, ROWS):
                    own = np.intp(left.ctypes.data) + 4 * (row // ROWS * tile_stride + begin * step_stride)
                    if row + ROWS <= rows and first + COLUMNS <= width:
                        sums = np.intp(total[row, first:].ctypes.data)
                        multiply_tile(own, other, count, sums, width, row_stride, step_stride)
                    else:
                        edge[:] = 0
                        sums = np.intp(edge.ctypes.data)
                        multiply_tile(own, other, count, sums, COLUMNS, row_stride, step_stride)
                        for i in range(min(ROWS, rows - row)):
                            for j in range(min(COLUMNS, width - first)):
                                total[row + i, first + j] += edge[i, j]


_pack_tiles, _pack_panels = _packer(ROWS), _packer(COLUMNS)
_add: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_add_tiles)
