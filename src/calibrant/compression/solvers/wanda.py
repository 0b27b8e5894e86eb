"""Wanda: drop the weights of least ``|w| * ||x||`` in each row, change nothing else (arXiv 2306.11695)."""

import torch

from calibrant.compression.solvers.result import Solution
from calibrant.compression.solvers.sparsity import Sparsity


def wanda(weight: torch.Tensor, sum_of_squares: torch.Tensor, sparsity: Sparsity) -> Solution:
    """Prune ``weight`` ``[rows, in]`` by ``|W_ij| sqrt(sum x_j^2)``; ``sum_of_squares`` ``[in]`` (methods.md §9).

    Exactly ``floor(p in)`` zeros a row, or n:m; kept weights are bit-identical.
    """
    kept = sparsity.mask_rows(weight.abs() * sum_of_squares.sqrt())
    return Solution(torch.where(kept, weight, 0.0), kept=kept)
