"""``H += X^T X`` for bfloat16 ``X`` with the bfloat16 register tile; only the lower triangle is computed.

General matrix products, as libraries have them, compute both halves. The two rows of a pair are two tokens.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_tile import COLUMNS, ROWS, multiply_tile, pack_rows
from calibrant.kernels.bfloat16_words import words

# Pairs of tokens summed in registers before they are added to H; a panel of as many fits a core's cache.
_PAIRS = 512
# Pairs packed into every panel before the next pairs, so that rows are read in memory order.
_PACKED_TOGETHER = 8


def add_gram_bfloat16(lower: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add ``inputs^T inputs`` to the lower triangle of ``lower``, in place.

    ``lower`` float32 ``[in, in]``, ``inputs`` bfloat16 ``[tokens, in]``, both on the CPU; needs
    ``bfloat16_tile.available()``. Entries above the diagonal are unspecified afterwards.
    """
    tokens, width = inputs.shape
    values = words(inputs.contiguous())
    # Chunk by chunk, so that the packed copy stays in the cache until it is read.
    packed = np.empty((-(-width // COLUMNS), min(_PAIRS, -(-tokens // 2)), COLUMNS), dtype=np.uint32)
    for begin in range(0, tokens, 2 * _PAIRS):
        chunk = values[begin : begin + 2 * _PAIRS]
        _pack(chunk, packed)
        _accumulate(packed, -(-len(chunk) // 2), lower.numpy())


def _pack_panels(values: np.ndarray, packed: np.ndarray) -> None:
    """Pack ``values`` ``[tokens, in]`` into panels of channels, whose steps are pairs of tokens."""
    pairs = (values.shape[0] + 1) // 2
    for group in numba.prange((pairs + _PACKED_TOGETHER - 1) // _PACKED_TOGETHER):
        begin = group * _PACKED_TOGETHER
        for panel in range(packed.shape[0]):
            for pair in range(begin, min(begin + _PACKED_TOGETHER, pairs)):
                pack_rows(values, pair, panel * COLUMNS, packed[panel, pair])


def _accumulate_panels(packed: np.ndarray, pairs: int, lower: np.ndarray) -> None:
    """Add all tiles on or below the diagonal.

    An iteration takes one panel from either end, so that all iterations have equal work.
    """
    panels = packed.shape[0]
    width = lower.shape[0]
    for iteration in numba.prange((panels + 1) // 2):
        index = np.intp(iteration)  # prange counts unsigned, and unsigned differences become floats
        edge = np.empty((ROWS, COLUMNS), dtype=np.float32)
        for side in range(2):
            column_panel = index if side == 0 else panels - 1 - index
            if side == 1 and column_panel == index:
                continue
            first = column_panel * COLUMNS
            right = np.intp(packed[column_panel].ctypes.data)
            for row in range(first, width, ROWS):
                left = np.intp(packed[row // COLUMNS].ctypes.data) + 4 * (row % COLUMNS)
                if row + ROWS <= width and first + COLUMNS <= width:
                    sums = np.intp(lower[row, first:].ctypes.data)
                    multiply_tile(left, right, pairs, sums, width)
                else:
                    edge[:] = 0
                    multiply_tile(left, right, pairs, np.intp(edge.ctypes.data), COLUMNS)
                    for i in range(min(ROWS, width - row)):
                        for j in range(min(COLUMNS, width - first)):
                            lower[row + i, first + j] += edge[i, j]


_pack: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_pack_panels)
_accumulate: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_accumulate_panels)
