"""Magnitude pruning, the control without data (docs/methods.md "magnitude")."""

from typing import Literal

import torch

from calibrant.kernels.masks import keep_largest
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.sparsity import Sparsity


def magnitude(weight: torch.Tensor, sparsity: Sparsity, segments: tuple[int, ...] = ()) -> Solution:
    """Zero the smallest ``|w|`` of ``weight`` ``[rows, in]``: exactly ``floor(p n)`` per matrix of n, or by n:m group.

    ``segments`` are the row counts of matrices stacked by rows; empty means one matrix. The released code of Wanda
    (locuslab/wanda) also prunes ties and one more.
    """
    scores = weight.abs()
    if sparsity.semi_structured:
        kept = sparsity.mask_rows(scores)
    else:
        runs = scores.split(list(segments or (len(scores),)))
        kept = torch.cat([keep_largest(run, sparsity.share) for run in runs])
    return Solution(torch.where(kept, weight, 0.0), kept=kept)


class Magnitude(MethodOptions):
    """Magnitude; no data."""

    name: Literal["magnitude"] = "magnitude"


def drop_smallest(problem: LayerProblem) -> Solution:
    """Magnitude pruning of a problem's weight, for layers that saw no token."""
    return magnitude(problem.weight, problem.pattern, problem.segments)


MAGNITUDE = LayerSolver(Magnitude, lambda _, problem: drop_smallest(problem), quantizes=False, prunes=True)
