"""Rounding weights to the nearest grid points in one pass over memory.

The kernel exists in Numba, parallel over rows, and as a PyTorch twin; both give the same bits.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.number_types import CompiledNumbers, NumberType, nearest_number


def round_to_grid(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, numbers: NumberType, compiled: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8, as ``NumberType.coded`` gives them) and values (float32) of ``weight`` ``[rows, in]`` (float32).

    ``scale`` and ``zero_point`` are float32 ``[rows, groups]``, for groups of equal width; values are
    ``scale (number - zero_point)``. The PyTorch twin runs with ``compiled=False`` and for tensors on a GPU.
    """
    if not compiled or weight.device.type != "cpu":
        return _torch_round(weight, scale, zero_point, numbers)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    values = torch.empty(weight.shape, dtype=torch.float32)
    arrays = (tensor.contiguous().numpy() for tensor in (weight, scale, zero_point))
    _compiled(*arrays, codes.numpy(), values.numpy(), numbers.compiled)
    return numbers.coded(codes, values, _columns(scale, weight)), values


def _torch_round(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, numbers: NumberType
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.reshape(len(weight), scale.shape[1], -1)
    found = numbers.nearest(groups / scale[..., None] + zero_point[..., None])
    values = ((found - zero_point[..., None]) * scale[..., None]).view(weight.shape)
    return numbers.coded(found.view(weight.shape).to(torch.int8), values, _columns(scale, weight)), values


def _columns(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The scale of every weight ``[rows, in]``."""
    return scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)


def _round_rows(
    weight: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    codes: np.ndarray,
    values: np.ndarray,
    numbers: CompiledNumbers,
) -> None:
    width = weight.shape[1] // scale.shape[1]
    qmin, qmax, mantissa_bits, least_exponent = numbers
    for row in numba.prange(weight.shape[0]):
        for group in range(scale.shape[1]):
            step, offset, first = scale[row, group], zero_point[row, group], group * width
            here, found = weight[row, first : first + width], values[row, first : first + width]
            written = codes[row, first : first + width]
            for column in range(width):
                wanted = here[column] / step + offset
                number, steps = nearest_number(wanted, qmin, qmax, mantissa_bits, least_exponent)
                written[column] = np.int8(steps)
                found[column] = (number - offset) * step


_compiled: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_round_rows)
