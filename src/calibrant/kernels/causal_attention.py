"""Causal attention in bfloat16 on a CPU with the bfloat16 register tile.

Scores are built transposed, keys by queries: the softmax over the keys then runs down the columns, a vector of queries
at a time, and its result already lies as the second product wants it. Keys after the last query of a panel are never
looked at. Scores, their maximum and their sum are float32; probabilities are rounded to bfloat16 before they weigh the
values, and the sum divides afterwards.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_tile import COLUMNS, ROWS, multiply_tile, pack_columns, pack_rows
from calibrant.kernels.bfloat16_words import pairs, rounded, words
from calibrant.kernels.exponential import LOG2_E, power_of_two


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of every position to itself and earlier ones; needs ``bfloat16_tile.available()``.

    ``query`` ``[batch, heads, length, width]``; ``key``, ``value`` ``[batch, kv heads, length, width]``; ``heads`` is a
    multiple of ``kv heads``, ``width`` is even, ``scale`` positive. Returns ``[batch, length, heads, width]``; all
    bfloat16.
    """
    batch, heads, length, width = query.shape
    output = torch.empty(batch, length, heads, width, dtype=query.dtype)
    panels = -(-length // COLUMNS)
    shared = batch * key.shape[1]
    keys = np.empty((shared, panels, width // 2, COLUMNS), dtype=np.uint32)
    values = np.empty((shared, -(-width // COLUMNS), -(-length // 2), COLUMNS), dtype=np.uint32)
    _pack(pairs(key), words(value), keys, values)
    _attend(pairs(query), keys, values, np.float32(scale * LOG2_E), words(output))
    return output


def _pack_keys_and_values(key_pairs: np.ndarray, value_words: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    """Keys: panels of keys, pairs along the width; values: panels of the width, pairs of keys."""
    shared = key_pairs.shape[1]
    for index in numba.prange(keys.shape[0]):
        row, head = index // shared, index % shared
        for panel in range(keys.shape[1]):
            pack_columns(key_pairs[row, head], panel * COLUMNS, keys[index, panel])
        for pair in range(values.shape[2]):
            for panel in range(values.shape[1]):
                pack_rows(value_words[row, head], pair, panel * COLUMNS, values[index, panel, pair])


def _attend_queries(
    query_pairs: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: np.float32, output: np.ndarray
) -> None:
    """One head of one sequence after the other, panel of queries by panel; ``scale`` includes ``log2 e``."""
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
            pack_columns(query_pairs[row, head], first, queries)
            _score(keys[source], queries, count, first, scores)
            _normalize(scores, count, scale, weights, divisor)
            _multiply(values[source], weights, (count + 1) // 2, width, mixed)
            for column in range(min(COLUMNS, length - first)):
                target = output[row, first + column, head]
                inverse = np.float32(1.0) / divisor[column]
                for channel in range(width):
                    target[channel] = np.uint16(rounded(mixed[channel, column] * inverse) >> np.uint32(16))


@numba.njit(error_model="numpy")
def _multiply(panels: np.ndarray, right: np.ndarray, pairs: int, rows: int, product: np.ndarray) -> None:
    """``product[i, j] = sum_k panels[.., k, i] . right[k, j]`` over ``pairs`` steps, for the first ``rows`` rows."""
    address = np.intp(right.ctypes.data)
    for begin in range(0, rows, ROWS):
        product[begin : begin + ROWS] = 0
        left = np.intp(panels[begin // COLUMNS].ctypes.data) + 4 * (begin % COLUMNS)
        multiply_tile(left, address, pairs, np.intp(product[begin].ctypes.data), COLUMNS)


@numba.njit(error_model="numpy")
def _score(keys: np.ndarray, queries: np.ndarray, count: int, first: int, scores: np.ndarray) -> None:
    """Products of keys ``0 .. count`` with the panel of queries that begins at ``first``; later keys get ``-inf``."""
    _multiply(keys, queries, queries.shape[0], count, scores)
    for key in range(first + 1, count):
        scores[key, : key - first] = -np.inf


@numba.njit(error_model="numpy")
def _normalize(scores: np.ndarray, count: int, scale: np.float32, weights: np.ndarray, divisor: np.ndarray) -> None:
    """``2^(scale (score - largest))`` down every column as pairs of bfloat16; their sums."""
    largest = np.full(COLUMNS, -np.inf, dtype=np.float32)
    for key in range(count):
        for column in range(COLUMNS):
            largest[column] = max(largest[column], scores[key, column])
    divisor[:] = 0
    for pair in range(count // 2):
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
