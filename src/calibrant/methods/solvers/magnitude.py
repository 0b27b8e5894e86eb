"""Magnitude pruning: the data-free control (methods.md §10)."""

from typing import Literal

import torch

from calibrant.kernels.masks import keep_largest
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.sparsity import Sparsity


def magnitude(weight: torch.Tensor, sparsity: Sparsity, segments: tuple[int, ...] = ()) -> Solution:
    """Drop exactly ``floor(p n)`` smallest ``|w|`` of the whole matrix, or of every n:m group.

    ``segments`` are lengths of consecutive runs of rows, each a matrix of its own; none means one matrix.
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
    """Magnitude pruning of a problem's weights."""
    return magnitude(problem.weight, problem.pattern, problem.segments)


MAGNITUDE = LayerSolver(Magnitude, lambda _, problem: drop_smallest(problem), quantizes=False, prunes=True)
