"""Wanda: zero the weights with the smallest ``|w| ||x||`` in each row, change no other (arXiv 2306.11695)."""

from typing import Literal

import torch

from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.solvers.magnitude import drop_smallest
from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.quantization.statistics import HessianDiagonal


def wanda(weight: torch.Tensor, hessian_diagonal: torch.Tensor, sparsity: Sparsity) -> Solution:
    """Prune ``weight`` ``[rows, in]`` by ``|W_ij| ||x_j||``; ``hessian_diagonal`` ``[in]`` is ``||x_j||^2``.

    Zeros exactly ``floor(p in)`` weights per row, or by n:m group; kept weights are bit-identical.
    """
    kept = sparsity.mask_rows(weight.abs() * hessian_diagonal.sqrt())
    return Solution(torch.where(kept, weight, 0.0), kept=kept)


class Wanda(MethodOptions):
    """Wanda; it has no options."""

    name: Literal["wanda"] = "wanda"


def _solve(_: Wanda, problem: LayerProblem) -> Solution:
    assert problem.hessian_diagonal is not None
    return wanda(problem.weight, problem.hessian_diagonal, problem.pattern)


WANDA = LayerSolver(Wanda, _solve, drop_smallest, HessianDiagonal, quantizes=False, prunes=True)
