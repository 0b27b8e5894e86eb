"""Causal attention in bfloat16 on a CPU with the bfloat16 register tile.

Scores are transposed, keys by queries: the softmax over the keys runs down the columns, one vector of queries at a
time, and its result has the layout of the second product's operand. Keys after the last query of a panel, or before the
windows of all its queries, are skipped. Scores, their maximum and their sum are float32; probabilities are rounded to
bfloat16 before they weight the values, and the division by the sum comes last.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_tile import COLUMNS, ROWS, multiply_tile, pack_columns, pack_rows
from calibrant.kernels.bfloat16_words import pairs, rounded, words
from calibrant.kernels.exponential import LOG2_E, power_of_two


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Attention of every position to itself and earlier positions; needs ``bfloat16_tile.available()``.

    ``query`` ``[batch, heads, length, width]``; ``key``, ``value`` ``[batch, kv heads, length, width]``; ``heads`` is a
    multiple of ``kv heads``, ``width`` is even, ``scale`` positive. With ``window``, a position attends to at most that
    many positions, itself included. Returns ``[batch, length, heads, width]``. All tensors are bfloat16 on the CPU.
    """
    batch, heads, length, width = query.shape
    output = torch.empty(batch, length, heads, width, dtype=query.dtype)
    panels = -(-length // COLUMNS)
    shared = batch * key.shape[1]
    keys = np.empty((shared, panels, width // 2, COLUMNS), dtype=np.uint32)
    values = np.empty((shared, -(-width // COLUMNS), -(-length // 2), COLUMNS), dtype=np.uint32)
    _pack(pairs(key), words(value), keys, values)
    _attend(pairs(query), keys, values, np.float32(scale * LOG2_E), window or length, words(output))
    return output


def _pack_keys_and_values(key_pairs: np.ndarray, value_words: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    """Pack keys into panels of keys with pairs along the width, values into panels of the width with pairs of keys."""
    shared = key_pairs.shape[1]
    for index in numba.prange(keys.shape[0]):
        row, head = index // shared, index % shared
        for panel in range(keys.shape[1]):
            pack_columns(key_pairs[row, head], panel * COLUMNS, keys[index, panel])
        for pair in range(values.shape[2]):
            for panel in range(values.shape[1]):
                pack_rows(value_words[row, head], pair, panel * COLUMNS, values[index, panel, pair])


def _attend_queries(
    query_pairs: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: np.float32, window: int, output: np.ndarray
) -> None:
    """Loop over heads of sequences in parallel, over panels of queries in turn; ``scale`` includes ``log2 e``."""
    heads, length, half = query_pairs.shape[1:]
    shared = keys.shape[0] // query_pairs.shape[0]
    width = output.shape[3]
    for task in numba.prange(query_pairs.shape[0] * heads):
        row, head = task // heads, task % heads
        source = row * shared + head // (heads // shared)
        scores = np.empty((keys.shape[1] * COLUMNS, COLUMNS), dtype=np.float32)
        weights = np.empty((values.shape[2] + 1, COLUMNS), dtype=np.uint32)
        queries = np.empty((half, COLUMNS), dtype=np.uint32)
        mixed = np.empty((values.shape[1] * COLUMNS, COLUMNS), dtype=np.float32)
        divisor = np.empty(COLUMNS, dtype=np.float32)
        for first in range(0, length, COLUMNS):
            count = min(first + COLUMNS, length)
            oldest = max(0, first - window + 1) // COLUMNS * COLUMNS
            pack_columns(query_pairs[row, head], first, queries)
            _multiply(keys[source], queries, 0, half, oldest, count, scores)
            _mask(scores, first, window, oldest, count)
            _normalize(scores, oldest, count, scale, weights, divisor)
            _multiply(values[source], weights, oldest // 2, (count + 1) // 2, 0, width, mixed)
            for column in range(min(COLUMNS, length - first)):
                target = output[row, first + column, head]
                inverse = np.float32(1.0) / divisor[column]
                for channel in range(width):
                    target[channel] = np.uint16(rounded(mixed[channel, column] * inverse) >> np.uint32(16))


@numba.njit(error_model="numpy")
def _multiply(
    panels: np.ndarray, right: np.ndarray, first: int, last: int, begin: int, end: int, product: np.ndarray
) -> None:
    """``product[i, j] = sum_k panels[.., k, i] . right[k, j]`` for i in ``begin .. end``, k in ``first .. last``."""
    address = np.intp(right[first].ctypes.data)
    for row in range(begin, end, ROWS):
        product[row : row + ROWS] = 0
        left = np.intp(panels[row // COLUMNS, first].ctypes.data) + 4 * (row % COLUMNS)
        multiply_tile(left, address, last - first, np.intp(product[row].ctypes.data), COLUMNS)


@numba.njit(error_model="numpy")
def _mask(scores: np.ndarray, first: int, window: int, oldest: int, count: int) -> None:
    """Set scores of later keys, and of keys before the window, to ``-inf``; ``first`` is the panel's first query."""
    for key in range(first + 1, count):
        scores[key, : key - first] = -np.inf
    for key in range(oldest, min(count, first + COLUMNS - window)):
        scores[key, max(0, key + window - first) :] = -np.inf


@numba.njit(error_model="numpy")
def _normalize(
    scores: np.ndarray, oldest: int, count: int, scale: np.float32, weights: np.ndarray, divisor: np.ndarray
) -> None:
    """Write ``2^(scale (score - largest))`` of keys ``oldest .. count`` as bfloat16 pairs, and its sum per column."""
    # Columns past the last query may have no unmasked key, and -inf - -inf would be NaN.
    largest = np.full(COLUMNS, np.float32(-3e38), dtype=np.float32)
    for key in range(oldest, count):
        for column in range(COLUMNS):
            largest[column] = max(largest[column], scores[key, column])
    divisor[:] = 0
    for pair in range(oldest // 2, count // 2):
        for column in range(COLUMNS):
            even = power_of_two(scale * (scores[2 * pair, column] - largest[column]))
            odd = power_of_two(scale * (scores[2 * pair + 1, column] - largest[column]))
            divisor[column] += even + odd
            weights[pair, column] = (rounded(even) >> np.uint32(16)) | (rounded(odd) & np.uint32(0xFFFF0000))
    if count % 2:
        for column in range(COLUMNS):
            even = power_of_two(scale * (scores[count - 1, column] - largest[column]))
            divisor[column] += even
            weights[count // 2, column] = rounded(even) >> np.uint32(16)


_pack: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_pack_keys_and_values)
_attend: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_attend_queries)
