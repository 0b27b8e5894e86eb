"""AdpQ: the largest weights and the rest of each group on separate grids, without data (arXiv 2405.13358)."""

from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.masks import largest
from calibrant.methods.method import LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution, SolverRecord
from calibrant.quantization.grids import GridSpec, encode_groups, stored_scale


def adpq(weight: torch.Tensor, spec: GridSpec, *, share: float = 0.06, segments: tuple[int, ...] = ()) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` (float32): in each group, outliers and the rest have separate symmetric grids.

    The paper's threshold on the shrunk weights selects by magnitude, so the outliers are the ``round(share n)`` largest
    of the n weights of each matrix (ours); ``segments`` are the row counts of matrices stacked by rows (empty: one
    matrix). Scales are ``max|w| / (2^(bits-1) - 1)``. The result is dense.
    """
    outlier = largest(weight, share, list(segments or (len(weight),)))
    groups = weight.reshape(len(weight), -1, spec.group_size or weight.shape[1]).float()
    chosen = outlier.view(groups.shape)
    values = torch.where(chosen, _rounded(groups * chosen, spec), _rounded(groups * ~chosen, spec))
    return Solution(values.view_as(weight), record=SolverRecord(outliers=int(outlier.sum())))


def _rounded(groups: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    scale = stored_scale(groups.abs().amax(-1, keepdim=True) / spec.qmax, spec)
    return encode_groups(groups, scale, torch.zeros_like(scale), spec) * scale


class Adpq(MethodOptions):
    """AdpQ, stored dense; no data. The ``share`` of largest weights has separate grids."""

    name: Literal["adpq"] = "adpq"
    share: float = Field(default=0.06, gt=0, lt=1)


ADPQ = LayerSolver(
    Adpq,
    lambda options, problem: adpq(problem.weight, problem.grid_spec, share=options.share, segments=problem.segments),
    symmetric=True,
    stored_dense=lambda _: True,
)
