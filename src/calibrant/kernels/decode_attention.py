"""Attention of one new token per row to the row's earlier tokens, over a cache in the order of reading.

Keys are transposed, so that scores of neighbouring positions form a vector; every entry of the cache is read once for
all heads that share it.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.arrays import array_of
from calibrant.kernels.bfloat16_words import in_float32
from calibrant.kernels.exponential import LOG2_E, power_of_two


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, count: int, scale: float
) -> torch.Tensor:
    """``softmax(scale q k^T) v`` over positions ``first[row]`` to ``count - 1`` of each row.

    ``query`` ``[batch, heads, 1, width]``, ``keys`` ``[batch, kv heads, width, capacity]``, ``values`` ``[batch, kv
    heads, capacity, width]``, all bfloat16 or all float32, on the CPU; ``first`` int64 ``[batch]``. Sums are float32.
    Returns ``[batch, 1, heads, width]`` in the dtype of ``query``.

    Raises:
        ValueError: the shapes do not fit together.
    """
    batch, heads, one, width = query.shape
    rows, shared, channels, capacity = keys.shape
    fits = one == 1 and rows == batch and channels == width and count <= capacity and heads % shared == 0
    if not fits or values.shape != (batch, shared, capacity, width) or first.shape != (batch,):
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}, "
            f"first {tuple(first.shape)} and count {count} do not fit together"
        )
    output = torch.empty(batch, heads, width)
    query = query.reshape(batch, heads, width).contiguous()
    _attend(*map(array_of, (query, keys, values)), first.numpy(), count, np.float32(scale * LOG2_E), output.numpy())
    return output[:, None].to(query.dtype)


def _attend_rows(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    first: np.ndarray,
    count: int,
    scale: np.float32,
    output: np.ndarray,
) -> None:
    shared = keys.shape[1]
    group = queries.shape[1] // shared
    for task in numba.prange(queries.shape[0] * shared):
        row, source = task // shared, task % shared
        begin = first[row]
        scores = np.zeros((group, count - begin), dtype=np.float32)
        mixed = output[row, source * group : (source + 1) * group]
        mixed[:] = 0
        _score(queries[row, source * group : (source + 1) * group], keys[row, source], begin, scale, scores)
        for head in range(group):
            _normalize(scores[head])
        _mix(scores, values[row, source, begin:count], mixed)


# Slices of the cache are taken once per task: each counts a reference, for which threads would wait for each other.


@numba.njit(error_model="numpy")
def _score(queries: np.ndarray, keys: np.ndarray, begin: int, scale: np.float32, scores: np.ndarray) -> None:
    """Add the scores of positions ``begin + p`` to ``scores[head, p]``; ``keys`` are ``[width, capacity]``."""
    first = np.uintp(begin)  # unsigned, so that loops need no check for negative indices and vectorize
    for channel in range(keys.shape[0]):
        for head in range(queries.shape[0]):
            factor = in_float32(queries[head, channel]) * scale
            for position in range(np.uintp(scores.shape[1])):
                scores[head, position] += factor * in_float32(keys[channel, first + position])


@numba.njit(error_model="numpy")
def _normalize(score: np.ndarray) -> None:
    """Softmax in place, with base 2: the scale of the scores includes ``log2 e``."""
    largest = score.max()
    for position in range(len(score)):
        score[position] = power_of_two(score[position] - largest)
    inverse = np.float32(1.0) / score.sum()
    for position in range(len(score)):
        score[position] *= inverse


@numba.njit(error_model="numpy")
def _mix(weights: np.ndarray, values: np.ndarray, mixed: np.ndarray) -> None:
    for position in range(values.shape[0]):
        for head in range(weights.shape[0]):
            weight = weights[head, position]
            for channel in range(values.shape[1]):
                mixed[head, channel] += weight * in_float32(values[position, channel])


_attend: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_attend_rows)
