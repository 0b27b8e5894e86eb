"""Attention of one new token a row to the row's own earlier tokens, over a cache that lies as it is read.

Keys lie transposed, so that the scores of neighbouring positions are one vector; every entry of the cache is read once
for all heads that share it.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_words import rounded, widened, words


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, count: int, scale: float
) -> torch.Tensor:
    """``softmax(scale q k^T) v`` over positions ``first[row]`` to ``count - 1`` of each row.

    ``query`` ``[batch, heads, 1, width]``, ``keys`` ``[batch, kv heads, width, capacity]``, ``values`` ``[batch, kv
    heads, capacity, width]``, all bfloat16; ``first`` int64 ``[batch]``. Sums are float32. Returns bfloat16 ``[batch,
    1, heads, width]``.
    """
    batch, heads, _, width = query.shape
    output = torch.empty(batch, 1, heads, width, dtype=query.dtype)
    queries = words(query.reshape(batch, heads, width).contiguous())
    _attend(queries, words(keys), words(values), first.numpy(), count, np.float32(scale), words(output)[:, 0])
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
        scores = np.empty((group, count), dtype=np.float32)
        mixed = np.empty((group, width), dtype=np.float32)
        _score(queries[row, source * group : (source + 1) * group], keys[row, source], begin, count, scale, scores)
        for head in range(group):
            _normalize(scores[head], begin, count)
        _mix(scores, values[row, source], begin, count, mixed)
        for head in range(group):
            target = output[row, source * group + head]
            for channel in range(width):
                target[channel] = np.uint16(rounded(mixed[head, channel]) >> np.uint32(16))


@numba.njit(error_model="numpy")
def _score(
    queries: np.ndarray, keys: np.ndarray, begin: int, count: int, scale: np.float32, scores: np.ndarray
) -> None:
    scores[:] = 0
    for channel in range(keys.shape[0]):
        line = keys[channel]
        for head in range(queries.shape[0]):
            factor = widened(queries[head, channel]) * scale
            score = scores[head]
            for position in range(begin, count):
                score[position] += factor * widened(line[position])


@numba.njit(error_model="numpy")
def _normalize(score: np.ndarray, begin: int, count: int) -> None:
    largest = np.float32(-np.inf)
    for position in range(begin, count):
        largest = max(largest, score[position])
    total = np.float32(0.0)
    for position in range(begin, count):
        score[position] = np.exp(score[position] - largest)
        total += score[position]
    inverse = np.float32(1.0) / total
    for position in range(begin, count):
        score[position] *= inverse


@numba.njit(error_model="numpy")
def _mix(weights: np.ndarray, values: np.ndarray, begin: int, count: int, mixed: np.ndarray) -> None:
    mixed[:] = 0
    for position in range(begin, count):
        line = values[position]
        for head in range(weights.shape[0]):
            weight, target = weights[head, position], mixed[head]
            for channel in range(values.shape[1]):
                target[channel] += weight * widened(line[channel])


_attend: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_attend_rows)
