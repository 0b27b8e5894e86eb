"""Moments of the codes that scales give to groups of weights, from which scales are fitted by least squares.

The kernel exists in Numba, parallel over tiles of groups, and as a PyTorch twin. They sum in different orders, so fits
may differ in their last bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import torch

from calibrant.kernels.number_types import CompiledNumbers, NumberType, nearest_number
from calibrant.kernels.row_tiles import LANES, tiled


@dataclass(frozen=True)
class Moments:
    """Sums over each group, float32 ``[rows, groups]``; w is the importance, x the weight, q its code, v its value.

    ``ones``: of ``w q``; ``products``: of ``w x q``; ``squares``: of ``w q^2``; ``error``: of ``w (x - v)^2``.
    """

    ones: torch.Tensor
    products: torch.Tensor
    squares: torch.Tensor
    error: torch.Tensor


class WeightedGroups:
    """Groups of weights with their importance.

    Args:
        groups: weights, float32 ``[rows, groups, width]``.
        importance: the same shape.
        numbers: the numbers that weights are rounded to.
        compiled: False for the PyTorch twin, which GPUs always run.
    """

    def __init__(
        self, groups: torch.Tensor, importance: torch.Tensor, numbers: NumberType, compiled: bool = True
    ) -> None:
        self.groups, self.importance, self.numbers = groups, importance, numbers
        self._tiles: tuple[np.ndarray, np.ndarray] | None = None
        if compiled and groups.device.type == "cpu":
            first, second = (tiled(one.reshape(-1, groups.shape[-1]), 0.0).numpy() for one in (groups, importance))
            self._tiles = first, second

    def moments(self, scale: torch.Tensor, zero_point: torch.Tensor, centred: bool = True) -> Moments:
        """Moments at ``scale`` and ``zero_point`` (float32 ``[rows, groups]``).

        A number is the one nearest to ``x / scale + zero_point``, and its value ``scale (number - zero_point)``. Codes
        are numbers less their zero point if ``centred``, otherwise the numbers themselves.
        """
        if self._tiles is None:
            return self._twin(scale, zero_point, centred)
        count = scale.numel()
        groups, importance = self._tiles
        # Lanes beyond the last group have scale 1.
        padded = (_padded(one, len(groups), fill) for one, fill in ((scale, 1.0), (zero_point, 0.0)))
        found = np.empty((4, len(groups), LANES), dtype=np.float32)
        _compiled(groups, importance, *padded, found, centred, self.numbers.compiled)
        return Moments(*(torch.from_numpy(one).flatten()[:count].view(scale.shape) for one in found))

    def _twin(self, scale: torch.Tensor, zero_point: torch.Tensor, centred: bool) -> Moments:
        scale, zero_point = scale[..., None], zero_point[..., None]
        numbers = self.numbers.nearest(self.groups / scale + zero_point)
        codes = numbers - zero_point if centred else numbers
        weighted, error = self.importance * codes, self.groups - (numbers - zero_point) * scale
        return Moments(
            weighted.sum(-1),
            (weighted * self.groups).sum(-1),
            (weighted * codes).sum(-1),
            (self.importance * error.square()).sum(-1),
        )


def _padded(values: torch.Tensor, tiles: int, fill: float) -> np.ndarray:
    padded = torch.full((tiles * LANES,), fill)
    padded[: values.numel()] = values.flatten()
    return padded.view(tiles, LANES).numpy()


def _moments_of_tiles(
    groups: np.ndarray,
    importance: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    found: np.ndarray,
    centred: bool,
    numbers: CompiledNumbers,
) -> None:
    qmin, qmax, mantissa_bits, least_exponent = numbers
    for tile in numba.prange(len(groups)):
        scale, zero_point = scales[tile], zero_points[tile]
        sums = np.zeros((4, LANES), dtype=np.float32)
        for column in range(groups.shape[1]):
            weights, shares = groups[tile, column], importance[tile, column]
            for lane in range(LANES):
                wanted = weights[lane] / scale[lane] + zero_point[lane]
                number, _ = nearest_number(wanted, qmin, qmax, mantissa_bits, least_exponent)
                step = number - zero_point[lane]
                code = step if centred else number
                error = weights[lane] - step * scale[lane]
                weighted = shares[lane] * code
                sums[0, lane] += weighted
                sums[1, lane] += weighted * weights[lane]
                sums[2, lane] += weighted * code
                sums[3, lane] += shares[lane] * error * error
        found[:, tile] = sums


# Division by zero needs no check (scales are not 0), and a check would keep loops from vectorizing.
_compiled: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_moments_of_tiles)
