"""The range, among candidates, with the smallest squared output error ``e H e`` of a group of weights.

The kernel exists in Numba, parallel over tiles of rows, and as a PyTorch twin. They sum in different orders, so they
may choose differently between ranges of nearly equal cost.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.number_types import CompiledNumbers, NumberType
from calibrant.kernels.row_tiles import LANES, quantize_column, tiled, untiled


def cheapest_range(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    blocks: torch.Tensor,
    numbers: NumberType,
    compiled: bool = True,
) -> torch.Tensor:
    """The index of the cheapest range, int64 ``[rows, groups]``; ties go to the first.

    ``weight`` ``[rows, in]``; ``scales`` and ``zero_points`` ``[rows, candidates, groups]``; ``blocks``
    ``[groups, width, width]`` are the diagonal blocks of the Hessian; all float32. The PyTorch twin runs with
    ``compiled=False`` and for tensors on a GPU.
    """
    if not compiled or weight.device.type != "cpu":
        return _torch_search(weight, scales, zero_points, blocks, numbers)
    rows, candidates, groups = scales.shape
    work = tiled(weight, 0.0)
    tiled_scales, tiled_zero_points = (
        tiled(tensor.reshape(rows, -1), fill).view(-1, candidates, groups, LANES)
        for tensor, fill in ((scales, 1.0), (zero_points, 0.0))
    )
    best = torch.zeros(work.shape[0], groups, LANES, dtype=torch.int64)
    arrays = (tensor.numpy() for tensor in (work, tiled_scales, tiled_zero_points, blocks.contiguous(), best))
    _compiled(*arrays, numbers.compiled)
    return untiled(best, rows)


def _torch_search(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    blocks: torch.Tensor,
    numbers: NumberType,
) -> torch.Tensor:
    groups = weight.reshape(len(weight), blocks.shape[0], -1)
    costs = []
    for scale, zero_point in zip(scales.unbind(1), zero_points.unbind(1), strict=True):
        scale, zero_point = scale[..., None], zero_point[..., None]
        values = (numbers.nearest(groups / scale + zero_point) - zero_point) * scale
        errors = (values - groups).transpose(0, 1)
        costs.append(((errors @ blocks) * errors).sum(-1).T)
    return torch.stack(costs).argmin(0)


def _add_four_columns(product: np.ndarray, shares: np.ndarray, errors: np.ndarray, first: int) -> None:
    """Add four columns' products, so that the sums are loaded once for all of them."""
    s0, s1, s2, s3 = shares[first], shares[first + 1], shares[first + 2], shares[first + 3]
    e0, e1, e2, e3 = errors[first], errors[first + 1], errors[first + 2], errors[first + 3]
    for lane in range(LANES):
        product[lane] += (s0 * e0[lane] + s1 * e1[lane]) + (s2 * e2[lane] + s3 * e3[lane])


def _search_tiles(
    all_work: np.ndarray,
    all_scales: np.ndarray,
    all_zero_points: np.ndarray,
    blocks: np.ndarray,
    all_best: np.ndarray,
    numbers: CompiledNumbers,
) -> None:
    candidates, groups, width = all_scales.shape[1], blocks.shape[0], blocks.shape[1]
    for tile in numba.prange(all_work.shape[0]):
        work, scales, zero_points, best = all_work[tile], all_scales[tile], all_zero_points[tile], all_best[tile]
        kept = np.ones(LANES, dtype=np.bool_)
        value, code = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.int8)
        errors = np.empty((width, LANES), dtype=np.float32)
        product, cost = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.float32)
        least = np.empty(LANES, dtype=np.float32)
        for group in range(groups):
            block = blocks[group]
            least[:] = np.inf
            for candidate in range(candidates):
                scale, zero_point = scales[candidate, group], zero_points[candidate, group]
                for column in range(width):
                    value[:] = work[group * width + column]
                    quantize_column(value, kept, scale, zero_point, code, errors[column], numbers)
                cost[:] = 0
                # e H e / 2, from the lower half and half the diagonal, since the block is symmetric.
                for column in range(width):
                    error, half = errors[column], np.float32(0.5) * block[column, column]
                    for lane in range(LANES):
                        product[lane] = half * error[lane]
                    fours = column // 4 * 4
                    for other in range(0, fours, 4):
                        _add_four(product, block[column], errors, other)
                    for other in range(fours, column):
                        share, before = block[column, other], errors[other]
                        for lane in range(LANES):
                            product[lane] += share * before[lane]
                    for lane in range(LANES):
                        cost[lane] += error[lane] * product[lane]
                for lane in range(LANES):
                    if cost[lane] < least[lane]:
                        least[lane] = cost[lane]
                        best[group, lane] = candidate


_add_four: Callable[..., None] = numba.njit(error_model="numpy", cache=True)(_add_four_columns)
_compiled: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_search_tiles)
