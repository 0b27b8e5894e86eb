"""Preparing second-order solves: dead columns, solving order, the inverse factor (arXiv 2210.17323)."""

from dataclasses import dataclass

import torch

from calibrant.kernels.inverse_factor import inverse_factor


@dataclass(frozen=True)
class Prepared:
    """The upper ``factor`` ``[in, in]`` with columns in solving ``order`` (int64 ``[in]``).

    ``dead`` (bool ``[in]``, in this order) columns have no input. ``damping`` times the mean of the Hessian's diagonal
    was added to the diagonal.
    """

    factor: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    damping: float

    @property
    def dead_columns(self) -> int:
        """How many columns have no input."""
        return int(self.dead.sum())

    def ordered(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` ``[rows, in]`` with columns in solving order, those of dead columns zero."""
        alive = weight.index_select(1, self.order)
        alive[:, self.dead] = 0
        return alive


def prepare(hessian: torch.Tensor, damping: float, act_order: bool) -> Prepared:
    """Order columns by descending diagonal with ``act_order``, a stable sort, and factor the damped ``hessian``.

    Dead columns (``H_jj = 0``) count as ``H_jj = 1``.

    Raises:
        NotPositiveDefiniteError: the Hessian cannot be factored at any damping tried.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    order = torch.arange(len(dead), device=hessian.device)
    if act_order:
        order = torch.argsort(torch.where(dead, 1.0, diagonal), descending=True, stable=True)
    factor, used = inverse_factor(hessian, damping, order)
    return Prepared(factor, order, dead[order], used)


def undo(order: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``columns`` ``[rows, in]`` from solving ``order`` back to the layer's order."""
    return columns.index_select(1, torch.argsort(order))
