"""Rounding weights to the nearest grid points in one pass over memory.

The kernel exists in Numba, parallel over rows, and as a PyTorch twin; both give the same bits.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch


def round_to_grid(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, compiled: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8) and values ``scale (code - zero_point)`` (float32) of ``weight`` ``[rows, in]`` (float32).

    ``scale`` and ``zero_point`` are float32 ``[rows, groups]``, for groups of equal width. Codes are clamped to
    ``qmin ... qmax``, then rounded half to even. The PyTorch twin runs with ``compiled=False`` and for tensors on a
    GPU.
    """
    if not compiled or weight.device.type != "cpu":
        return _torch_round(weight, scale, zero_point, qmin, qmax)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    values = torch.empty(weight.shape, dtype=torch.float32)
    arrays = (tensor.contiguous().numpy() for tensor in (weight, scale, zero_point))
    _compiled(*arrays, codes.numpy(), values.numpy(), np.float32(qmin), np.float32(qmax))
    return codes, values


def _torch_round(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.reshape(len(weight), scale.shape[1], -1)
    scale, zero_point = scale[..., None], zero_point[..., None]
    codes = torch.round(torch.clamp(groups / scale + zero_point, qmin, qmax))
    return codes.view(weight.shape).to(torch.int8), ((codes - zero_point) * scale).view(weight.shape)


def _round_rows(
    weight: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    codes: np.ndarray,
    values: np.ndarray,
    qmin: np.float32,
    qmax: np.float32,
) -> None:
    width = weight.shape[1] // scale.shape[1]
    for row in numba.prange(weight.shape[0]):
        for group in range(scale.shape[1]):
            step, offset, first = scale[row, group], zero_point[row, group], group * width
            here, found = weight[row, first : first + width], values[row, first : first + width]
            written = codes[row, first : first + width]
            for column in range(width):
                code = np.rint(min(max(here[column] / step + offset, qmin), qmax))
                written[column] = np.int8(code)
                found[column] = (code - offset) * step


_compiled: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_round_rows)
