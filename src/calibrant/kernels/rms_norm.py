"""Root-mean-square norm of bfloat16 rows in one pass over memory (arXiv 1910.07467, equation 4)."""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_words import rounded, widened, words

_UPPER_HALF = 16


def rms_norm(inputs: torch.Tensor, gain: torch.Tensor, epsilon: float, rounded_first: bool) -> torch.Tensor:
    """``gain x / sqrt(mean(x^2) + epsilon)`` over the last axis, computed in float32.

    ``inputs`` bfloat16 ``[..., width]``, ``gain`` float32 ``[width]``, both on the CPU; returns bfloat16
    ``[..., width]``. ``rounded_first`` rounds the quotient to bfloat16 before the product with the gain, as Llama does.
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    output = torch.empty_like(rows)
    _normalize(words(rows), gain.numpy(), np.float32(epsilon), rounded_first, words(output))
    return output.view(inputs.shape)


@numba.njit(fastmath={"reassoc", "contract"}, error_model="numpy")
def _sum_of_squares(row: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for column in range(row.shape[0]):
        value = widened(row[column])
        total += value * value
    return total


def _normalize_rows(
    rows: np.ndarray, gain: np.ndarray, epsilon: np.float32, rounded_first: bool, output: np.ndarray
) -> None:
    width = rows.shape[1]
    for index in numba.prange(rows.shape[0]):
        row, target = rows[index], output[index]
        factor = np.float32(1.0) / np.sqrt(_sum_of_squares(row) / np.float32(width) + epsilon)
        if rounded_first:
            for column in range(width):
                scaled = np.uint16(rounded(widened(row[column]) * factor) >> np.uint32(_UPPER_HALF))
                target[column] = rounded(widened(scaled) * gain[column]) >> np.uint32(_UPPER_HALF)
        else:
            for column in range(width):
                target[column] = rounded(widened(row[column]) * factor * gain[column]) >> np.uint32(_UPPER_HALF)


_normalize: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_normalize_rows)
