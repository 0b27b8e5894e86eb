"""HQQ: the zero point of each group fitted by half-quadratic splitting, no data (dropbox/hqq; methods.md §16)."""

from typing import Literal

import torch

from calibrant.methods.method import LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution
from calibrant.quantization.grids import GridSpec, encode_groups, stored_scale

_STEPS = 20
_NORM = 0.7
_BETA, _BETA_GROWTH = 10.0, 1.01


def hqq(weight: torch.Tensor, spec: GridSpec) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` (float32) with a fixed scale and a zero point that is not a whole number.

    The range is minimum to maximum, 0 not forced into it. Of all steps the zero point of least mean absolute error is
    kept (ours; the released code keeps the last). The result is dense: ordinary formats hold whole zero points only.
    """
    groups = weight.reshape(len(weight), -1, spec.group_size or weight.shape[1]).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = stored_scale((high - low) / (spec.qmax - spec.qmin), spec)
    zero_point = spec.qmin - low / scale
    best, best_zero, beta = None, zero_point, _BETA
    for _ in range(_STEPS):
        codes = encode_groups(groups, scale, zero_point, spec)
        error = groups - (codes - zero_point) * scale
        cost = error.abs().mean(-1, keepdim=True)
        if best is None:
            best = cost
        best_zero = torch.where(cost < best, zero_point, best_zero)
        best = torch.minimum(best, cost)
        # The proximal step of |e|^0.7 splits off what a shift of the zero point should not follow.
        shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-12) ** (_NORM - 1) / beta).clamp(min=0)
        zero_point = (codes - (groups - shrunk) / scale).mean(-1, keepdim=True)
        beta *= _BETA_GROWTH
    codes = encode_groups(groups, scale, best_zero, spec)
    return Solution(((codes - best_zero) * scale).view_as(weight))


class Hqq(MethodOptions):
    """HQQ, stored dense; no data."""

    name: Literal["hqq"] = "hqq"


HQQ = LayerSolver(
    Hqq,
    lambda _, problem: hqq(problem.weight, problem.grid_spec),
    symmetric=False,
    stored_dense=lambda _: True,
)
