"""HQQ: half-quadratic splitting fits each group's zero point, without data (released code: dropbox/hqq)."""

from typing import Literal

import torch

from calibrant.methods.method import LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution
from calibrant.quantization.grids import GridSpec, encode_groups, stored_scale

_STEPS = 20
_NORM = 0.7
_BETA, _BETA_GROWTH = 10.0, 1.01


def hqq(weight: torch.Tensor, spec: GridSpec) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` (float32) with fixed scales and zero points that are not integers.

    A group's range is its minimum to its maximum, which need not include 0. The zero point with the smallest mean
    absolute error of all steps is kept (ours; the released code keeps the last). The result is dense, since ordinary
    formats store integer zero points only.
    """
    groups = weight.reshape(len(weight), -1, spec.group_size or weight.shape[1]).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = stored_scale((high - low) / (spec.qmax - spec.qmin), spec)
    zero_point = spec.qmin - low / scale
    best, best_zero_point, beta = None, zero_point, _BETA
    for _ in range(_STEPS):
        codes = encode_groups(groups, scale, zero_point, spec)
        error = groups - (codes - zero_point) * scale
        cost = error.abs().mean(-1, keepdim=True)
        if best is None:
            best = cost
        best_zero_point = torch.where(cost < best, zero_point, best_zero_point)
        best = torch.minimum(best, cost)
        # The proximal step of |e|^0.7 removes outliers from the error, so that they do not shift the zero point.
        shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-12) ** (_NORM - 1) / beta).clamp(min=0)
        zero_point = (codes - (groups - shrunk) / scale).mean(-1, keepdim=True)
        beta *= _BETA_GROWTH
    codes = encode_groups(groups, scale, best_zero_point, spec)
    return Solution(((codes - best_zero_point) * scale).view_as(weight))


class Hqq(MethodOptions):
    """HQQ, stored dense; no data."""

    name: Literal["hqq"] = "hqq"


HQQ = LayerSolver(
    Hqq,
    lambda _, problem: hqq(problem.weight, problem.grid_spec),
    symmetric=False,
    stored_dense=lambda _: True,
)
