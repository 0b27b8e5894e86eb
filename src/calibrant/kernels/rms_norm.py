"""Root-mean-square norm of bfloat16 rows in one pass over memory (arXiv 1910.07467, equation 4)."""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_words import rounded, widened, words

_UPPER = 16


def rms_norm(inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``weight * bfloat16(x / sqrt(mean(x^2) + epsilon))`` over the last axis, means in float32.

    ``inputs`` bfloat16 ``[..., width]``, ``weight`` bfloat16 ``[width]``, both on the CPU; returns bfloat16
    ``[..., width]``.
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    output = torch.empty_like(rows)
    _normalize(words(rows), words(weight), np.float32(epsilon), words(output))
    return output.view(inputs.shape)


@numba.njit(fastmath={"reassoc", "contract"}, error_model="numpy")
def _sum_of_squares(row: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for column in range(row.shape[0]):
        value = widened(row[column])
        total += value * value
    return total


def _normalize_rows(rows: np.ndarray, weight: np.ndarray, epsilon: np.float32, output: np.ndarray) -> None:
    width = rows.shape[1]
    for index in numba.prange(rows.shape[0]):
        row, target = rows[index], output[index]
        factor = np.float32(1.0) / np.sqrt(_sum_of_squares(row) / np.float32(width) + epsilon)
        for column in range(width):
            scaled = np.uint16(rounded(widened(row[column]) * factor) >> np.uint32(_UPPER))
            target[column] = rounded(widened(scaled) * widened(weight[column])) >> np.uint32(_UPPER)


_normalize: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_normalize_rows)
