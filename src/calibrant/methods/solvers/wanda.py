"""Wanda: drop the weights of least ``|w| * ||x||`` in each row, change nothing else (arXiv 2306.11695)."""

from typing import Literal

import torch

from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.magnitude import drop_smallest
from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.quantization.statistics import HessianDiagonal


def wanda(weight: torch.Tensor, hessian_diagonal: torch.Tensor, sparsity: Sparsity) -> Solution:
    """Prune ``weight`` ``[rows, in]`` by ``|W_ij| sqrt(sum x_j^2)``; ``hessian_diagonal`` ``[in]`` (methods.md §9).

    Exactly ``floor(p in)`` zeros a row, or n:m; kept weights are bit-identical.
    """
    kept = sparsity.mask_rows(weight.abs() * hessian_diagonal.sqrt())
    return Solution(torch.where(kept, weight, 0.0), kept=kept)


class Wanda(MethodOptions):
    """Wanda."""

    name: Literal["wanda"] = "wanda"


def _solve(_: Wanda, problem: LayerProblem) -> Solution:
    assert problem.hessian_diagonal is not None
    return wanda(problem.weight, problem.hessian_diagonal, problem.pattern)


WANDA = LayerSolver(Wanda, _solve, drop_smallest, HessianDiagonal, quantizes=False, prunes=True)
