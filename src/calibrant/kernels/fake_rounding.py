"""Fake quantization on CPUs: rounded values and their gradients, each in one pass over memory."""

from collections.abc import Callable

import numba
import numpy as np
import torch


def rounded_values(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: float, qmax: float
) -> torch.Tensor:
    """``scale (code - zero_point)`` of ``values`` ``[rows, width]``, with ``scale`` and ``zero_point`` ``[rows]``.

    Codes are clamped to ``qmin ... qmax``, then rounded half to even. All tensors are float32 on the CPU.
    """
    found = torch.empty(values.shape, dtype=torch.float32)
    arrays = [tensor.contiguous().numpy() for tensor in (values, scale, zero_point)]
    _values(*arrays, np.float32(qmin), np.float32(qmax), found.numpy())
    return found


def rounded_gradients(
    values: torch.Tensor,
    gradient: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    qmin: float,
    qmax: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to values ``[rows, width]``, scales ``[rows]`` and zero points ``[rows]``, float32.

    ``gradient`` ``[rows, width]`` is that of the loss with respect to ``rounded_values``. Rounding has gradient 1 (the
    straight-through estimator, arXiv 1308.3432). A value's gradient is its entry of ``gradient``, 0 if the value was
    clamped. A scale's is the sum of ``gradient (code - zero_point)``, less ``gradient value / scale`` for values not
    clamped. A zero point's is ``-scale`` times the sum of ``gradient`` over clamped values.
    """
    of_values = torch.empty(values.shape, dtype=torch.float32)
    of_scale, of_zero_point = (
        torch.empty(len(values), dtype=torch.float32),
        torch.empty(len(values), dtype=torch.float32),
    )
    arrays = [tensor.contiguous().numpy() for tensor in (values, gradient, scale, zero_point)]
    _gradients(*arrays, np.float32(qmin), np.float32(qmax), of_values.numpy(), of_scale.numpy(), of_zero_point.numpy())
    return of_values, of_scale, of_zero_point


def _round_rows(
    values: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    qmin: np.float32,
    qmax: np.float32,
    found: np.ndarray,
) -> None:
    for row in numba.prange(values.shape[0]):
        here, there, step, offset = values[row], found[row], scale[row], zero_point[row]
        for column in range(here.shape[0]):
            there[column] = (np.rint(min(max(here[column] / step + offset, qmin), qmax)) - offset) * step


@numba.njit(fastmath={"reassoc"}, error_model="numpy")
def _row_gradients(
    here: np.ndarray,
    gradient: np.ndarray,
    step: np.float32,
    offset: np.float32,
    qmin: np.float32,
    qmax: np.float32,
    of_values: np.ndarray,
) -> tuple[np.float32, np.float32]:
    of_scale, clamped = np.float32(0.0), np.float32(0.0)
    for column in range(here.shape[0]):
        steps = here[column] / step
        wanted = steps + offset
        code = min(max(wanted, qmin), qmax)
        inside = code == wanted
        of_values[column] = gradient[column] if inside else np.float32(0.0)
        of_scale += gradient[column] * (np.rint(code) - offset - (steps if inside else np.float32(0.0)))
        clamped += np.float32(0.0) if inside else gradient[column]
    return of_scale, -step * clamped


def _gradient_rows(
    values: np.ndarray,
    gradient: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    qmin: np.float32,
    qmax: np.float32,
    of_values: np.ndarray,
    of_scale: np.ndarray,
    of_zero_point: np.ndarray,
) -> None:
    for row in numba.prange(values.shape[0]):
        of_scale[row], of_zero_point[row] = _row_gradients(
            values[row], gradient[row], scale[row], zero_point[row], qmin, qmax, of_values[row]
        )


_values: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_round_rows)
_gradients: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_gradient_rows)
