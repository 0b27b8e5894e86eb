"""Preparing second-order solves: dead columns, solving order, damping, the inverse factor (arXiv 2210.17323)."""

from dataclasses import dataclass

import torch

from calibrant.kernels.inverse_factor import inverse_factor


@dataclass(frozen=True)
class Prepared:
    """``weight`` ``[rows, in]`` and upper ``factor`` ``[in, in]`` with columns in solving ``order`` (int64 ``[in]``).

    ``damping`` times the mean of the Hessian's diagonal was added to the diagonal.
    """

    weight: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor
    damping: float
    dead_columns: int


def prepare(weight: torch.Tensor, hessian: torch.Tensor, damping: float, act_order: bool) -> Prepared:
    """Zero the weights of dead columns, order columns by descending diagonal with ``act_order``, damp and factor.

    Dead columns (``H_jj = 0``) get ``H_jj = 1`` before damping, as in GPTQ's released code. The sort is stable.

    Raises:
        NotPositiveDefiniteError: the Hessian cannot be factored at any damping tried.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    diagonal[dead] = 1
    order = torch.arange(len(dead), device=weight.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian.index_select(0, order).index_select(1, order)
    ordered.diagonal().copy_(diagonal[order])
    alive = weight.index_select(1, order)
    alive[:, dead[order]] = 0
    factor, used = inverse_factor(ordered, damping)
    return Prepared(alive, factor, order, used, int(dead.sum()))


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """``hessian`` with ``damping`` times the mean of its diagonal added to the diagonal."""
    result = hessian.clone()
    result.diagonal().add_(damping * hessian.diagonal().mean())
    return result


def undo(order: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``columns`` ``[rows, in]`` from solving ``order`` back to the layer's order."""
    return columns.index_select(1, torch.argsort(order))
