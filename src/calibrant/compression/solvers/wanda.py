"""Wanda: drop the weights of least ``|w| * ||x||`` in each row, change nothing else (arXiv 2306.11695)."""

from typing import Literal

import torch

from calibrant.compression.solvers.magnitude import drop_smallest
from calibrant.compression.solvers.method import Method, MethodOptions, Task
from calibrant.compression.solvers.result import Solution
from calibrant.compression.solvers.sparsity import Sparsity
from calibrant.compression.statistics import ColumnNorm


def wanda(weight: torch.Tensor, sum_of_squares: torch.Tensor, sparsity: Sparsity) -> Solution:
    """Prune ``weight`` ``[rows, in]`` by ``|W_ij| sqrt(sum x_j^2)``; ``sum_of_squares`` ``[in]`` (methods.md §9).

    Exactly ``floor(p in)`` zeros a row, or n:m; kept weights are bit-identical.
    """
    kept = sparsity.mask_rows(weight.abs() * sum_of_squares.sqrt())
    return Solution(torch.where(kept, weight, 0.0), kept=kept)


class Wanda(MethodOptions):
    """Wanda."""

    name: Literal["wanda"] = "wanda"


def _solve(_: Wanda, task: Task) -> Solution:
    assert task.sum_of_squares is not None
    return wanda(task.weight, task.sum_of_squares, task.pattern)


WANDA = Method(Wanda, _solve, drop_smallest, ColumnNorm, quantizes=False, prunes=True)
