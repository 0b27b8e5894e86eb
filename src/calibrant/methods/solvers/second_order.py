"""What GPTQ and SparseGPT share: dead columns, solving order, damping and the factor (methods.md §3.6, §5)."""

from dataclasses import dataclass

import torch

from calibrant.kernels.inverse_factor import inverse_factor


@dataclass(frozen=True)
class Prepared:
    """``weight`` and ``factor`` with columns in solving ``order`` (int64 ``[in]``).

    ``damping`` times the diagonal's mean is what was added to the Hessian's diagonal.
    """

    weight: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor
    damping: float
    dead_columns: int


def prepare(weight: torch.Tensor, hessian: torch.Tensor, damping: float, act_order: bool) -> Prepared:
    """Make dead columns harmless, order by the diagonal if asked (stable, descending), damp and factor.

    Raises:
        NotPositiveDefiniteError: the Hessian cannot be factored.
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
    """Columns from solving order back to the layer's."""
    return columns.index_select(1, torch.argsort(order))
