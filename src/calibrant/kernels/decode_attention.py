"""Attention of one new token per row to the row's earlier tokens, over a cache in the order of reading.

Keys are transposed, so that scores of neighbouring positions form a vector; every entry of the cache is read once for
all heads that share it.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_words import rounded, widened, words
from calibrant.kernels.exponential import LOG2_E, power_of_two


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, count: int, scale: float
) -> torch.Tensor:
    """``softmax(scale q k^T) v`` over positions ``first[row]`` to ``count - 1`` of each row.

    ``query`` ``[batch, heads, 1, width]``, ``keys`` ``[batch, kv heads, width, capacity]``, ``values`` ``[batch, kv
    heads, capacity, width]``, all bfloat16 on the CPU; ``first`` int64 ``[batch]``. Sums are float32. Returns bfloat16
    ``[batch, 1, heads, width]``.

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
    output = torch.empty(batch, 1, heads, width, dtype=query.dtype)
    queries = words(query.reshape(batch, heads, width).contiguous())
    factor = np.float32(scale * LOG2_E)
    _attend(queries, words(keys), words(values), first.numpy(), count, factor, words(output)[:, 0])
    return output


def _attend_rows(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    first: np.ndarray,
    count: int,
    scale: np.float32,
    output: np.ndarray,
) -> None:
    shared, width = keys.shape[1], keys.shape[2]
    group = queries.shape[1] // shared
    for task in numba.prange(queries.shape[0] * shared):
        row, source = task // shared, task % shared
        begin = first[row]
        scores = np.zeros((group, count - begin), dtype=np.float32)
        mixed = np.zeros((group, width), dtype=np.float32)
        _score(queries[row, source * group : (source + 1) * group], keys[row, source], begin, scale, scores)
        for head in range(group):
            _normalize(scores[head])
        _mix(scores, values[row, source, begin:count], mixed)
        for head in range(group):
            target = output[row, source * group + head]
            for channel in range(width):
                target[channel] = np.uint16(rounded(mixed[head, channel]) >> np.uint32(16))


@numba.njit(error_model="numpy")
def _score(queries: np.ndarray, keys: np.ndarray, begin: int, scale: np.float32, scores: np.ndarray) -> None:
    """Add the scores of positions ``begin + p`` to ``scores[head, p]``."""
    for channel in range(keys.shape[0]):
        # A slice that starts at the first position: its loop needs no check for negative indices, so it vectorizes.
        line = keys[channel][begin : begin + scores.shape[1]]
        for head in range(queries.shape[0]):
            factor = widened(queries[head, channel]) * scale
            score = scores[head]
            for position in range(len(score)):
                score[position] += factor * widened(line[position])


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
        line = values[position]
        for head in range(weights.shape[0]):
            weight, target = weights[head, position], mixed[head]
            for channel in range(len(target)):
                target[channel] += weight * widened(line[channel])


_attend: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_attend_rows)
