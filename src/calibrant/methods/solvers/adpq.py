"""AdpQ: a share of the largest weights on grids of their own, no data (arXiv 2405.13358; methods.md §15)."""

from typing import Literal

import torch
from pydantic import Field

from calibrant.kernels.masks import largest
from calibrant.methods.method import LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution, SolverRecord
from calibrant.quantization.grids import GridSpec, encode_groups, stored_scale


def adpq(weight: torch.Tensor, spec: GridSpec, *, share: float = 0.06, segments: tuple[int, ...] = ()) -> Solution:
    """Quantize ``weight`` ``[rows, in]`` (float32): outliers and the rest of each group, each on its symmetric grid.

    The paper's threshold on the shrunk weights selects by magnitude, so the ``round(share n)`` largest of each of
    ``segments`` (runs of rows) are taken directly (ours). Scales are ``max / (2^(bits-1) - 1)``; the result is dense.
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
    """AdpQ, stored dense; no data. The ``share`` of largest weights gets grids of its own."""

    name: Literal["adpq"] = "adpq"
    share: float = Field(default=0.06, gt=0, lt=1)


ADPQ = LayerSolver(
    Adpq,
    lambda options, problem: adpq(problem.weight, problem.grid_spec, share=options.share, segments=problem.segments),
    symmetric=True,
    stored_dense=lambda _: True,
)
