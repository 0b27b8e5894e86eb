"""Rounding in training on CPUs: values and gradients, each in one pass over memory."""

from collections.abc import Callable

import numba
import numpy as np
import torch


def rounded_values(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """``scale (code - zero)`` of ``values`` ``[rows, width]``, with ``scale`` and ``zero`` ``[rows]``.

    All are float32 on the CPU. Half is rounded to even, after clamping.
    """
    found = torch.empty(values.shape, dtype=torch.float32)
    arrays = [tensor.contiguous().numpy() for tensor in (values, scale, zero)]
    _values(*arrays, np.float32(lowest), np.float32(highest), found.numpy())
    return found


def rounded_gradients(
    values: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, lowest: int, highest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``gradient`` ``[rows, width]`` of ``rounded_values`` is to its values, to its scales and to its zeros.

    Straight through the rounding: that of values is the gradient itself where nothing was clamped, else 0; that of a
    scale is the sum of the gradient times ``code - zero``, less ``value / scale`` where nothing was clamped; that of a
    zero is minus the scale times the sum of the gradient where something was.
    """
    of_values = torch.empty(values.shape, dtype=torch.float32)
    of_scale, of_zero = torch.empty(len(values), dtype=torch.float32), torch.empty(len(values), dtype=torch.float32)
    arrays = [tensor.contiguous().numpy() for tensor in (values, gradient, scale, zero)]
    _gradients(*arrays, np.float32(lowest), np.float32(highest), of_values.numpy(), of_scale.numpy(), of_zero.numpy())
    return of_values, of_scale, of_zero


def _round_rows(
    values: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    lowest: np.float32,
    highest: np.float32,
    found: np.ndarray,
) -> None:
    for row in numba.prange(values.shape[0]):
        here, there, step, offset = values[row], found[row], scale[row], zero[row]
        for column in range(here.shape[0]):
            there[column] = (np.rint(min(max(here[column] / step + offset, lowest), highest)) - offset) * step


@numba.njit(fastmath={"reassoc"}, error_model="numpy")
def _row_gradients(
    here: np.ndarray,
    gradient: np.ndarray,
    step: np.float32,
    offset: np.float32,
    lowest: np.float32,
    highest: np.float32,
    of_values: np.ndarray,
) -> tuple[np.float32, np.float32]:
    of_scale, clamped = np.float32(0.0), np.float32(0.0)
    for column in range(here.shape[0]):
        steps = here[column] / step
        wanted = steps + offset
        code = min(max(wanted, lowest), highest)
        inside = code == wanted
        of_values[column] = gradient[column] if inside else np.float32(0.0)
        of_scale += gradient[column] * (np.rint(code) - offset - (steps if inside else np.float32(0.0)))
        clamped += np.float32(0.0) if inside else gradient[column]
    return of_scale, -step * clamped


def _gradient_rows(
    values: np.ndarray,
    gradient: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    lowest: np.float32,
    highest: np.float32,
    of_values: np.ndarray,
    of_scale: np.ndarray,
    of_zero: np.ndarray,
) -> None:
    for row in numba.prange(values.shape[0]):
        of_scale[row], of_zero[row] = _row_gradients(
            values[row], gradient[row], scale[row], zero[row], lowest, highest, of_values[row]
        )


_values: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_round_rows)
_gradients: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_gradient_rows)
