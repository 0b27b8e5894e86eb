"""Sums per channel over the rows of bfloat16 inputs, in one pass over memory."""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_words import widened, words

# Parts of rows summed in parallel: a constant, so that sums do not depend on the number of cores.
_PARTS = 16


def takes(inputs: torch.Tensor) -> bool:
    """Whether these loops support ``inputs``: bfloat16 on the CPU."""
    return inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu"


def column_squares(inputs: torch.Tensor) -> torch.Tensor:
    """``sum_i x_ij^2`` of bfloat16 ``[rows, in]`` on the CPU, float32 ``[in]``."""
    parts = torch.zeros(_PARTS, inputs.shape[1], dtype=torch.float32)
    _squares(words(inputs.contiguous()), parts.numpy())
    return parts.sum(0)


def column_magnitudes(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_i |x_ij|`` and ``max_i |x_ij|`` of bfloat16 ``[rows, in]`` on the CPU, float32 ``[in]`` each.

    A NaN makes its channel's sum NaN.
    """
    parts = torch.zeros(2, _PARTS, inputs.shape[1], dtype=torch.float32)
    _magnitudes(words(inputs.contiguous()), parts[0].numpy(), parts[1].numpy())
    return parts[0].sum(0), parts[1].amax(0)


def _add_squares(rows: np.ndarray, parts: np.ndarray) -> None:
    for part in numba.prange(parts.shape[0]):
        total = parts[part]
        for index in range(rows.shape[0] * part // _PARTS, rows.shape[0] * (part + 1) // _PARTS):
            row = rows[index]
            for column in range(row.shape[0]):
                value = widened(row[column])
                total[column] += value * value


def _add_magnitudes(rows: np.ndarray, sums: np.ndarray, largest: np.ndarray) -> None:
    for part in numba.prange(sums.shape[0]):
        total, most = sums[part], largest[part]
        for index in range(rows.shape[0] * part // _PARTS, rows.shape[0] * (part + 1) // _PARTS):
            row = rows[index]
            for column in range(row.shape[0]):
                value = abs(widened(row[column]))
                total[column] += value
                most[column] = max(most[column], value)


_squares: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_add_squares)
_magnitudes: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_add_magnitudes)
